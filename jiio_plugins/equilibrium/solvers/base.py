"""What a solver is: settings in a frozen dataclass, and a state that takes steps."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from jiio_plugins.utils.checks import check_counts


class FlatMap(Protocol):
    """``f`` on flat states.

    It may have ``restrict(rows)``, the same map for the rows of these indices, or None where that
    cannot be had. Then rows that have converged are left out.
    """

    def __call__(self, z: Tensor, /) -> Tensor:
        """``f(z)``, flat, ``(rows, n)``."""
        ...


def looks(z: Tensor) -> bool:
    """Whether the host may look at every evaluation. An accelerator would make it wait."""
    return z.device.type == "cpu"


class ByRow:
    """Holds tensors, all of them batch first."""

    def restrict(self, rows: Tensor) -> None:
        """Keep the rows of these indices only."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


@dataclass(frozen=True)
class Observed:
    """One evaluation of f, and what the loop thinks of it.

    Attributes:
        z: the iterate, ``(rows, n)``.
        fz: ``f(z)``, ``(rows, n)``.
        residual: ``f(z) − z``, ``(rows, n)``.
        z_best: iterate of least residual so far, ``(rows, n)``.
        f_best: ``f(z_best)``, ``(rows, n)``.
        reject: rows whose step the loop takes back, bool ``(rows,)``. It restarts them from their
            best iterate, so a history must do the same. None: surely no row.
    """

    z: Tensor
    fz: Tensor
    residual: Tensor
    z_best: Tensor
    f_best: Tensor
    reject: Tensor | None


class SolverState(ByRow, abc.ABC):
    """What a solver remembers. Every tensor in it is batch first."""

    @abc.abstractmethod
    def advance(self, at: Observed) -> Tensor:
        """The next iterate, ``(rows, n)``.

        Args:
            at: the evaluation it goes on from.
        """


@dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    """Common part of the solvers.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ max(tol ‖f(z)‖, abs_tol)``.
        abs_tol: in the units of z. It is for fixed points at zero. None: 1e-12, or that times the
            size of z at the first evaluation where it is below 1.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.
    """

    max_iter: int = 50
    tol: float = 1e-4
    abs_tol: float | None = None

    def __post_init__(self) -> None:
        check_counts(self, max_iter=1)
        if not (self.tol >= 0 and (self.abs_tol is None or self.abs_tol >= 0)):
            raise ValueError(
                f"tol and abs_tol must not be negative, got {self.tol} and {self.abs_tol}"
            )

    @property
    def safeguarded(self) -> bool:
        """Whether the loop takes back steps that made the residual worse."""
        return True

    @property
    def growth(self) -> float:
        """A residual this many times the best one seen is taken back.

        Residuals of accelerated iterations rise before they fall, where a cell is slow. A limit
        close to 1 undoes steps that they need.
        """
        return 10.0

    @property
    def reduction(self) -> float:
        """A row also stops once its residual is this share of its first one.

        A tolerance relative to f(z) means little in a cell whose residuals are all small, such as
        one that is damped. This one means the same there. 0: it does not.
        """
        return 0.0

    @abc.abstractmethod
    def start(self, z: Tensor) -> SolverState:
        """Fresh history for the flat state ``z`` ``(rows, n)``."""


def check_solver(solver: Any, name: str) -> None:
    """Raise unless it is a :class:`Solver` or None.

    Args:
        solver: what was given.
        name: what the message calls it.

    Raises:
        TypeError: it is something else.
    """
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"{name} must be Anderson(...), Picard(...) or Broyden(...), got {solver!r}"
        )


def check_positive(name: str, value: float, upper: float = float("inf")) -> None:
    """Raise unless a number is in ``(0, upper]``.

    Args:
        name: what the message calls it.
        value: what was given.
        upper: largest number accepted.

    Raises:
        ValueError: it is not.
    """
    if not 0 < value <= upper:
        limit = "" if upper == float("inf") else f" and at most {upper:g}"
        raise ValueError(f"{name} must be above 0{limit}, got {value}")
