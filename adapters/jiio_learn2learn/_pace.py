"""What the way of v tells of ``lr``, from gradients that the iteration makes anyway."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jiio_plugins.methods import Progress

_SETTLED = 0.1  # adjoint residual above which a gradient changes for other reasons than v
_SEEN = 0.3  # of the first gradient: a smaller change of it is no measure of the curvature
_PAIR = 0.01  # the same of two evaluations in a row, which are to tell the way and not rounding
_NOISE = 1e3  # times the dtype's precision: a smaller gradient counts as zero, in the loss's units
_FITS = 2.0  # how many times too short or too long a step may be, and fit


class Pace:
    """Inverse curvatures ``‖Δv‖ / ‖Δg‖`` along the way of one task, and what of it is left.

    They are the same whatever ``lr`` has made the way. That of the whole way tells how far from the
    optimum a gradient leaves v. The least of two evaluations in a row tells how long a plain step
    may be. A callback of the loop, for all calls of ``adapt``.

    The length of such a step is that of Barzilai and Borwein, "Two-point step size gradient
    methods" (1988).
    """

    def __init__(self) -> None:
        self._now: tuple[Tensor, Tensor] | None = None  # v and its gradient
        self._size = torch.zeros(1)  # of the gradient where the task began
        self._settled = torch.zeros((), dtype=torch.bool)

    def __call__(self, progress: Progress) -> None:
        """Take in an evaluation. An accelerator is not waited for.

        Args:
            progress: of one problem.
        """
        now, settled = (progress.v, progress.gradient), (progress.mu_residual <= _SETTLED).all()
        if self._now is None or self._now[0].shape != now[0].shape:  # other names have influence
            self._first, self._known = now, settled
            self._least = torch.full_like(now[0][:, 0], torch.inf)
            self._size = torch.maximum(self._size.to(now[0]), _norm(now[1]))
        else:
            step, change = _way(self._now, now)
            told = settled & self._settled & (step > 0) & (change > _PAIR * self._size)
            self._least = torch.minimum(self._least, torch.where(told, step / change, torch.inf))
            begins = settled & ~self._known
            self._first = tuple(  # type: ignore[assignment]
                torch.where(begins, new, old) for new, old in zip(now, self._first, strict=True)
            )
            self._known = self._known | settled
        self._now, self._settled = now, settled

    def measure(self, lr: float) -> tuple[float, float]:
        """A step for what is left, and the share of the gradient that is left where none is known.

        Args:
            lr: the step size that was given, the answer where the gradients tell none.

        Returns:
            The inverse curvature of the whole way and 0. Or ``lr`` and a share, up to 1, where the
            gradient has hardly changed on the way, as with an ``lr`` that is far too small.
        """
        assert self._now is not None
        if not bool(self._known & self._settled):
            return lr, 0.0
        way, change = (float(size) for size in _way(self._first, self._now))
        first, now = float(self._size), float(_norm(self._now[1]))
        if first <= _NOISE * torch.finfo(self._now[0].dtype).eps:
            return lr, 0.0
        if way > 0 and change >= _SEEN * first:
            return way / change, 0.0
        return lr, min(now / first, 1.0)

    def advice(self, lr: float) -> str:
        """What to change where v has not come near enough to the optimum.

        Args:
            lr: the step size that was given.
        """
        least = float(self._least)
        if math.isinf(least):
            if self.measure(lr)[1]:  # it has hardly moved
                return f"raise lr, which is {lr:g}, tenfold or more"
            return "allow more iters, change lr, or raise reg"
        if least > _FITS * lr:
            return f"raise lr, which is {lr:g}, to about {least:.1g}"
        if least < lr / _FITS:
            return f"lower lr, which is {lr:g}, to about {least:.1g}, or allow more iters"
        return f"allow more iters, lower tol, or raise reg: lr={lr:g} fits"


def _norm(flat: Tensor) -> Tensor:
    """Of each row, here of the one problem, ``(1,)``."""
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norm


def _way(start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """‖Δv‖ and ‖Δg‖, ``(1,)`` each."""
    return _norm(end[0] - start[0]), _norm(end[1] - start[1])
