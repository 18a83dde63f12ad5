"""Training data as batches, the same for every run of the same seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from jiio_plugins.utils.checkpoint import fingerprint
from jiio_plugins.utils.randomness import seeded_generator

if TYPE_CHECKING:
    from collections.abc import Iterator


class Batches(Protocol):
    """Training data as batches, the same for every run of the same seed.

    For ``restart_every`` they must tell which samples a batch holds, by ``order(index)`` and
    ``batch_size``. ``order`` gives the numbers of all samples as the epoch has them.

    Where the batches can only be drawn one after the other, ``skip(batches)`` draws and drops those
    that a resumed training has seen. It is called, if there is one, before the first epoch. Without
    it, some of the last epoch are drawn once more when the training has ended. What
    ``settings()`` returns, if it is there, plain values by name, must be the same in a resumed one.
    """

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, index: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, on the model's device.

        Args:
            index: of the epoch, from 0 on.
            skip: batches at its beginning that are left out.
        """
        ...


class TensorBatches:
    """Batches of tensors, shuffled anew in every epoch by ``(seed, epoch)``.

    Args:
        x: images, ``(samples, ...)``.
        y: labels, ``(samples, ...)``.
        batch_size: samples a batch.
        seed: of the order.
        drop_last: leave out an incomplete last batch.

    Raises:
        ValueError: x and y of different length, or too few samples for a batch.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, *, seed: int = 0, drop_last: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(x) != len(y):
            raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
        self.x, self.y, self.batch_size, self.seed = x, y, batch_size, seed
        self.count = len(x) // batch_size if drop_last else math.ceil(len(x) / batch_size)
        if not self.count:
            raise ValueError(f"{len(x)} samples make no batch of {batch_size}")

    def __len__(self) -> int:
        return self.count

    def settings(self) -> dict[str, Any]:
        """What a resumed training must have in common with the one before."""
        return {
            "batch size": self.batch_size,
            "order of the data (seed)": self.seed,
            "data (fingerprint)": fingerprint(self.x, self.y),
        }

    def order(self, index: int) -> Tensor:
        """The numbers of all samples as epoch ``index`` has them, ``(samples,)``."""
        return torch.randperm(len(self.x), generator=seeded_generator("cpu", self.seed, index))

    def epoch(self, index: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, see :class:`Batches`.

        Args:
            index: of the epoch, from 0 on.
            skip: batches at its beginning that are left out.
        """
        for rows in self.order(index).split(self.batch_size)[skip : self.count]:
            at = rows.to(self.x.device)
            yield self.x[at], self.y[at]
