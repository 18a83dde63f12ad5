"""Steps on z where a layer is called, as many as each row needs.

A row whose cell contracts well is best served by plain over-relaxed steps: while v moves they keep
up with it, and any more would be wasted. A *slow* row is settled at each v before its gradient is
taken, by mixed steps (:class:`jiio_plugins.methods.inverse.SecantInverse`) over what is seen at
this v alone. :class:`jiio_plugins.methods.Joint` tells which rows are slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import row_norm, surely_none
from jiio_plugins.methods.inverse import SecantInverse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.solvers import FlatMap

MEMORY = 4  # secant pairs
_SETTLED = 0.05  # a slow row stops where a mixed step moves z by less than this share of its size
_AT_REST = 0.1  # of that share: a residual below it means that the row has not been disturbed


class StateSteps:
    """Steps on z where a layer is called, so that the rest of the network runs once for all.

    Args:
        steps: that a fast row takes.
        omega: their length ω, ``(rows, 1)``.
        slow: rows that are settled by mixed steps, bool ``(rows,)``. None: there are none.
        most: mixed steps at most.

    Attributes:
        evals: evaluations of f so far, all layers together, ``(rows,)``.
        sizes: of each layer, ``‖f(z) − z‖`` before the last step of the fast rows, ``(rows,)``.
    """

    def __init__(self, steps: int, omega: Tensor, slow: Tensor | None = None, most: int = 0):
        self.steps, self.omega, self.slow, self.most = steps, omega, slow, most
        self.evals = torch.zeros(len(omega), device=omega.device)
        self.sizes: list[Tensor] = []
        self._settled: list[_Settled | None] = []

    @torch.no_grad()
    def __call__(self, f: FlatMap, z: Tensor) -> Tensor:
        """One layer's flat state, taken on."""
        if self.slow is None:
            size = torch.full_like(z[:, 0], torch.inf)
            if self.steps:
                z, size = self._relaxed(f, z, self.omega)
            self.evals = self.evals + self.steps
            self.sizes.append(size)
            self._settled.append(None)
            return z
        fast, size = ~self.slow, torch.full_like(z[:, 0], torch.inf)
        if self.steps and not surely_none(fast):
            part, rows = _only(f, fast)
            if rows is None:
                moved, now = self._relaxed(part, z, self.omega)
                z, size = torch.where(fast[:, None], moved, z), torch.where(fast, now, size)
            else:
                moved, now = self._relaxed(part, z[rows], self.omega[rows])
                z, size = z.index_copy(0, rows, moved), size.index_copy(0, rows, now)
            self.evals = self.evals + self.steps * fast
        self.sizes.append(size)
        part, rows = _only(f, self.slow)
        slow = self.slow if rows is None else self.slow[rows]
        settled = _Settled(part, z if rows is None else z[rows], slow, self.most)
        self._settled.append(settled)
        settled.rows = rows
        if rows is None:
            self.evals = self.evals + settled.evals
            return torch.where(self.slow[:, None], settled.z, z)
        self.evals = self.evals.index_add(0, rows, settled.evals)
        return z.index_copy(0, rows, settled.z)

    def _relaxed(self, f: FlatMap, z: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.steps):
            r = f(z) - z
            size = row_norm(r)
            z = relaxed(z, omega, r, size)
        return z, size

    def shrank(self, r: Sequence[Tensor]) -> Tensor:
        """Rows in which every layer's residual ``r`` is smaller than before, ``(rows, 1)``.

        Each layer is judged by itself. A later one starts with the jump of what goes into it, and
        that this shrinks says nothing about an earlier one.
        """
        smaller = [row_norm(now) < size for now, size in zip(r, self.sizes, strict=True)]
        return torch.stack(smaller, dim=1).all(1, keepdim=True)

    def settled(self, z: Sequence[Tensor], r: Sequence[Tensor], plain: Tensor) -> Tensor:
        """``plain``, but one more mixed step from z in the slow rows, ``(rows, n)``.

        Args:
            z: state of each layer, where it was evaluated.
            r: residual of each layer there.
            plain: the next state of the other rows, ``(rows, n)``.
        """
        if self.slow is None:
            return plain
        moved = []
        for layer, now, left in zip(self._settled, z, r, strict=True):
            assert layer is not None
            if layer.rows is None:
                moved.append(layer.step(now, left))
            else:
                rows = layer.rows
                moved.append(now.index_copy(0, rows, layer.step(now[rows], left[rows])))
        return torch.where(self.slow[:, None], torch.cat(moved, dim=1), plain)


class _Settled:
    """Mixed steps of some rows of one layer, until each moves its row by little.

    The step of a mixing estimates the error of z, where the residual of a cell that contracts
    slowly is small whatever the error.

    Attributes:
        rows: indices of the rows. None: all of the batch.
        z: where they end, ``(rows, n)``.
        evals: evaluations of f, ``(rows,)``.
    """

    rows: Tensor | None = None

    def __init__(self, f: FlatMap, z: Tensor, running: Tensor, most: int) -> None:
        self.inverse = SecantInverse(z, MEMORY)
        self.last: tuple[Tensor, Tensor] | None = None
        self.evals = torch.zeros(len(z), device=z.device)
        for k in range(most):
            r = f(z) - z
            self.evals = self.evals + running
            before, scale = z, row_norm(z)
            z = self.step(z, r, running)
            moved = row_norm(z - before)
            more = moved > _SETTLED * scale
            if not k:  # the step of no pairs is the residual, which tells nothing of a slow row
                more = moved > _AT_REST * _SETTLED * scale
            running = running & more
            if surely_none(running):
                break
        self.z = z

    def step(self, z: Tensor, r: Tensor, rows: Tensor | None = None) -> Tensor:
        """z, and in ``rows`` (bool, None: all) a mixed step on. Not where that is NaN or Inf."""
        rows = torch.ones(len(z), dtype=torch.bool, device=z.device) if rows is None else rows
        if self.last is None:
            self.last = z, r
        else:
            before, left = self.last
            self.inverse.learn(z - before, r - left, row_norm(z), rows)
            # what a row that stands still does must not hang on how long others go on
            self.last = torch.where(rows[:, None], z, before), torch.where(rows[:, None], r, left)
        move = self.inverse(r)
        return torch.where((rows & torch.isfinite(row_norm(move)))[:, None], z + move, z)


def _only(f: FlatMap, mask: Tensor) -> tuple[FlatMap, Tensor | None]:
    """The map for the rows of a mask alone, and their indices.

    On an accelerator, where asking would make the host wait, and where rows cannot be told apart it
    is the map for all of them, and None.
    """
    if mask.device.type == "cpu" and not bool(mask.all()) and hasattr(f, "restrict"):
        rows = mask.nonzero().squeeze(1)
        part = f.restrict(rows)
        if part is not None:
            return part, rows
    return f, None


def relaxed(z: Tensor, omega: Tensor, r: Tensor, size: Tensor) -> Tensor:
    """``z + ω r``, but z for a row in which ‖r‖ = ``size`` says that r holds NaN or Inf.

    Args:
        z: state, ``(rows, n)``.
        omega: ω, ``(rows, 1)``.
        r: residual, ``(rows, n)``.
        size: ‖r‖, ``(rows,)``.
    """
    return torch.where(torch.isfinite(size)[:, None], torch.addcmul(z, omega, r), z)
