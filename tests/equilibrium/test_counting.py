"""Counted evaluations and products are those that happened."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Equilibrium,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Unrolled,
    count_evaluations,
)
from tests.helpers import TIGHT, CountedCell, Net, Spy, rand


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Phantom(steps=4), JacobianFree(), Unrolled(steps=7)]
)
def test_counted_evaluations_are_those_that_happened(adjoint: Any) -> None:
    net = Net(adjoint=adjoint)
    net.equilibrium.cell = spy = Spy(net.equilibrium.cell)
    x = rand(1, 5, seed=1).requires_grad_()
    with count_evaluations() as counter:
        y = net(x)
        forward = spy.total
        assert counter.f_evals == forward
        assert counter.vjps == 0
        y.sum().backward()
    assert counter.f_evals == spy.total == forward  # one row is never compacted
    if isinstance(adjoint, Implicit):
        assert counter.vjps > 1
    else:
        assert counter.vjps == getattr(adjoint, "steps", 1)  # one for each step with a graph


def test_counted_vjps_are_those_that_happened() -> None:
    cell = CountedCell(6, 0.9, seed=1)
    u = rand(1, 6, seed=2).requires_grad_()
    with count_evaluations() as counter:
        Equilibrium(cell, solver=TIGHT)(u).sum().backward()
    assert counter.vjps == sum(cell.products)


def test_counts_are_sums_over_rows_and_nest() -> None:
    net, x = Net(solver=Anderson(tol=1e-8)), rand(6, 5, seed=1)
    with torch.no_grad(), count_evaluations() as outer:
        with count_evaluations() as inner:
            net(x)
        each = []
        for row in x:
            with count_evaluations() as one:
                net(row[None])
            each.append(one.f_evals)
    assert inner.f_evals == sum(each)
    assert outer.f_evals == 2 * inner.f_evals
    assert len(set(each)) > 1
    assert 0 < inner.worst_residual <= 1e-8


def test_worst_residual_tells_an_unfinished_solve() -> None:
    net = Net(solver=Anderson(max_iter=3, tol=1e-12))
    with torch.no_grad(), count_evaluations() as counter:
        net(rand(6, 5, seed=1))
    assert counter.f_evals == 18
    assert counter.worst_residual > 1e-6


def test_converged_rows_cost_no_vjp_of_the_adjoint_solve() -> None:
    """Rows of different difficulty: the adjoint solve of each stops by itself."""
    rates = torch.tensor([0.05, 0.2, 0.5, 0.9]).double()
    decay = torch.tensor([1.0, 0.9, -0.5, 0.3]).double()

    class Cell(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return u[:, :1] * decay * z + u[:, 1:]

    def cost(rows: Tensor) -> float:
        u = torch.cat([rows[:, None], rand(4, 4, seed=3)[: len(rows)]], dim=1)
        layer = Equilibrium(Cell(), solver=Picard(max_iter=500, tol=1e-10))
        with count_evaluations() as counter:
            z0 = torch.zeros(len(u), 4, dtype=torch.float64)
            u = u.requires_grad_()
            layer(u, z0=z0).sum().backward()
        return counter.vjps

    together = cost(rates)
    assert together < 4 * cost(rates[3:])
    assert together == pytest.approx(sum(math.ceil(cost(r[None])) for r in rates), rel=0.1)
