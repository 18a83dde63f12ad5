"""Image files as bytes."""

from __future__ import annotations

import math
import warnings
import zipfile
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jiio_plugins.utils.console import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

MOST_BYTES = 4 << 30  # of one array in an npz file, unpacked
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})
MOST_PIXELS = 50_000_000  # of one image: 150 MB as RGB


def image_files(folder: Path) -> list[Path]:
    """What is named like an image in a folder and those below it, sorted. Hidden files are not."""
    named = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return sorted(p for p in named if not p.name.startswith("."))


def read_files(
    files: Iterable[Path], resize: int | None = None, channels: int | None = None
) -> tuple[Tensor, list[Path]]:
    """Read image files as bytes. They are grey if all of them are, else RGB.

    Args:
        files: what to read. What is no whole image, no regular file, or has more than 50 megapixels
            is skipped.
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
    for path in progress_bar(list(files), desc="reading images", leave=False):
        try:
            arrays.append((path, _read(path, resize)))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            skipped.append(path)  # PIL raises any of these on a broken file
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
    return torch.stack([as_channels(a, wide) for _, a in arrays]), skipped


def read_arrays(path: Path, names: tuple[str, ...]) -> list[NDArray[Any] | None]:
    """Plain arrays of an npz file, None for each that is not there.

    What an array would take is read off its header: a small file may unpack to any size, or say so.

    Args:
        path: of the file.
        names: of the arrays.

    Raises:
        OSError, ValueError, EOFError, zipfile.BadZipFile, ...: it is no whole npz file, or an array
            holds objects, or more than 4 GiB.
    """
    with path.open("rb") as raw:
        with zipfile.ZipFile(raw) as archive:
            inside = archive.namelist()
            for name in names:
                if f"{name}.npy" in inside:
                    with archive.open(f"{name}.npy") as member:
                        _check_header(name, member)
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as file:
            return [file.get(name) for name in names]


def _check_header(name: str, member: IO[bytes]) -> None:
    npy: Any = np.lib.format
    first = npy.read_magic(member) == (1, 0)
    read = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects of Python, which nothing here unpickles")
    if any(n < 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape}")
    size = math.prod(shape) * dtype.itemsize
    if size > MOST_BYTES:
        raise ValueError(
            f"{name}, {dtype} of shape {shape}, takes {size / 2**30:.1f} GiB unpacked, more than "
            f"{MOST_BYTES >> 30} GiB: store bytes instead of floats or fewer images, or let "
            "module:function return the arrays"
        )


def to_bytes(image: Image, resize: int | None = None) -> NDArray[np.uint8]:
    """An opened image as ``(h, w)`` where it is grey, else ``(h, w, 3)``.

    Args:
        image: as PIL has it.
        resize: side in pixels of a central square to crop and scale to. None: it is as it is.
    """
    plain = _as_bytes(image)
    return np.asarray(_square(plain, resize) if resize else plain)


def _read(path: Path, resize: int | None) -> NDArray[np.uint8]:
    from PIL import Image

    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path} is no regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{path} has more than {MOST_PIXELS} pixels")
            return to_bytes(opened, resize)


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


def as_channels(array: NDArray[np.uint8], channels: int) -> Tensor:
    """An image ``(h, w)`` or ``(h, w, 3)`` as ``(channels, h, w)``.

    Args:
        array: of bytes.
        channels: 1 or 3.
    """
    tensor = torch.from_numpy(array.copy())
    if tensor.ndim == 2:
        return tensor.expand(channels, *tensor.shape).clone()
    if channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601 luma
        return (tensor.float() @ weights).round().to(torch.uint8)[None]
    return tensor.permute(2, 0, 1).contiguous()
