"""Training images in memory, as bytes: digits, Fashion-MNIST, or a folder of the user's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from jiio_plugins.data.classification import load_digits, load_fashion_mnist

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})


_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 1000


@dataclass(frozen=True)
class Images:
    """Two sets of images, and the files that could not be read.

    Attributes:
        train: images to train on, ``(images, c, h, w)``, uint8.
        held_out: images to judge by, likewise.
        skipped: files that are no images.
    """

    train: Tensor
    held_out: Tensor
    skipped: list[Path] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)``."""
        c, h, w = self.train.shape[1:]
        return c, h, w


def to_unit(images: Tensor) -> Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


def load_images(
    data: str,
    folder: Path = Path("data"),
    resize: int | None = None,
    *,
    without: Path | None = None,
) -> Images:
    """Load by name or from a folder.

    Args:
        data: "digits", "fashion-mnist" (read from ``folder``), or the path of a folder of images,
            searched recursively. Of a folder a tenth, at most 1,000, is held out by a fixed
            permutation of the sorted names.
        folder: of Fashion-MNIST.
        resize: for a folder: crop each image to its central square and scale it to so many pixels.
        without: a folder inside it that is left out: a run writes pictures of its own.

    Returns:
        :class:`Images`, as bytes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no readable image, or images of different sizes without ``resize``.
    """
    if data == "digits":
        train, test = (_to_bytes(load_digits(split)[0]) for split in ("train", "test"))
        return Images(train, test)
    if data == "fashion-mnist":
        train, test = (
            _to_bytes(load_fashion_mnist(folder, split)[0]) for split in ("train", "test")
        )
        return Images(train, test)
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"the data must be digits, fashion-mnist or a folder of images; there is no {root}"
        )
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if without is not None and root.resolve() in without.resolve().parents:
        files = [p for p in files if without.resolve() not in p.resolve().parents]
    images, skipped = read_files(files, resize)
    if len(images) < 2:
        raise ValueError(
            f"{root} holds {len(images)} readable images ({len(skipped)} could not be read); two "
            f"are needed at least, one to train on and one held out. Accepted: "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = min(_HELD_OUT_MOST, max(1, round(_HELD_OUT_SHARE * len(images))))
    return Images(images[order[held_out:]], images[order[:held_out]], skipped)


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def read_files(
    files: Iterable[Path], resize: int | None = None, channels: int | None = None
) -> tuple[Tensor, list[Path]]:
    """Read image files as bytes. They are grey if all of them are, else RGB.

    Args:
        files: what to read. What is no image, no file, or has more than PIL's limit of pixels
            (``PIL.Image.MAX_IMAGE_PIXELS``, about 89 million), is skipped.
        resize: side in pixels of a central square to crop and scale to. None: take them as they
            are.
        channels: 1 or 3. None: as the files have it.

    Returns:
        The images ``(images, c, h, w)``, uint8, and the files skipped.

    Raises:
        ValueError: two images of different sizes.
    """
    from PIL import Image

    arrays: list[tuple[Path, NDArray[np.uint8]]] = []
    skipped = []
    too_large = Image.DecompressionBombWarning, Image.DecompressionBombError
    for path in tqdm(list(files), desc="reading images", leave=False):
        try:
            if not path.is_file():
                raise OSError("a pipe or a device, which may never end")
            with (
                warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
                Image.open(path) as opened,
            ):
                image = _as_bytes(opened)
        except (OSError, SyntaxError, ValueError, *too_large):
            skipped.append(path)  # PIL raises any of these on a broken file
            continue
        arrays.append((path, np.asarray(_square(image, resize) if resize else image)))
    if not arrays:
        return torch.zeros(0, channels or 1, 0, 0, dtype=torch.uint8), skipped
    first, like = arrays[0]
    for path, array in arrays:
        if array.shape[:2] != like.shape[:2]:
            raise ValueError(
                f"images must have one size: {first.name} has {like.shape[1]}×{like.shape[0]} "
                f"pixels, {path.name} {array.shape[1]}×{array.shape[0]}. --resize N crops and "
                "scales them all to N×N"
            )
    wide = channels or max(3 if a.ndim == 3 else 1 for _, a in arrays)
    return torch.stack([_as_channels(a, wide) for _, a in arrays]), skipped


def _as_bytes(image: Image) -> Image:
    """Grey or RGB with a byte a channel. PIL itself clips sixteen bits instead of scaling them."""
    from PIL.Image import fromarray

    if image.mode == "F":
        raise ValueError("floats have no range of their own")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            values = values / 257  # 65535 = 257 · 255
        return fromarray(values.round().clip(0, 255).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _square(image: Image, size: int) -> Image:
    from PIL import ImageOps

    return ImageOps.fit(image, (size, size))


def _as_channels(array: NDArray[np.uint8], channels: int) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    if tensor.ndim == 2:
        return tensor.expand(channels, *tensor.shape).clone()
    if channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601 luma
        return (tensor.float() @ weights).round().to(torch.uint8)[None]
    return tensor.permute(2, 0, 1).contiguous()
