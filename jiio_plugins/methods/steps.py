"""Steps on z where a layer is called, as many as each row needs.

A row whose cell contracts well is best served by plain over-relaxed steps: while v moves they keep
up with it, and any more would be wasted. A *slow* row is settled at each v before its gradient is
taken, by mixed steps (:class:`jiio_plugins.methods.inverse.SecantInverse`) over what is seen at
this v alone. :class:`jiio_plugins.methods.Joint` tells which rows are slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.some_rows import some_rows
from jiio_plugins.equilibrium.state import by_row, row_norm, surely_none
from jiio_plugins.methods.inverse import SecantInverse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.solvers import FlatMap

MEMORY = 4  # secant pairs
_AT_REST = 0.1  # of the share: a residual below it means that the row has not been disturbed


class StateSteps:
    """Steps on z where a layer is called, so that the rest of the network runs once for all.

    Args:
        steps: that a fast row takes.
        omega: their length ω, ``(rows, 1)``.
        slow: rows that are settled by mixed steps, bool ``(rows,)``. None: there are none.
        most: mixed steps at most.
        share: a slow row stops where a mixed step moves z by less than this share of its size.
        precision: dtype in which f is computed. None: that of the state.
        lags: fast rows that take their steps, bool ``(rows,)``. The others take none. None: all do.

    Attributes:
        evals: evaluations of f so far, all layers together, a number or ``(rows,)``.
        apart: indices of the rows that the last layer has not settled, and of those that it has.
            None where they are not evaluated apart from each other.
        sizes: of each layer, ``‖f(z) − z‖`` before the last step of the fast rows, ``(rows,)``.
    """

    def __init__(
        self,
        steps: int,
        omega: Tensor,
        slow: Tensor | None = None,
        most: int = 0,
        share: float = 0.0,
        precision: torch.dtype | None = None,
        lags: Tensor | None = None,
    ) -> None:
        self.steps, self.omega, self.slow, self.most = steps, omega, slow, most
        self.share, self.precision = share, precision
        self.fast, self.together = lags, lags is None or bool(lags.all())
        if slow is not None:
            self.fast = ~slow if lags is None else lags & ~slow
        self.evals: Tensor | float = 0.0  # as many in each row
        if self.fast is not None:
            self.evals = torch.zeros(len(omega), device=omega.device)
        self.sizes: list[Tensor] = []
        self.apart: tuple[Tensor, Tensor] | None = None
        self._settled: list[_Settled] = []

    @torch.no_grad()
    def __call__(self, f: FlatMap, z: Tensor) -> Tensor:
        """One layer's flat state, taken on."""
        fast = _Rows(f, self.fast, z)
        slow = None if self.slow is None else _Rows(f, self.slow, z)
        # residual of all rows, where all begin with one
        together = self.together and self.steps and self.most
        first = f(z) - z if together and not (fast.none or slow is None or slow.none) else None
        start, size = z, None
        if self.steps and not fast.none:
            moved, size = self._relaxed(fast, start, first)
            z = fast.put(z, moved)
            if fast.mask is not None:
                size = fast.put(z.new_full((len(z),), torch.inf), size)
            evals: Any = self.evals
            self.evals = fast.put(evals, fast.take(evals) + self.steps)
        self.sizes.append(z.new_full((len(z),), torch.inf) if size is None else size)
        if slow is not None:
            settled = _Settled(slow, start, self.most, self.share, self.precision, first)
            self._settled.append(settled)
            z = settled.rows.put(z, settled.z)
            evals = self.evals
            self.evals = settled.rows.put(evals, settled.rows.take(evals) + settled.evals)
            self.apart = None
            if slow.index is not None:
                assert slow.mask is not None
                self.apart = (~slow.mask).nonzero().squeeze(1), slow.index
        return z

    def _relaxed(self, rows: _Rows, z: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        z, omega = rows.take(z), rows.take(self.omega)
        for k in range(self.steps):
            r = rows.f(z) - z if k or first is None else rows.take(first)
            size = row_norm(r)
            z = torch.addcmul(z, omega, r)
        return z, size

    def shrank(self, sizes: Sequence[Tensor]) -> Tensor:
        """Rows in which every layer's residual is smaller than before, ``(rows, 1)``.

        Each layer is judged by itself. A later one starts with the jump of what goes into it, and
        that this shrinks says nothing about an earlier one.

        Args:
            sizes: of each layer's residual now, ``(rows,)``.
        """
        smaller = [now < size for now, size in zip(sizes, self.sizes, strict=True)]
        every = smaller[0] if len(smaller) == 1 else torch.stack(smaller).all(0)
        return every[:, None]

    @property
    def unsettled(self) -> Tensor:
        """Slow rows in which some layer's z would have moved on, bool ``(rows,)``."""
        each = [layer.rows.put_none(layer.running) for layer in self._settled]
        return each[0] if len(each) == 1 else torch.stack(each).any(0)

    def settled(self, z: Sequence[Tensor], r: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """One more mixed step in the slow rows, ``(rows, n)``.

        Args:
            z: state of each layer, where it was evaluated.
            r: residual of each layer there.
            others: state of each layer, what the other rows have of it.
        """
        parts = zip(self._settled, z, r, others, strict=True)
        onward = [layer.onward(now, left, rest) for layer, now, left, rest in parts]
        return onward[0] if len(onward) == 1 else torch.cat(onward, dim=1)


class _Rows:
    """Some rows of a batch, and the map for them.

    On a CPU only these are evaluated. On an accelerator, where to ask which they are would make the
    host wait, and where rows cannot be told apart, all are, and the others are not looked at.

    Args:
        f: the map for all rows.
        mask: which rows, bool ``(rows,)``. None: all.
        z: where all rows are, ``(rows, n)``.

    Attributes:
        f: the map for those that are evaluated.
        none: whether there surely are none.
    """

    def __init__(self, f: FlatMap, mask: Tensor | None, z: Tensor) -> None:
        self.f, self.mask, self.index = f, mask, None
        self.none = mask is not None and surely_none(mask)
        if self.none or mask is None or mask.device.type != "cpu" or bool(mask.all()):
            return
        index = mask.nonzero().squeeze(1)
        part = some_rows(f, index, z)
        if part is not None:
            self.f, self.index = part, index

    def take(self, t: Tensor) -> Tensor:
        """What belongs to the rows that are evaluated."""
        return t if self.index is None else t[self.index]

    def put(self, t: Tensor, new: Tensor) -> Tensor:
        """t, with what is new in these rows."""
        if self.mask is None:
            return new
        if self.index is not None:
            return t.index_copy(0, self.index, new)
        return torch.where(self.mask.reshape(-1, *[1] * (t.ndim - 1)), new, t)

    def put_none(self, new: Tensor) -> Tensor:
        """What is new in these rows, bool, and False in the others, ``(rows,)``."""
        assert self.mask is not None
        return self.put(torch.zeros_like(self.mask), new)


class _Settled:
    """Mixed steps of some rows of one layer, until each moves its row by little.

    The step of a mixing estimates the error of z, where the residual of a cell that contracts
    slowly is small whatever the error.

    Args:
        rows: the rows.
        z: where the batch starts, ``(rows, n)``.
        most: steps at most.
        share: a row stops where a step moves it by less than this share of its size.
        precision: dtype in which f is computed. None: that of z.
        first: the residual there, if it is known, ``(rows, n)``.

    Attributes:
        z: where they end.
        evals: evaluations of f.
        running: rows that took all steps and would have moved on, bool ``(rows,)``.
    """

    def __init__(
        self,
        rows: _Rows,
        z: Tensor,
        most: int,
        share: float,
        precision: torch.dtype | None = None,
        first: Tensor | None = None,
    ) -> None:
        self.rows, self.z = rows, rows.take(z)
        self.inverse = SecantInverse(self.z, MEMORY, precision)
        self.last: tuple[Tensor, Tensor] | None = None
        assert rows.mask is not None
        running = rows.take(rows.mask)
        self.evals = torch.zeros(len(self.z), device=z.device)
        enough = _AT_REST * share  # the step of no pairs is the residual, small in a slow row
        for k in range(0 if rows.none else most):
            r = rows.f(self.z) - self.z if k or first is None else rows.take(first)
            self.evals = self.evals + running
            before, self.z = self.z, self._step(self.z, r, running)
            running = running & (row_norm(self.z - before) > enough * row_norm(before))
            enough = share
            if surely_none(running):
                break
        self.running = running

    def onward(self, z: Tensor, r: Tensor, others: Tensor) -> Tensor:
        """A mixed step on from z in these rows, of residual ``r`` there, and the others."""
        z_rows = self.rows.take(z)
        every = torch.ones(len(z_rows), dtype=torch.bool, device=z.device)
        return self.rows.put(others, self._step(z_rows, self.rows.take(r), every))

    def _step(self, z: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        """z, and in ``rows`` (bool) a mixed step on. Not where that is NaN or Inf."""
        if self.last is None:
            self.last = z, r
        else:
            before, left = self.last
            d, y = z - before, r - left
            self.inverse.learn(d, y, row_norm(z), rows)
            # what a row that stands still does must not hang on how long others go on
            self.last = by_row(rows, z, before), by_row(rows, r, left)
        move = self.inverse(r)
        return by_row(rows & (row_norm(move) < torch.inf), z + move, z)
