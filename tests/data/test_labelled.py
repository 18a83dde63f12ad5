"""Images with labels: of a folder, an npz file, a function, and torchvision's folders."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from jiio_plugins.data import load_digits, load_labelled
from jiio_plugins.data.files import MOST_PIXELS
from tests.data.helpers import save_picture

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"class {k:02d}" for k in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two 32×32 colour images of each of twelve classes."""
    for k, name in enumerate(NAMES):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(2):
            save_picture(tmp_path / "mine" / name / f"{i}.png", (32, 32, 3), 2 * k + i)
    return tmp_path / "mine"


def test_a_folder_of_twelve_classes(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / NAMES[0] / "notes.txt").write_text("not looked at")
    x, y, classes = load_labelled(str(folder))
    assert x.shape == (24, 3, 32, 32)
    assert x.dtype == torch.float32
    assert classes == tuple(NAMES)
    assert sorted(y.tolist()) == sorted([*range(12)] * 2)
    pictures = []
    for path in (folder / NAMES[y[5]]).glob("*.png"):
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture).transpose(2, 0, 1) / 255)
    assert any(np.allclose(x[5], p) for p in pictures)
    few = load_labelled(str(folder), limit=7)
    assert torch.equal(few.x, x[:7])
    assert len(set(few.y.tolist())) > 3  # not all of the first class
    assert load_labelled(str(folder), resize=8).x.shape == (24, 3, 8, 8)


def test_halves_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "val")
    for name in ("train", "dog"):  # a class may be called train
        (tmp_path / "both" / "train" / name).mkdir(parents=True)
        save_picture(tmp_path / "both" / "train" / name / "0.png", (4, 4))
    assert load_labelled(str(tmp_path / "both"), "test").classes == tuple(NAMES)
    train = load_labelled(str(tmp_path / "both"), "train")
    assert train.classes == ("dog", "train")
    assert train.x.shape == (2, 1, 4, 4)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder with a subfolder .* got '.*none'"):
        load_labelled(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="has 0 subfolders: it must have one for each class"):
        load_labelled(str(folder / NAMES[0]))
    save_picture(folder / NAMES[3] / "tall.png", (40, 32, 3))
    with pytest.raises(ValueError, match=r"must have one size: .*--resize N"):
        load_labelled(str(folder))
    (folder / NAMES[3] / "tall.png").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in the class folders empty of"):
        load_labelled(str(folder))


@pytest.mark.parametrize("kind", ["cut", "text", "pipe", "huge"])
def test_broken_files_are_named(folder: Path, kind: str) -> None:
    path = folder / NAMES[3] / "bad.png"
    whole = (folder / NAMES[3] / "0.png").read_bytes()
    if kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    elif kind == "huge":
        Image.new("1", (MOST_PIXELS // 1000 + 1, 1000)).save(path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if kind == "cut" else b"no image")
    with pytest.raises(ValueError, match=r"1 of 25 files could not be read, .*bad\.png first"):
        load_labelled(str(folder))


def test_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    y = np.arange(6, dtype=np.uint8)
    wanted = torch.from_numpy(bytes_).float() / 255
    for x in (bytes_, bytes_.transpose(0, 2, 3, 1), bytes_ / 255):
        np.savez(tmp_path / "mine.npz", x=x, y=y)
        found = load_labelled(str(tmp_path / "mine.npz"))
        assert torch.allclose(found.x, wanted)
        assert found.y.tolist() == y.tolist()
        assert found.y.dtype == torch.int64
        assert found.classes is None
    np.savez(tmp_path / "grey.npz", x=bytes_[:, 0], y=y)
    assert load_labelled(str(tmp_path / "grey.npz"), limit=4).x.shape == (4, 1, 8, 8)
    (tmp_path / "my_images.py").write_text(
        "import torch\nload = lambda: (torch.ones(5, 3, 4, 4), torch.arange(5))\n"
        "one = lambda: torch.ones(5, 3, 4, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_labelled("my_images:load").x.shape == (5, 3, 4, 4)
    with pytest.raises(ValueError, match="must have x, the images, and y, their labels"):
        load_labelled("my_images:one")
    with pytest.raises(ValueError, match="has no function 'two'"):
        load_labelled("my_images:two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "must have x, the images, and y"),
        ({"y": np.zeros(5, int)}, r"y of .* must be integers, one for each of 6 images, got"),
        ({"y": np.zeros(6)}, r"must be integers, .* got torch.float64"),
        ({"y": np.arange(6) - 1}, "has a negative label, -1: count from 0"),
        ({"y": np.full(6, 2**40)}, "has the label 1099511627776: labels are classes"),
        ({"y": np.full(6, 2**31, np.uint32)}, "has the label 2147483648"),
        ({"x": np.zeros((6, 5, 8, 7))}, r"with 1 or 3 channels, .* got \(6, 5, 8, 7\)"),
        ({"x": np.zeros((0, 3, 8, 8)), "y": np.zeros(0, int)}, "one image at least"),
        ({"x": np.full((6, 3, 8, 8), 2.5)}, r"floats in \[0, 1\]: got torch.float64 from 2.5"),
        ({"x": np.full((6, 3, 8, 8), np.nan)}, r"floats in \[0, 1\]"),
        ({"x": np.zeros((6, 3, 8, 8), int)}, "must be uint8"),
        ({"x": np.full((6, 3, 8, 8), "a")}, "must be an array of numbers"),
        ({"x": np.full(6, None, object)}, "is no whole npz file"),
    ],
)
def test_bad_arrays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {"x": np.zeros((6, 3, 8, 8), np.uint8), "y": np.arange(6), **change}
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load_labelled(str(path))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x=np.zeros((6, 8, 8)), y=np.arange(6))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-30], whole[:100] + b"x" + whole[101:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz is no whole npz file"):
            load_labelled(str(path))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one\.npy is no whole npz file"):
        load_labelled(str(tmp_path / "one.npy"))
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FileNotFoundError, match="it is no regular one"):
        load_labelled(str(tmp_path / "pipe.npz"))


