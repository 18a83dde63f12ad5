"""Omniglot as few-shot classes, from torchvision's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jiio_plugins.data.tasks import ClassImages, cache_folder
from jiio_plugins.utils.builds import importing_torchvision
from jiio_plugins.utils.console import progress_bar
from jiio_plugins.utils.files import load_tensors, save_tensors, understood

if TYPE_CHECKING:
    from numpy.typing import NDArray


_CLASSES, _TRAIN, _VALIDATION = 1623, 1200, 100


_HELP = (
    "Omniglot was not found in {root}: torchvision keeps it in the folder 'omniglot-py' there, "
    'with the two zip files it came in. Get it with python -c "from torchvision.datasets import '
    "Omniglot as O; [O('{root}', background=b, download=True) for b in (True, False)]\""
)


def load_omniglot(
    root: str | Path,
    split: str = "train",
    *,
    size: int = 28,
    rotations: bool | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> ClassImages:
    """Omniglot's 1,623 characters, 20 drawings each, read once and cached.

    Args:
        root: torchvision's root. Nothing is downloaded.
        split: "train" (1,200 classes), "test" (the other 423), or "validation" (100 of the 1,200,
            which "train" still holds).
        size: pixels a side.
        rotations: turn each class by 90°, 180° and 270° into three more. None: for training only.
        seed: of the random split over classes.
        cache: folder of the cache. None: the user's.

    Returns:
        Images ``(classes, 20, 1, size, size)`` and the classes' names.

    Raises:
        ValueError: an unknown split, or a damaged cache.
        FileNotFoundError: says how to fetch the files.

    Source: Lake, Salakhutdinov and Tenenbaum (Science 350, 2015), split as by Santoro et al. (ICML
    2016) and Finn, Abbeel and Levine (ICML 2017).
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    # the file holds all classes, so one serves every split and seed
    path = cache_folder(cache) / f"omniglot-{size}.safetensors"
    images = _load(path) if path.is_file() else _read(Path(root), size, path)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train = round(len(images) * _TRAIN / _CLASSES)
    held = round(len(images) * _VALIDATION / _CLASSES)
    chosen = {"train": order[:train], "validation": order[:held], "test": order[train:]}[split]
    names = tuple(f"character {k}" for k in chosen.tolist())
    found = ClassImages(images[chosen], names)
    turn = split == "train" if rotations is None else rotations
    return found.with_rotations() if turn else found


def _load(path: Path) -> torch.Tensor:
    tensors, _ = load_tensors(path)
    with understood(path):
        return tensors["images"]


def _read(root: Path, size: int, path: Path) -> torch.Tensor:
    with importing_torchvision():
        from torchvision.datasets import Omniglot  # type: ignore[import-untyped]

    by_class: dict[int, list[NDArray[np.uint8]]] = {}
    classes = 0
    for background in (True, False):
        try:
            part = Omniglot(str(root), background=background, download=False)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(_HELP.format(root=root)) from error
        for image, label in progress_bar(part, desc="reading Omniglot", unit="image"):
            small = image.resize((size, size), 1)  # Lanczos
            # drawn in black on white
            ink = np.invert(np.asarray(small.convert("L"), dtype=np.uint8))
            by_class.setdefault(classes + label, []).append(ink)
        classes = max(by_class) + 1
    images = torch.from_numpy(np.stack([np.stack(by_class[k]) for k in range(classes)]))
    images = images.unsqueeze(2)
    save_tensors(path, {"images": images})
    return images
