"""Few-shot tasks: images by class, drawn into support and query sets, and sinusoids to fit."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Callable


def cache_folder(folder: str | Path | None) -> Path:
    """``folder``, or ``jiio-plugins`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    if folder is not None:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jiio-plugins"


@dataclass(frozen=True)
class ClassImages:
    """Images by class: what few-shot tasks are drawn from.

    Attributes:
        images: uint8, ``(classes, samples, 1, side, side)``, ink 255 on 0.
        names: of each class.
    """

    images: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.images)

    def with_rotations(self) -> ClassImages:
        """Four times the classes: each turned by 0°, 90°, 180° and 270°."""
        turned = [torch.rot90(self.images, k, dims=(3, 4)) for k in range(4)]
        names = [f"{name}, {90 * k}°" if k else name for k in range(4) for name in self.names]
        return ClassImages(torch.cat(turned), tuple(names))


class Tasks(NamedTuple):
    """Support and query sets of one or more tasks, tasks first.

    Attributes:
        x_support: inputs to adapt to, ``(tasks, ways·shots, ...)``.
        y_support: their labels or targets, ``(tasks, ways·shots, ...)``.
        x_query: inputs to judge by, ``(tasks, ways·queries, ...)``.
        y_query: their labels or targets, ``(tasks, ways·queries, ...)``.
    """

    x_support: Tensor
    y_support: Tensor
    x_query: Tensor
    y_query: Tensor

    def to(self, device: torch.device | str) -> Tasks:
        """All four on ``device``."""
        return Tasks(*(t.to(device) for t in self))


def sample_tasks(
    data: ClassImages,
    tasks: int,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 5,
    generator: torch.Generator | None = None,
) -> Tasks:
    """Draw ``tasks`` N-way K-shot tasks. Labels are numbered afresh in each.

    Args:
        data: the classes to draw from.
        tasks: number of tasks.
        ways: classes of a task.
        shots: images of each class in the support set.
        queries: images of each class in the query set, none of them in the support set.
        generator: source of randomness. None: the global one.

    Returns:
        Images ``(tasks, ways·shots, 1, side, side)`` in [0, 1], float32, and labels ``0 … ways−1``.

    Raises:
        ValueError: more ways or images a class than there are.
    """
    classes, samples = data.images.shape[:2]
    if not 1 <= ways <= classes or shots < 1 or queries < 0 or shots + queries > samples:
        raise ValueError(
            f"cannot draw {ways} ways of {shots} shots + {queries} queries from {classes} classes "
            f"of {samples} images"
        )
    per_class = shots + queries
    x = []
    for _ in range(tasks):
        chosen = torch.randperm(classes, generator=generator)[:ways]
        order = torch.rand(ways, samples, generator=generator).argsort(1)[:, :per_class]
        x.append(data.images[chosen[:, None], order])
    images = torch.stack(x).float().div_(255)
    labels = torch.arange(ways)[None, :, None].expand(tasks, ways, per_class)
    return Tasks(
        images[:, :, :shots].flatten(1, 2),
        labels[:, :, :shots].flatten(1, 2),
        images[:, :, shots:].flatten(1, 2),
        labels[:, :, shots:].flatten(1, 2),
    )


class Sinusoids(Dataset[tuple[Tensor, Tensor]]):
    """Points ``(x, a sin(x − φ))`` of many sinusoids: regression tasks.

    Amplitude a in [0.1, 5], phase φ in [0, π], x in [−5, 5], all uniform. Item i is a pair
    ``(x, y)`` of shape ``(1,)`` each, and belongs to the sinusoid ``i // points``.

    Args:
        tasks: number of sinusoids.
        points: points of each.
        seed: of amplitudes, phases and points.

    Raises:
        ValueError: no tasks or no points.

    Source: Finn, Abbeel and Levine, "MAML" (ICML 2017), section 5.1.
    """

    def __init__(self, tasks: int = 1000, points: int = 40, seed: int = 0) -> None:
        if tasks < 1 or points < 1:
            raise ValueError(f"tasks and points must be at least 1, got {tasks} and {points}")
        generator = torch.Generator().manual_seed(seed)
        self.points = points
        self.amplitude = 0.1 + 4.9 * torch.rand(tasks, generator=generator)
        self.phase = math.pi * torch.rand(tasks, generator=generator)
        self.x = 10 * torch.rand(tasks, points, 1, generator=generator) - 5
        self.y = self.curve(torch.arange(tasks))(self.x)

    def curve(self, task: Tensor | int) -> Callable[[Tensor], Tensor]:
        """The function behind a task (or behind several, one a row)."""
        a, phi = (t[task].reshape(-1, 1, 1) for t in (self.amplitude, self.phase))
        return lambda x: (a * torch.sin(x - phi)).reshape(x.shape)

    def __len__(self) -> int:
        """Number of points."""
        return len(self.x) * self.points

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One point."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        task, point = divmod(index, self.points)
        return self.x[task, point], self.y[task, point]

    def sample(self, tasks: int, shots: int, generator: torch.Generator | None = None) -> Tasks:
        """Draw some of the sinusoids.

        Args:
            tasks: how many.
            shots: support points of each. Its other points are the query set.
            generator: source of randomness. None: the global one.

        Returns:
            :class:`Tasks` of ``(tasks, shots, 1)`` and ``(tasks, points − shots, 1)``.

        Raises:
            ValueError: more tasks than sinusoids, or no point left to query.
        """
        if tasks > len(self.x) or shots >= self.points:
            raise ValueError(
                f"cannot draw {tasks} tasks of {shots} shots from {len(self.x)} sinusoids of "
                f"{self.points} points"
            )
        chosen = torch.randperm(len(self.x), generator=generator)[:tasks]
        x, y = self.x[chosen], self.y[chosen]
        return Tasks(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])
