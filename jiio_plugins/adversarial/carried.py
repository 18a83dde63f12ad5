"""Searches that take up where the last one for the same image ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jiio_plugins.adversarial.batches import Batches
    from jiio_plugins.adversarial.step import AdversarialTraining


def carry(
    training: AdversarialTraining, batches: Batches, every: int, carried: AdversarialTraining | None
) -> Carried | None:
    """What ``restart_every`` and ``carried`` ask for. None: every search starts by itself.

    Args:
        training: the step of the searches that start by themselves.
        batches: the data.
        every: epochs from one such search to the next.
        carried: the step of the searches in between. None: ``training.carried()``.

    Raises:
        TypeError: ``carried`` is no such step, or the batches do not tell which samples they hold.
        ValueError: it searches in another ball.
    """
    if every == 1:
        return None
    search = training.carried() if carried is None else carried
    if not hasattr(search, "settings") or not hasattr(search, "region"):
        raise TypeError(
            f"carried must be an AdversarialTraining like training, got {type(carried).__name__}"
        )
    if (search.norm, search.eps) != (training.norm, training.eps):
        raise ValueError(
            f"carried searches must be in the ball of the others, norm {training.norm} and eps "
            f"{training.eps}, got {search.norm} and {search.eps}"
        )
    return Carried(batches, every, search)


class Carried:
    """The images that the last searches ended with, one step ahead, by sample.

    Args:
        batches: the data, which tells the samples of each batch.
        every: epochs from one search that starts by itself to the next.
        search: the step of the searches in between.

    Attributes:
        images: ``(samples, ...)``. None before the first search.
        known: whether there was one, bool ``(samples,)``. An epoch may leave samples out, or not
            attack them.

    Raises:
        TypeError: the batches do not tell which samples they hold.
        ValueError: their order is none.
    """

    def __init__(self, batches: Batches, every: int, search: AdversarialTraining) -> None:
        if not hasattr(batches, "order") or not hasattr(batches, "batch_size"):
            raise TypeError(
                "restart_every needs to know which samples a batch holds: give "
                "TensorBatches(x, y, batch_size), or batches that have order(index), the numbers "
                "of all samples as the epoch has them, and batch_size; got "
                f"{type(batches).__name__}"
            )
        self.batches: Any = batches
        self.every, self.search = every, search
        self.images: Tensor | None = None
        self._order = -1, torch.empty(0)
        self.known = torch.zeros(len(self._rows(0, slice(None))), dtype=torch.bool)

    def start(self, epoch: int, step: int, x: Tensor, generator: torch.Generator) -> Tensor | None:
        """Where the searches of a batch start, shaped like x. None: as they do by themselves.

        Args:
            epoch: its number, from 0 on.
            step: number of the batch in it, from 0 on.
            x: images of the batch, ``(rows, ...)``.
            generator: of random starts, for samples without an earlier search.

        Raises:
            ValueError: the batch has another number of images than its order says.
        """
        if epoch % self.every == 0 or self.images is None:
            return None
        rows = self._batch(epoch, step, x)
        own = self.search.start(x, generator)
        known = self.known[rows].to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(known, self.images[rows].to(x), x if own is None else own)

    def keep(self, epoch: int, step: int, x: Tensor, attacked: int) -> None:
        """Note where the searches of a batch go on.

        Args:
            epoch: its number, from 0 on.
            step: number of the batch in it, from 0 on.
            x: where they ended, ``(rows, ...)``.
            attacked: rows that were attacked. They are the first ones, the others are not kept.

        Raises:
            ValueError: the batch has another number of images than its order says.
        """
        rows = self._batch(epoch, step, x)[:attacked]
        if self.images is None:
            self.images = x.new_zeros(len(self.known), *x.shape[1:])
        self.images[rows] = x[:attacked].detach().to(self.images)
        self.known[rows] = True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"images": self.images, "known": self.known}

    def load(self, state: dict[str, Any]) -> None:
        """Take up that of a checkpoint.

        Raises:
            ValueError: it is of another number of samples.
        """
        if len(state["known"]) != len(self.known):
            raise ValueError(
                f"the checkpoint keeps images of {len(state['known'])} samples, the batches hold "
                f"{len(self.known)}: resume with the data that the training began with"
            )
        self.images, self.known = state["images"], state["known"]

    def _batch(self, epoch: int, step: int, x: Tensor) -> Tensor:
        size = self.batches.batch_size
        rows = self._rows(epoch, slice(step * size, (step + 1) * size))
        if len(rows) != len(x):
            raise ValueError(
                f"step {step + 1} of epoch {epoch + 1} has {len(x)} images, and by order() and "
                f"batch_size it should have {len(rows)}"
            )
        return rows

    def _rows(self, epoch: int, part: slice) -> Tensor:
        if self._order[0] != epoch:
            order = torch.as_tensor(self.batches.order(epoch)).cpu()
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise ValueError(
                    "order(index) must hold the number of every sample once, 0 to n - 1, also of "
                    f"those that the epoch leaves out, got {order}"
                )
            self._order = epoch, order
        return self._order[1][part]