HEADERS: dict[str, tuple[Any, str, str]] = {
    "lies": ((10**7, 3, 1024, 1024), "|u1", "takes 29296.9 GiB unpacked, more than 4 GiB"),
    "text": ((3, 8, 8), "<U100000000", "takes 71.5 GiB unpacked"),
    "objects": ((3,), "|O", "holds objects of Python"),
    "negative": ((-3, 8, 8), "|u1", r"x has the shape \(-3, 8, 8\)"),
    "cut": ((3, 1024, 1024), "|u1", "is no whole npz file"),
    "header": (None, "", "is no whole npz file"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_what_an_npz_says_of_itself_is_not_believed(tmp_path: Path, kind: str) -> None:
    shape, dtype, message = HEADERS[kind]
    header, labels = io.BytesIO(), io.BytesIO()
    if shape is None:  # two gigabytes of header
        header.write(b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little"))
    else:
        about = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
    np.save(labels, np.arange(3))
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(1000))
        archive.writestr("y.npy", labels.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load_labelled(str(tmp_path / "bad.npz"))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["mnist", "cifar-10", "cifar-100", "svhn", "celeba"])
def test_what_to_fetch_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name} was not found whole .*download=True"):
        load_labelled(name, folder=tmp_path)


def test_torchvisions_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", "ab"))
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", ""]])
    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 3072)
    batch = pickle.dumps({"data": pixels, "labels": [1, 0, 1]})
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(batch)
    x, y, classes = load_labelled("cifar-10", folder=tmp_path)
    assert torch.equal(x, torch.from_numpy(pixels).reshape(3, 3, 32, 32).float() / 255)
    assert y.tolist() == [1, 0, 1]
    assert classes == ("a", "b")


def test_celeba_is_labelled_by_an_attribute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Faces:
        attr_names = ("Male", "Smiling", "")

        def __init__(self, root: str, **settings: Any) -> None:
            assert (root, settings) == (str(tmp_path), {"download": False, "split": "test"})

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
            return Image.new("RGB", (178, 218)), torch.tensor([index % 2, 1])

    monkeypatch.setattr(datasets, "CelebA", Faces)
    x, y, classes = load_labelled("celeba", folder=tmp_path, limit=2)
    assert x.shape == (2, 3, 218, 178)
    assert y.tolist() == [1, 1]
    assert classes == ("not Smiling", "Smiling")
    assert load_labelled("celeba:Male", folder=tmp_path, resize=16).y.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="no attribute 'Bald'; it has Male, Smiling"):
        load_labelled("celeba:Bald", folder=tmp_path)


def test_bad_settings() -> None:
    assert torch.equal(load_labelled("digits", limit=3).x, load_digits("test")[0][:3])
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        load_labelled("digits", "val")
    with pytest.raises(ValueError, match="at least 1 image"):
        load_labelled("digits", limit=0)
