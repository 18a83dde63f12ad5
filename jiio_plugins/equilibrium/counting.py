"""Counting evaluations of f and vector-Jacobian products, whoever causes them."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Counter:
    """Sums over samples; divide by the number of samples for the cost of one.

    A sample that has converged adds nothing, even where the batch runs on.
    """

    def __init__(self) -> None:
        self._f_evals: list[Tensor] = []
        self._verification: list[Tensor] = []
        self.verification_seconds = 0.0
        self._vjps: list[Tensor] = []
        self._residuals: list[Tensor] = []

    @property
    def f_evals(self) -> float:
        """Evaluations of f, summed over samples."""
        return sum(float(t) for t in self._f_evals)

    @property
    def vjps(self) -> float:
        """Vector-Jacobian products, summed over samples."""
        return sum(float(t) for t in self._vjps)

    @property
    def verification_f_evals(self) -> float:
        """Evaluations in the final verification of ``optimize_input``; not in ``f_evals``."""
        return sum(float(t) for t in self._verification)

    @property
    def worst_residual(self) -> float:
        """Largest relative residual of any forward solve so far (0 before the first)."""
        return max((float(t) for t in self._residuals), default=0.0)

    def add(
        self,
        f_evals: Tensor | None = None,
        vjps: Tensor | None = None,
        residual: Tensor | None = None,
        verification: Tensor | None = None,
        verification_seconds: float = 0.0,
    ) -> None:
        """Take in per-row counts; nothing is read by the host until asked for."""
        self.verification_seconds += verification_seconds
        if verification is not None:
            self._verification.append(verification.detach().sum())
        if f_evals is not None:
            self._f_evals.append(f_evals.detach().sum())
        if vjps is not None:
            self._vjps.append(vjps.detach().sum())
        if residual is not None and residual.numel():
            self._residuals.append(residual.detach().max())


class RowCounter(Counter):
    """Counts f evaluations per row, on top of ``start`` ``(rows,)``."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.f_evals_by_row = start

    def add(
        self,
        f_evals: Tensor | None = None,
        vjps: Tensor | None = None,
        residual: Tensor | None = None,
        verification: Tensor | None = None,
        verification_seconds: float = 0.0,
    ) -> None:
        """Take in the counts of a solve of all these rows."""
        if f_evals is not None:
            self.f_evals_by_row = self.f_evals_by_row + f_evals


_counters: ContextVar[tuple[Counter, ...]] = ContextVar("jiio_counters", default=())


def count(
    f_evals: Tensor | None = None,
    vjps: Tensor | None = None,
    residual: Tensor | None = None,
    verification: Tensor | None = None,
    verification_seconds: float = 0.0,
) -> None:
    """Report a cost to every open counter."""
    for counter in _counters.get():
        counter.add(f_evals, vjps, residual, verification, verification_seconds)


def open_counters() -> tuple[Counter, ...]:
    """The counters that are open here, to be handed to another thread."""
    return _counters.get()


@contextmanager
def counting_into(counters: tuple[Counter, ...]) -> Iterator[None]:
    """Count into ``counters`` instead of those open here."""
    token = _counters.set(counters)
    try:
        yield
    finally:
        _counters.reset(token)


def count_rows(rows: int, device: torch.device) -> Tensor:
    """One evaluation for each of ``rows`` rows."""
    return torch.ones(rows, device=device)


@contextmanager
def count_evaluations() -> Iterator[Counter]:
    """Count what every equilibrium layer does inside the ``with`` block.

    Example:
        >>> with count_evaluations() as counter:
        ...     y = model(x)
        >>> counter.f_evals / len(x)
    """
    counter = Counter()
    with counting_into((*_counters.get(), counter)):
        yield counter
