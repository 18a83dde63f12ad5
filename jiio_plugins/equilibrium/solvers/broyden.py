"""Broyden's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers.base import Observed, Solver, SolverState
from jiio_plugins.equilibrium.state import products
from jiio_plugins.utils.checks import check_counts


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method with a limited-memory inverse Jacobian of ``r(z) = f(z) − z``.

    ``z⁺ = z − H r(z)`` with ``H₀ = −I`` and ``H⁺ = H + (Δz − HΔr) ΔzᵀH / (ΔzᵀHΔr)``.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ max(tol ‖f(z)‖, abs_tol)``.
        abs_tol: in the units of z. None: see :class:`Solver`.
        memory: rank kept. When it is full the update starts afresh.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models" (NeurIPS 2019), section 3.2.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, memory=1)

    def start(self, z: Tensor) -> SolverState:
        """Preallocate the low-rank factors."""
        return _BroydenState(self, z)


class _BroydenState(SolverState):
    def __init__(self, solver: Broyden, z: Tensor) -> None:
        rows, n = z.shape
        self.left = z.new_zeros(rows, solver.memory, n)
        self.right = z.new_zeros(rows, solver.memory, n)
        self.z_last: Tensor | None = None
        self.r_last: Tensor | None = None
        self.used = 0  # pairs

    @staticmethod
    def _times_h(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
        """``−vector + Σ left_i ⟨right_i, vector⟩``."""
        return products(left.mT, products(right, vector)) - vector

    def advance(self, at: Observed) -> Tensor:
        r = at.residual
        if self.z_last is not None and self.r_last is not None:
            self._remember(at.z - self.z_last, r - self.r_last)
        self.z_last, self.r_last = at.z, r
        if at.reject is not None:
            reject = at.reject[:, None]
            self.z_last = torch.where(reject, at.z_best, at.z)
            self.r_last = torch.where(reject, at.f_best - at.z_best, r)
        used = slice(self.used)
        return at.z - self._times_h(self.left[:, used], self.right[:, used], r)

    def _remember(self, s: Tensor, y: Tensor) -> None:
        """Update H by the newest secant pair."""
        if self.used == self.left.shape[1]:
            self.used = 0  # each pair was made with H as it was, so none can be dropped alone
        left, right = self.left[:, : self.used], self.right[:, : self.used]
        sh = self._times_h(right, left, s)
        new = (s - self._times_h(left, right, y)) / (sh * y).sum(1, keepdim=True)
        # a finite secant pair is true whether or not its step is taken back
        usable = (torch.isfinite(new.sum(1)) & torch.isfinite(sh.sum(1)))[:, None]
        self.left[:, self.used] = torch.where(usable, new, 0)
        self.right[:, self.used] = torch.where(usable, sh, 0)
        self.used += 1
