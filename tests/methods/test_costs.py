"""Evaluations and products that a solution reports are those that happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jiio_plugins import (
    Anderson,
    Joint,
    L2Ball,
    Nested,
    count_evaluations,
    joint_solution,
    optimize_input,
)
from tests.cases import squared
from tests.helpers import CountedCell, Net, Series, Spy, rand


def calls(model: Net, spy: Spy, x: Tensor) -> int:
    """Evaluations of f that the model takes at x."""
    spy.rows.clear()
    with torch.no_grad():
        model(x)
    return spy.total


def test_costs_are_those_that_happened() -> None:
    """Everything but the final verification, whatever was evaluated to choose the answer."""
    for step in (0.5, 50.0):  # the long one makes other candidates worth a look
        for method in (
            Joint(max_iter=12, step_size=step),
            Nested(max_iter=4, step_size=step),
            Nested(max_iter=4, step_size=step, warm_start=True, solver=Anderson(max_iter=2)),
        ):
            model, x = Net(seed=5, rate=0.95, solver=Anderson(tol=1e-6)), rand(1, 5, seed=1)
            target = model(x).detach() + 0.05
            model.equilibrium.cell = spy = Spy(model.equilibrium.cell)
            with count_evaluations() as counter:
                solution = optimize_input(
                    model,
                    x,
                    lambda y, goal=target: (y - goal).square().sum(1),
                    method=method,
                    constraint=L2Ball(1.0),
                )
            happened = spy.total
            # the verification is one call of the model and a tight solve from where it ended, which
            # is nearer to the fixed point than the initial state
            call = calls(model, spy, solution.x)
            model.equilibrium.solver = Anderson(max_iter=200, tol=1e-9)
            from_scratch = calls(model, spy, solution.x)
            verification = float(solution.stats.verification_f_evals.sum())
            assert call < verification < call + from_scratch
            assert float(solution.stats.f_evals.sum()) == happened - verification
            # one row: the counter sees the same, never twice
            assert counter.f_evals == float(solution.stats.f_evals.sum())
            assert counter.vjps == float(solution.stats.vjps.sum())


@pytest.mark.parametrize(
    "method",
    [
        Joint(max_iter=12),
        Joint(max_iter=12, state_steps=1),
        Nested(max_iter=4),
        Nested(max_iter=4, warm_start=True),
    ],
)
@pytest.mark.parametrize("constraint", [None, L2Ball(1.0)])
def test_costs_of_several_layers_are_the_sum_of_theirs(method: Any, constraint: Any) -> None:
    model, x = Series(solver=Anderson(tol=1e-6)), rand(1, 5, seed=1)
    spies = [Spy(layer.cell) for layer in (model.first, model.second)]
    model.first.cell, model.second.cell = spies
    with count_evaluations() as counter:
        solution = optimize_input(model, x, squared, method=method, constraint=constraint)
    happened = sum(spy.total for spy in spies)
    stats = solution.stats
    assert float((stats.f_evals + stats.verification_f_evals).sum()) == happened
    assert counter.f_evals == float(stats.f_evals.sum())
    assert float(stats.vjps.sum()) % 2 == 0  # a product passes both layers
    for spy in spies:
        spy.rows.clear()
    joint = joint_solution(model, x, squared, method=method, constraint=constraint)
    assert float(joint.f_evals.sum()) == sum(spy.total for spy in spies)


def test_vjps_are_those_that_happened() -> None:
    model, x = Net(), rand(1, 5, seed=1)
    cell = model.equilibrium.cell = CountedCell(8, 0.7, seed=2)
    for method in (
        Joint(max_iter=9, adjoint_warmup=0, max_state_steps=2),
        Joint(max_iter=9, adjoint_warmup=20, max_state_steps=2),
        Joint(max_iter=9, max_state_steps=2),
        Joint(max_iter=9),
        Nested(max_iter=3),
        Nested(max_iter=3, warm_start=True),
    ):
        cell.products.clear()
        solution = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.5))
        search, checked = solution.stats.vjps.sum(), solution.stats.verification_vjps.sum()
        assert float(search + checked) == len(cell.products)
        if isinstance(method, Joint) and method.max_state_steps == 2:  # all rows are fast
            # one an iteration, the head's gradient needs none, and those of the adjoint's warm-up
            twice = 3 if method.adjoint_warmup is None else method.adjoint_warmup
            assert float(search) == 9 + min(9, twice)


def test_iterations_cost_what_they_should() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    solution = optimize_input(
        model,
        x,
        squared,
        method=Joint(max_iter=20, state_steps=2, warmup=3, gap_tol=0.0),
        constraint=L2Ball(0.5),
    )
    assert solution.stats.iterations.tolist() == [20] * 4
    assert solution.stats.vjps.tolist() == [25] * 4  # a quarter of the iterations take two
    assert bool((solution.stats.f_evals <= 3 + 39 + 200).all())
    assert bool((solution.stats.f_evals >= 40).all())
    assert set(solution.stats.summary()) >= {"f_evals", "vjps", "iterations", "z_residual"}
