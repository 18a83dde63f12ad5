"""Images with labels, by the name of a data set or from what the user has: one loader for all."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.data.files import (
    MOST_PIXELS,
    SUFFIXES,
    as_channels,
    image_files,
    read_arrays,
    read_files,
    to_bytes,
)
from jiio_plugins.utils.builds import importing_torchvision
from jiio_plugins.utils.console import progress_bar
from jiio_plugins.utils.factory import load_function

if TYPE_CHECKING:
    from collections.abc import Mapping

# name: torchvision's class, and how it calls its two halves
_TORCHVISION: Mapping[str, tuple[str, Mapping[str, dict[str, Any]]]] = {
    "mnist": ("MNIST", {"train": {"train": True}, "test": {"train": False}}),
    "cifar-10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar-100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "svhn": ("SVHN", {"train": {"split": "train"}, "test": {"split": "test"}}),
    "celeba": ("CelebA", {"train": {"split": "train"}, "test": {"split": "test"}}),
}
DATASETS = ("digits", "fashion-mnist", *_TORCHVISION)
_SPLITS = frozenset({"train", "test", "val"})
_MOST_CLASSES = 10**6  # more are no classes, but pixels or hashes
_ATTRIBUTE = "Smiling"  # CelebA has forty labels of two classes each


class LabelledImages(NamedTuple):
    """Images and their classes.

    Attributes:
        x: images ``(images, c, h, w)``, float32 in [0, 1].
        y: labels ``(images,)``, int64.
        classes: names of the classes, where the data tell. Label k is the k-th.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...] | None = None


