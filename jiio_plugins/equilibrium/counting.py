"""Counting evaluations of f and vector-Jacobian products, whoever causes them."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cost(NamedTuple):
    """What something took. Numbers for a batch, or tensors with an entry per row.

    Attributes:
        f_evals: evaluations of f, a number or ``(rows,)``.
        vjps: vector-Jacobian products, a number or ``(rows,)``.
        verification_f_evals: evaluations of f in the final verification, which every method shares.
            They are not in ``f_evals``.
        verification_vjps: likewise.
        verification_seconds: by the host's clock.
    """

    f_evals: Tensor | float = 0.0
    vjps: Tensor | float = 0.0
    verification_f_evals: Tensor | float = 0.0
    verification_vjps: Tensor | float = 0.0
    verification_seconds: Tensor | float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def total(self) -> Cost:
        """Summed over rows. Nothing is read by the host."""
        return Cost(*(t.detach().sum() if isinstance(t, Tensor) else t for t in self))


class Counter:
    """Sums over samples. Divide by the number of samples for the cost of one.

    A sample that has converged adds nothing, even where the batch runs on.
    """

    def __init__(self) -> None:
        self._costs: list[Cost] = []
        self._residuals: list[Tensor] = []
        self._adjoint_residuals: list[Tensor] = []

    @property
    def f_evals(self) -> float:
        """Evaluations of f, summed over samples."""
        return sum(float(cost.f_evals) for cost in self._costs)

    @property
    def vjps(self) -> float:
        """Vector-Jacobian products, summed over samples."""
        return sum(float(cost.vjps) for cost in self._costs)

    @property
    def verification_f_evals(self) -> float:
        """Evaluations of f in final verifications, which are not in ``f_evals``."""
        return sum(float(cost.verification_f_evals) for cost in self._costs)

    @property
    def verification_vjps(self) -> float:
        """Vector-Jacobian products in final verifications, which are not in ``vjps``."""
        return sum(float(cost.verification_vjps) for cost in self._costs)

    @property
    def verification_seconds(self) -> float:
        """What the final verifications took, in seconds by the host's clock."""
        return sum(float(cost.verification_seconds) for cost in self._costs)

    @property
    def worst_residual(self) -> float:
        """Largest relative residual of any forward solve so far (0 before the first)."""
        return max((float(t) for t in self._residuals), default=0.0)

    @property
    def worst_adjoint_residual(self) -> float:
        """Largest ``‖J_zᵀμ + g − μ‖ / ‖μ‖`` of any adjoint so far (0 before the first).

        From about 1e-2 on the gradients are wrong. See :class:`Implicit` for what to do.
        """
        return max((float(t) for t in self._adjoint_residuals), default=0.0)

    def add(
        self, cost: Cost, residual: Tensor | None = None, adjoint_residual: Tensor | None = None
    ) -> None:
        """Take in a cost. Nothing is read by the host until asked for.

        Args:
            cost: numbers, or one entry per row.
            residual: relative residuals that a forward solve ended with, ``(rows,)``. None: there
                was no solve.
            adjoint_residual: the same of the adjoint equation. None: it was not solved.
        """
        self._costs.append(cost.total())
        for kept, new in (
            (self._residuals, residual),
            (self._adjoint_residuals, adjoint_residual),
        ):
            if new is not None and new.numel():
                kept.append(new.detach().max())


class RowCounter(Counter):
    """Counts evaluations of f per row, on top of ``start`` ``(rows,)``.

    Attributes:
        f_evals_by_row: so far, ``(rows,)``.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.f_evals_by_row = start

    def add(
        self, cost: Cost, residual: Tensor | None = None, adjoint_residual: Tensor | None = None
    ) -> None:
        """Take in the cost of a solve of all these rows.

        Args:
            cost: one entry per row.
            residual: not kept.
            adjoint_residual: not kept.
        """
        self.f_evals_by_row = self.f_evals_by_row + cost.f_evals


_counters: ContextVar[tuple[Counter, ...]] = ContextVar("jiio_counters", default=())


def count(
    cost: Cost, residual: Tensor | None = None, adjoint_residual: Tensor | None = None
) -> None:
    """Report a cost to every open counter.

    Args:
        cost: numbers, or one entry per row.
        residual: relative residuals that a forward solve ended with, ``(rows,)``. None: there was
            no solve.
        adjoint_residual: the same of the adjoint equation. None: it was not solved.
    """
    for counter in _counters.get():
        counter.add(cost, residual, adjoint_residual)


def open_counters() -> tuple[Counter, ...]:
    """The counters that are open here, to be handed to another thread."""
    return _counters.get()


@contextmanager
def counting_into(counters: tuple[Counter, ...]) -> Iterator[None]:
    """Count into these counters instead of those open here."""
    token = _counters.set(counters)
    try:
        yield
    finally:
        _counters.reset(token)


def count_rows(rows: int, device: torch.device) -> Tensor:
    """One evaluation a row, ``(rows,)``.

    Args:
        rows: how many there are.
        device: where the tensor is to be.
    """
    return torch.ones(rows, device=device)


@contextmanager
def count_evaluations() -> Iterator[Counter]:
    """Count what every equilibrium layer does inside the ``with`` block.

    A backward pass through k evaluations of f is k VJPs. Of an adapted layer that has a solver of
    its own the solver's evaluations are counted, and what it does outside of that is not: most
    often one more evaluation, and the backward pass.

    Example:
        >>> with count_evaluations() as counter:
        ...     y = model(x)
        >>> counter.f_evals / len(x)
        16.75
    """
    counter = Counter()
    with counting_into((*_counters.get(), counter)):
        yield counter
