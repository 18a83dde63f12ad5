"""A member of a suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

GRADIENTS = ("implicit", "own", "unrolled", "intermediate", "none", "unknown")
Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
Unfit = Callable[[Tensor, int], "str | None"]


def _always_fit(x: Tensor, classes: int) -> None:
    return None


@dataclass(frozen=True)
class Attack:
    """An attack of a suite.

    Attributes:
        name: unique in its suite.
        run: ``run(model, x, y) -> x_adv``, for images ``(rows, ...)`` and true labels ``(rows,)``.
            It gets the model in eval mode with frozen parameters. It must stay in the ball and the
            box.
        gradient: where its gradients come from: "implicit" (solves of its own: JIIO, the nested
            loop), "own" (the model's backward pass), "unrolled", "intermediate", "none" (black box)
            or "unknown". Warnings compare these.
        unfit: ``unfit(x, classes) -> str | None``: why it cannot run on such images ``(rows, ...)``
            and so many classes. None: it can. A suite leaves it out where it cannot, and says why.

    Raises:
        TypeError: ``run`` or ``unfit`` cannot be called.
        ValueError: another kind of gradient.
    """

    name: str
    run: Run
    gradient: str = "unknown"
    unfit: Unfit = _always_fit

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise TypeError(f"run must be callable as run(model, x, y), got {self.run!r}")
        if not callable(self.unfit):
            raise TypeError(f"unfit must be callable as unfit(x, classes), got {self.unfit!r}")
        if self.gradient not in GRADIENTS:
            raise ValueError(
                f"gradient must be one of {', '.join(GRADIENTS)}, got {self.gradient!r}"
            )
