"""Plain iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers.base import Observed, Solver, SolverState, check_positive


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """Plain damped iteration ``z⁺ = z + damping · (f(z) − z)``.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ max(tol ‖f(z)‖, abs_tol)``.
        abs_tol: in the units of z. None: see :class:`Solver`.
        damping: step length, in (0, 2]. Above 1 it over-relaxes.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.

    Not for: cells that do not contract. No step is taken back there, so use :class:`Anderson`.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("damping", self.damping, 2.0)

    @property
    def safeguarded(self) -> bool:
        """Plain iteration is left plain."""
        return False

    def start(self, z: Tensor) -> SolverState:
        """No history."""
        return _PicardState(self.damping)


class _PicardState(SolverState):
    def __init__(self, damping: float) -> None:
        self.damping = damping

    def advance(self, at: Observed) -> Tensor:
        return at.fz if self.damping == 1.0 else torch.lerp(at.z, at.fz, self.damping)
