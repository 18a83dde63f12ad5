"""Images to train on, in memory, as bytes: a data set by its name, or images of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jiio_plugins.data.files import SUFFIXES, image_files, read_files
from jiio_plugins.data.labelled import accepted, is_named, read_data

if TYPE_CHECKING:
    from torch import Tensor

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


def load_images(
    data: str,
    folder: Path = Path("data"),
    resize: int | None = None,
    *,
    without: Path | None = None,
) -> Images:
    """Load what :func:`jiio_plugins.data.load_labelled` takes, without its labels.

    Args:
        data: the name of a data set (read from ``folder``), the path of an npz file with ``x``, a
            ``module:function`` that returns x or (x, y), or the path of a folder of images,
            searched recursively. Of what has no test set of its own a tenth, at most 1,000, is held
            out by a fixed permutation, of a folder's sorted names.
        folder: torchvision's root, or Debian's folder of Fashion-MNIST.
        resize: of files: crop each image to its central square and scale it to so many pixels.
        without: a folder inside it that is left out: a run writes pictures of its own.

    Returns:
        :class:`Images`, as bytes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no readable image, or images of different sizes without ``resize``.
    """
    if is_named(data):
        train, test = (
            _to_bytes(read_data(data, split, Path(folder), resize).x) for split in ("train", "test")
        )
        return Images(train, test)
    root = Path(data)
    skipped: list[Path] = []
    if root.is_dir():
        files = image_files(root)
        if without is not None and root.resolve() in without.resolve().parents:
            files = [p for p in files if without.resolve() not in p.resolve().parents]
        images, skipped = read_files(files, resize)
    elif root.exists() or ":" in data:
        images = _to_bytes(read_data(data, labels=False).x)
    else:
        raise FileNotFoundError(
            f"there is no folder or file {data}. The data must be {accepted('a folder of images')}"
        )
    if len(images) < 2:
        raise ValueError(
            f"{data} holds {len(images)} readable images ({len(skipped)} could not be read); two "
            f"are needed at least, one to train on and one held out. Files are "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = min(_HELD_OUT_MOST, max(1, round(_HELD_OUT_SHARE * len(images))))
    return Images(images[order[held_out:]], images[order[:held_out]], skipped)


def to_unit(images: Tensor) -> Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


def _to_bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
