"""Images of a folder, as one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from jiio_plugins.data.classification import load_digits
from jiio_plugins.data.files import read_files
from jiio_plugins.data.images import load_images, to_unit
from tests.data.helpers import save_picture

if TYPE_CHECKING:
    from pathlib import Path


def test_digits_are_split(tmp_path: Path) -> None:
    images = load_images("digits")
    assert images.shape == (1, 8, 8)
    assert (len(images.train), len(images.held_out)) == (1297, 500)
    assert images.train.dtype == torch.uint8
    assert torch.allclose(to_unit(images.held_out), load_digits("test")[0], atol=0.5 / 255)


def test_a_folder_of_images(tmp_path: Path) -> None:
    for k in range(20):
        (tmp_path / f"{k % 2}").mkdir(exist_ok=True)
        save_picture(tmp_path / f"{k % 2}" / f"{k:02d}.png", (12, 12, 3), k)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    images = load_images(str(tmp_path))
    assert images.shape == (3, 12, 12)
    assert (len(images.train), len(images.held_out)) == (18, 2)
    assert images.skipped == [tmp_path / "broken.jpg"]
    assert torch.equal(load_images(str(tmp_path)).train, images.train)
    save_picture(tmp_path / "tall.png", (20, 12))
    with pytest.raises(ValueError, match=r"one size: 00.png has 12×12 pixels, tall.png 12×20"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), resize=8).shape == (3, 8, 8)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder of images, an \.npz file"):
        load_images(str(tmp_path / "none"))
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 0 readable images \(1 could not be read\)"):
        load_images(str(tmp_path))


def test_sixteen_bits_are_scaled_and_floats_skipped(tmp_path: Path) -> None:
    wide = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(
        tmp_path / "float.tiff"
    )
    pixels, skipped = read_files([tmp_path / "wide.png", tmp_path / "float.tiff"])
    assert pixels.flatten().tolist() == [17 * k for k in range(16)]
    assert [p.name for p in skipped] == ["float.tiff"]


def test_arrays_are_held_out_of(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    images = load_images(str(tmp_path / "x.npz"))
    assert images.shape == (3, 6, 6)
    assert (len(images.train), len(images.held_out)) == (18, 2)
    both = torch.cat([images.train, images.held_out]).flatten(1).tolist()
    assert sorted(both) == sorted(x.transpose(0, 3, 1, 2).reshape(20, -1).tolist())