def load_labelled(
    data: str,
    split: str = "test",
    folder: str | Path = "data",
    *,
    resize: int | None = None,
    limit: int | None = None,
) -> LabelledImages:
    """Load a data set by its name, or images of your own. Nothing is downloaded.

    Args:
        data: what to load.

            - "digits", "fashion-mnist", "mnist", "cifar-10", "cifar-100", "svhn", or "celeba",
              whose label is one attribute: "celeba:Smiling" (default), "celeba:Male", ...
            - a folder with a subfolder of images for each class, numbered from 0 by their sorted
              names. Where its subfolders are ``train`` and ``test`` (or ``val``), those have them.
            - an npz file with ``x``, bytes or floats in [0, 1], ``(images, c, h, w)``,
              ``(images, h, w, c)`` or ``(images, h, w)``, and ``y``, integers ``(images,)``.
            - ``module:function``, which returns such x and y, as arrays or tensors.
        split: "train" or "test". What has no such halves is taken whole for either.
        folder: where a named data set lies: torchvision's root, or Debian's of Fashion-MNIST.
        resize: of files: side in pixels of a central square to crop and scale to.
        limit: read so many at most. A folder's are drawn by a fixed permutation, others are taken
            from the first on. None: all.

    Returns:
        :class:`LabelledImages`. Images are grey if all are, else RGB.

    Raises:
        FileNotFoundError: it is not there. The message says what to fetch, or what is accepted.
        ImportError: torchvision is missing, or built for another torch, or the function's module
            is missing.
        ValueError: bad settings, files or arrays. The message names them.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"at least 1 image must be loaded, got a limit of {limit}")
    x, y, classes = read_data(data, split, Path(folder), resize, limit)
    return LabelledImages(x.float() / 255 if x.dtype == torch.uint8 else x, y, classes)


def is_named(data: str) -> bool:
    """Whether it is the name of a data set, with its own train and test images."""
    return data in DATASETS or data.startswith("celeba:")


def accepted(folder: str) -> str:
    """What can be loaded, for messages.

    Args:
        folder: what the folder must be.
    """
    return f"{', '.join(DATASETS)}, {folder}, an .npz file or module:function"


def read_data(
    data: str,
    split: str = "test",
    folder: Path = Path("data"),
    resize: int | None = None,
    limit: int | None = None,
    *,
    labels: bool = True,
) -> LabelledImages:
    """As :func:`load_labelled`, with images as they are stored: bytes, or floats in [0, 1].

    Args:
        data: see there.
        split: see there.
        folder: see there.
        resize: see there.
        limit: see there.
        labels: of arrays: whether they are needed. Without them y is empty.
    """
    path = Path(data)
    if data == "digits":
        return _first(LabelledImages(*load_digits(split)), limit)
    if data == "fashion-mnist":
        return _first(LabelledImages(*load_fashion_mnist(folder, split)), limit)
    if is_named(data):
        return _from_torchvision(data, split, folder, resize, limit)
    if path.is_dir():
        return _from_folder(path, split, resize, limit)
    if path.suffix == ".npz" or path.exists():
        return _first(_arrays(*_from_npz(path), data, labels=labels), limit)
    if ":" in data:
        return _first(_arrays(*_from_function(data), data, labels=labels), limit)
    raise FileNotFoundError(
        f"the data set must be {accepted('a folder with a subfolder for each class')}; got "
        f"{data!r}, and there is no such folder"
    )


def _first(found: LabelledImages, limit: int | None) -> LabelledImages:
    return LabelledImages(found.x[:limit], found.y[:limit], found.classes)


def _from_torchvision(
    data: str, split: str, folder: Path, resize: int | None, limit: int | None
) -> LabelledImages:
    name, _, attribute = data.partition(":")
    kind, halves = _TORCHVISION[name]
    try:
        with importing_torchvision():
            from torchvision import datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs torchvision: pip install torchvision") from error
    try:
        found = getattr(datasets, kind)(str(folder), download=False, **halves[split])
    except (RuntimeError, OSError) as error:
        half = ", ".join(f"{key}={value!r}" for key, value in halves[split].items())
        raise FileNotFoundError(
            f"{name} was not found whole in {folder}: {error}. Get it with torchvision (python -c "
            f"\"from torchvision.datasets import {kind}; {kind}('{folder}', {half}, "
            f'download=True)"), or give the folder that has it, to jiio with --folder'
        ) from error
    classes = tuple(getattr(found, "classes", ())) or None
    column = None
    if name == "celeba":
        names, attribute = [n for n in found.attr_names if n], attribute or _ATTRIBUTE
        if attribute not in names:
            raise ValueError(f"CelebA has no attribute {attribute!r}; it has {', '.join(names)}")
        column, classes = names.index(attribute), (f"not {attribute}", attribute)
    elif name == "svhn":
        classes = tuple("0123456789")
    count = min(len(found), limit or len(found))
    images, targets = [], []
    for k in progress_bar(range(count), desc=f"reading {name}", leave=False):
        image, target = found[k]
        array = to_bytes(image, resize)
        images.append(as_channels(array, 3 if array.ndim == 3 else 1))
        targets.append(int(target if column is None else target[column]))
    return LabelledImages(torch.stack(images), torch.tensor(targets), classes)


def _from_folder(root: Path, split: str, resize: int | None, limit: int | None) -> LabelledImages:
    inside = _subfolders(root)
    names = {p.name for p in inside}
    if "train" in names and len(names) > 1 and names <= _SPLITS:
        root /= "val" if split == "test" and "test" not in names else split
        inside = _subfolders(root)
    if len(inside) < 2:
        raise ValueError(
            f"{root} has {len(inside)} subfolders: it must have one for each class, two at least, "
            "named after the class, with its images"
        )
    by_class = [image_files(folder) for folder in inside]
    empty = [folder.name for folder, files in zip(inside, by_class, strict=True) if not files]
    if empty:
        raise ValueError(
            f"no images in the class folders {', '.join(empty)} of {root}: fill them, or remove "
            f"what is no class. Files are {', '.join(sorted(SUFFIXES))}"
        )
    labelled = [(file, k) for k, files in enumerate(by_class) for file in files]
    # sorted by class as they are, the first ones would be of one class
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [labelled[k] for k in order[:limit]]
    x, broken = read_files([file for file, _ in chosen], resize)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(chosen)} files could not be read, {broken[0]} first: each must "
            f"be a whole image, a regular file and of {MOST_PIXELS:,} pixels at most. Repair or "
            "remove it"
        )
    return LabelledImages(x, torch.tensor([k for _, k in chosen]), tuple(p.name for p in inside))


def _subfolders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _from_npz(path: Path) -> tuple[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, or it is no regular one")
    try:
        x, y = read_arrays(path, ("x", "y"))
    except (OSError, ValueError, EOFError, TypeError, AttributeError, *_DAMAGED) as error:
        raise ValueError(
            f"{path} is no whole npz file with plain arrays x and y (numpy.savez(path, x=x, y=y)): "
            f"{error}"
        ) from error
    return x, y


_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError)


def _from_function(name: str) -> tuple[Any, Any]:
    found = load_function(name, "--dataset")()
    if isinstance(found, (tuple, list)):
        if len(found) != 2:
            raise ValueError(f"{name} must return x and y, got {len(found)} values")
        return found[0], found[1]
    return found, None


def _arrays(x: Any, y: Any, data: str, *, labels: bool) -> LabelledImages:
    """Arrays of the user's, checked."""
    if x is None or (y is None and labels):
        raise ValueError(f"{data} must have x, the images, and y, their labels")
    images = _as_images(x, data)
    if y is None or not labels:
        return LabelledImages(images, torch.zeros(0, dtype=torch.int64))
    targets = torch.as_tensor(y)
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if targets.dtype in (
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ):  # torch has few functions of them
        targets = targets.to(torch.int64)
    if not whole or targets.shape != (len(images),):
        raise ValueError(
            f"y of {data} must be integers, one for each of {len(images)} images, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}"
        )
    if targets.numel() and int(targets.max()) > _MOST_CLASSES:
        raise ValueError(
            f"y of {data} has the label {int(targets.max())}: labels are classes, counted from 0"
        )
    if int(targets.min()) < 0:
        raise ValueError(f"y of {data} has a negative label, {int(targets.min())}: count from 0")
    return LabelledImages(images, targets.long())


def _as_images(x: Any, data: str) -> Tensor:
    try:
        images = torch.as_tensor(x).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"x of {data} must be an array of numbers: {error}") from error
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            f"x of {data} must be images (images, c, h, w) or (images, h, w, c) with 1 or 3 "
            f"channels, or (images, h, w), and one image at least, got {tuple(x.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.contiguous()
    if images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all()):
        return images.float().contiguous()
    low, high = images.amin(), images.amax()
    raise ValueError(
        f"x of {data} must be uint8, or floats in [0, 1]: got {images.dtype} from {low:g} to "
        f"{high:g}. What the model is to see normalised goes in as it is, with --normalize"
    )
