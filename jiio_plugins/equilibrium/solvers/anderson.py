"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from jiio_plugins.equilibrium.solvers.base import (
    Observed,
    Solver,
    SolverState,
    check_positive,
    looks,
)
from jiio_plugins.equilibrium.state import products, surely_none
from jiio_plugins.utils.checks import check_counts

_SHORTEST, _LONGEST = 5, 40  # differences kept by a memory that grows
_MOST_BYTES = 2**24  # of a row's history, beyond which it does not grow


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II) with a ridge relative to the Gram matrix.

    With residuals ``r_k = f(z_k) − z_k`` and the last ``memory`` differences ``Y = [Δr]``,
    ``D = [Δf]`` it takes ``γ = argmin ‖r_k − Yγ‖²`` and
    ``z⁺ = f(z_k) − Dγ − (1 − damping)(r_k − Yγ)``. The ridge is relative to the
    columns of Y, so it means the same at residual 1 and 1e-12: an absolute ridge stalls.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ max(tol ‖f(z)‖, abs_tol)``.
        abs_tol: in the units of z. None: see :class:`Solver`.
        memory: differences kept. Each takes the memory of two states. None: 5, and twice as many
            whenever a row has run for twice as many evaluations, up to 40 or 16 MiB a row. Cells
            that settle at once pay little, and slow ones have the memory they need.
        damping: in (0, 1]. 1 takes the whole step.
        ridge: added to the diagonal of the Gram matrix, as a share of it. None: ten times the
            dtype's epsilon.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.

    Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.2. Safeguarded restarts are as in
    Zhang, O'Donoghue and Boyd, SIAM J. Optim. 30 (2020).
    """

    memory: int | None = None
    damping: float = 1.0
    ridge: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("damping", self.damping, 1.0)
        if self.memory is not None:
            check_counts(self, memory=1)
        if self.ridge is not None and self.ridge < 0:
            raise ValueError(f"ridge must not be negative, got {self.ridge}")

    def start(self, z: Tensor) -> SolverState:
        """Preallocate the history."""
        return _AndersonState(self, z)


class _AndersonState(SolverState):
    def __init__(self, solver: Anderson, z: Tensor) -> None:
        rows, n = z.shape
        self.damping = solver.damping
        self.ridge = 10 * torch.finfo(z.dtype).eps if solver.ridge is None else solver.ridge
        if solver.memory is None:
            # by what a row takes, not the batch: a row's path must not depend on its neighbours
            affordable = _MOST_BYTES // (2 * n * z.element_size())
            self.limit = min(n, _LONGEST, max(_SHORTEST, affordable))
            self.memory = min(n, _SHORTEST)
        else:
            self.limit = self.memory = min(n, solver.memory)
        self.y = z.new_zeros(rows, self.memory, n)
        self.d = z.new_zeros(rows, self.memory, n)
        # a column that is given up is not overwritten, which would cost a pass over the history
        # the normal equations square Y's condition number, so they are solved in float64
        self.gram = z.new_zeros(rows, self.memory, self.memory, dtype=torch.float64)
        self.valid = torch.ones(rows, self.memory, dtype=torch.bool, device=z.device)
        self.whole = looks(z)  # surely every column is valid
        self.r_last: Tensor | None = None
        self.f_last: Tensor | None = None
        self.count = 0

    def advance(self, at: Observed) -> Tensor:
        r = at.residual
        if self.r_last is not None and self.f_last is not None:
            self._remember(at, self.r_last, self.f_last)
        self.r_last, self.f_last = r, at.fz
        if at.reject is not None:
            reject = at.reject[:, None]
            self.r_last = torch.where(reject, at.f_best - at.z_best, r)
            self.f_last = torch.where(reject, at.f_best, at.fz)
        if self.count == 0:
            return at.fz if self.damping == 1.0 else torch.lerp(at.z, at.fz, self.damping)
        used = min(self.count, self.memory)
        y, d = self.y[:, :used], self.d[:, :used]
        along = self._along(r, used).unsqueeze(2)
        gamma = mixing_weights(self.gram[:, :used, :used], along, self.ridge).to(r.dtype).mT
        z_next = torch.baddbmm(at.fz.unsqueeze(1), gamma, d, alpha=-1).squeeze(1)
        if self.damping != 1.0:
            r_left = torch.baddbmm(r.unsqueeze(1), gamma, y, alpha=-1).squeeze(1)
            z_next = z_next - (1 - self.damping) * r_left
        return z_next

    def _remember(self, at: Observed, r_last: Tensor, f_last: Tensor) -> None:
        """Take in the newest pair of differences."""
        if self.count == 2 * self.memory < 2 * self.limit:
            self._grow()
        slot = self.count % self.memory
        self.count += 1
        used = min(self.count, self.memory)
        torch.sub(at.residual, r_last, out=self.y[:, slot])
        torch.sub(at.fz, f_last, out=self.d[:, slot])
        if at.reject is not None or not self.whole:
            self._sift(slot, at)
        column = self._along(self.y[:, slot], used)
        self.gram[:, slot, :used] = column
        self.gram[:, :used, slot] = column

    def _sift(self, slot: int, at: Observed) -> None:
        """Give up columns: one that holds NaN or Inf, and those from before a restart."""
        keep = torch.isfinite(self.y[:, slot].sum(1))
        if at.reject is not None:
            keep = keep & ~at.reject
        keep = keep[:, None]
        self.y[:, slot].masked_fill_(~keep, 0)
        self.d[:, slot].masked_fill_(~keep, 0)
        self.valid &= keep
        self.valid[:, slot] = keep.squeeze(1)
        self.gram.masked_fill_(~keep[:, None], 0)
        self.whole = surely_none(~self.valid)

    def _along(self, vector: Tensor, used: int) -> Tensor:
        """``Yᵀ vector``, ``(rows, used)`` in float64."""
        along = products(self.y[:, :used], vector).double()
        return along if self.whole else along.masked_fill_(~self.valid[:, :used], 0)

    def _grow(self) -> None:
        """Twice the memory: the cell is slow. Two rounds are full, so slot 0 has the oldest."""
        old, self.memory = self.memory, min(2 * self.memory, self.limit)
        new = self.memory - old
        self.y, self.d = pad(self.y, (0, 0, 0, new)), pad(self.d, (0, 0, 0, new))
        self.gram = pad(self.gram, (0, new, 0, new))
        self.valid = pad(self.valid, (0, new), value=True)
        self.count = old


def mixing_weights(gram: Tensor, along: Tensor, ridge: float) -> Tensor:
    """``γ = argmin ‖r − Y γ‖²`` with a ridge, ``(rows, memory, 1)``. It is 0 where that fails.

    The ridge is relative to each diagonal entry, as if the columns of Y were normalised: a Cholesky
    factorisation does not see their scale. Columns of zeros get no weight.

    Args:
        gram: ``YᵀY``, ``(rows, memory, memory)`` in float64: it squares Y's condition number.
        along: ``Yᵀr``, ``(rows, memory, 1)`` in float64.
        ridge: relative to the diagonal of the Gram matrix.
    """
    gram = gram.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1.0 + ridge)
    diagonal.masked_fill_(diagonal == 0, 1.0)
    factor, info = torch.linalg.cholesky_ex(gram)
    gamma = torch.cholesky_solve(along, factor)
    return torch.where((info == 0)[:, None, None] & torch.isfinite(gamma), gamma, 0.0)
