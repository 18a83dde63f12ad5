"""Real images that need no download: scikit-learn's digits, and Fashion-MNIST from a folder."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FASHION_HELP = (
    "Fashion-MNIST was not found in {folder}. Give a folder that holds "
    "'{name}' or '{name}.gz', directly or in FashionMNIST/raw. Get it with torchvision "
    "(python -c \"from torchvision.datasets import FashionMNIST as F; F('data', download=True)\"; "
    "the folder is data) or on Debian with 'apt install dataset-fashion-mnist' (the folder is "
    "/usr/share/datasets/fashion-mnist). The commands of jiio take it with --folder."
)


def load_digits(split: str = "test") -> tuple[Tensor, Tensor]:
    """scikit-learn's 8×8 digits: images ``(images, 1, 8, 8)`` in [0, 1] and labels ``(images,)``.

    The 1,797 images are split once, by a fixed permutation: 1,297 "train", 500 "test".

    Raises:
        ValueError: another split.
        ModuleNotFoundError: scikit-learn is missing. The message says what to install.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn",
            name=error.name,
        ) from error
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    bunch = sklearn_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    keep = order[500:] if split == "train" else order[:500]
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return images[keep], torch.from_numpy(bunch.target).long()[keep]


def load_fashion_mnist(folder: str | Path, split: str = "test") -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: images ``(images, 1, 28, 28)`` in [0, 1] and labels ``(images,)``.

    Args:
        folder: torchvision's root, its ``FashionMNIST/raw``, or Debian's
            ``/usr/share/datasets/fashion-mnist``.
        split: "train" (60,000) or "test" (10,000).

    Raises:
        ValueError: another split, or a damaged file.
        FileNotFoundError: says where to get the files.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(Path(folder), f"{stem}-images-idx3-ubyte", header=16).reshape(-1, 1, 28, 28)
    labels = _read_idx(Path(folder), f"{stem}-labels-idx1-ubyte", header=8)
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def _read_idx(folder: Path, name: str, header: int) -> NDArray[np.uint8]:
    for base in (folder, folder / "FashionMNIST" / "raw"):
        if (base / name).is_file():
            raw = (base / name).read_bytes()
            break
        if (base / f"{name}.gz").is_file():
            try:
                raw = gzip.decompress((base / f"{name}.gz").read_bytes())
            except (EOFError, zlib.error) as error:
                raise ValueError(f"{base / name}.gz is damaged or truncated: {error}") from error
            break
    else:
        raise FileNotFoundError(_FASHION_HELP.format(folder=folder, name=name))
    return np.frombuffer(raw, dtype=np.uint8, offset=header).copy()
