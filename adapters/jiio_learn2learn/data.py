"""Few-shot data as learn2learn takes it: ``MetaDataset`` and ``Taskset``.

The parts of learn2learn used here work. Some others do not: ``FilterLabels`` before ``NWays``
raises, ``RandomClassRotation`` turns all classes alike, ``get_tasksets("omniglot")`` has classes in
several splits. So each split is a data set of its own, and rotations are classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from learn2learn.data import MetaDataset, Taskset
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from torch import Tensor
from torch.utils.data import Dataset

from jiio_plugins.data import load_glyphs, load_omniglot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jiio_plugins.data import ClassImages, Sinusoids


class Tasksets(NamedTuple):
    """One ``Taskset`` a split. Each task is a pair ``(x, y)``, as in ``learn2learn.vision``.

    Attributes:
        train: tasks of the classes to learn from.
        validation: tasks of other classes, to choose settings by.
        test: tasks of still other classes.
    """

    train: Taskset
    validation: Taskset
    test: Taskset


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, data: ClassImages) -> None:
        self.images = data.images.flatten(0, 1)
        self.samples = data.images.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, index // self.samples


def meta_dataset(data: ClassImages) -> MetaDataset:
    """``data`` as a learn2learn ``MetaDataset``: images ``(1, side, side)`` in [0, 1], labels."""
    samples = data.images.shape[1]
    labels = {k: list(range(k * samples, (k + 1) * samples)) for k in range(len(data))}
    return MetaDataset(_Images(data), labels_to_indices=labels)


def taskset(data: ClassImages, *, ways: int, samples: int, num_tasks: int = -1) -> Taskset:
    """Tasks of ``ways`` classes with ``samples`` images each, sorted by class. Labels start at 0.

    Args:
        data: the classes of one split.
        ways: classes of a task.
        samples: images of a class, support and query together.
        num_tasks: number of different tasks. −1: without end.

    Returns:
        A ``Taskset`` of pairs ``(x, y)``, ``(ways·samples, 1, side, side)`` in [0, 1] and
        ``(ways·samples,)``.

    Raises:
        ValueError: more ways or samples than there are.
    """
    classes, there = data.images.shape[:2]
    if ways > classes or samples > there:
        raise ValueError(
            f"tasks of {ways} ways and {samples} samples a class need that many, there are "
            f"{classes} classes of {there}"
        )
    dataset = meta_dataset(data)
    transforms = [
        FusedNWaysKShots(dataset, n=ways, k=samples),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
    ]
    return Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks)


def _tasksets(
    splits: Mapping[str, ClassImages], ways: int, samples: int, num_tasks: int
) -> Tasksets:
    made = {
        name: taskset(data, ways=ways, samples=samples, num_tasks=num_tasks)
        for name, data in splits.items()
    }
    return Tasksets(**made)


def glyph_tasksets(
    *,
    ways: int = 5,
    samples: int = 2,
    num_tasks: int = -1,
    fonts: str | Path | None = None,
    size: int = 28,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Tasksets:
    """Letters rendered from fonts, split by script, see :func:`jiio_plugins.data.load_glyphs`.

    Args:
        ways: classes of a task.
        samples: images of a class, support and query together.
        num_tasks: number of different tasks a split. −1: without end.
        fonts: a folder of fonts. None: the DejaVu faces that matplotlib brings.
        size: pixels a side.
        seed: of the deformations.
        cache: folder of the cache. None: the user's.

    Raises:
        ValueError: more ways or samples than there are, or too few characters in the fonts.
        FileNotFoundError: no fonts in the folder.
    """
    splits = {
        split: load_glyphs(split, fonts=fonts, size=size, seed=seed, cache=cache)
        for split in Tasksets._fields
    }
    return _tasksets(splits, ways, samples, num_tasks)


def omniglot_tasksets(
    root: str | Path,
    *,
    ways: int = 5,
    samples: int = 2,
    num_tasks: int = -1,
    size: int = 28,
    rotations: bool | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Tasksets:
    """Omniglot from torchvision's folder, see :func:`jiio_plugins.data.load_omniglot`.

    Args:
        root: torchvision's root. Nothing is downloaded.
        ways: classes of a task.
        samples: images of a class, support and query together.
        num_tasks: number of different tasks a split. −1: without end.
        size: pixels a side.
        rotations: turn each class into three more. None: for training only.
        seed: of the random split over classes.
        cache: folder of the cache. None: the user's.

    Raises:
        ValueError: more ways or samples than there are.
        FileNotFoundError: says how to fetch the files.
    """
    splits = {
        split: load_omniglot(root, split, size=size, rotations=rotations, seed=seed, cache=cache)
        for split in Tasksets._fields
    }
    return _tasksets(splits, ways, samples, num_tasks)


def sinusoid_taskset(data: Sinusoids, *, samples: int = 20, num_tasks: int = -1) -> Taskset:
    """Each task: ``samples`` points ``(x, y)`` of one sinusoid, ``(samples, 1)`` each.

    Args:
        data: the sinusoids.
        samples: points of a task, support and query together.
        num_tasks: number of different tasks. −1: without end.

    Raises:
        ValueError: more samples than a sinusoid has points.
    """
    if samples > data.points:
        raise ValueError(f"{samples} samples asked for, a sinusoid has {data.points} points")
    points = data.points
    labels = {k: list(range(k * points, (k + 1) * points)) for k in range(len(data.x))}
    dataset = MetaDataset(data, labels_to_indices=labels)
    transforms = [FusedNWaysKShots(dataset, n=1, k=samples), LoadData(dataset)]
    return Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks)
