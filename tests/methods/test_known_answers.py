"""Convex problems whose optimum is known, and one that plain projected gradient finds too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Box, Joint, L2Ball, Nested, Status, optimize_input
from tests.cases import NETWORKS, Ridge, statuses
from tests.helpers import Context, independent_output, rand

if TYPE_CHECKING:
    from collections.abc import Callable


def smooth_methods(step: float) -> list[Any]:
    tight = Anderson(tol=1e-9, max_iter=200)
    return [
        Joint(max_iter=300, step_size=step, tol=1e-10),
        Joint(max_iter=400, step_size=step / 3, acceleration=0),
        Nested(max_iter=80, step_size=step, solver=tight),
        Nested(
            max_iter=300,
            step_size=step / 3,
            solver=Anderson(max_iter=2, tol=1e-12),
            warm_start=True,
        ),
    ]


SMOOTH = pytest.mark.parametrize("which", range(4), ids=["joint", "plain", "nested", "warm"])


@SMOOTH
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_a_strongly_convex_problem_has_the_known_answer(which: int, rate: float) -> None:
    model = Ridge(rate)
    method = smooth_methods(1 / model.curvature())[which]
    x = rand(3, 6, seed=4)
    solution = optimize_input(model, x, model.objective(seed=3), method=method)
    answer = model.answer(seed=3)
    torch.testing.assert_close(solution.x, answer.expand(3, 6), rtol=1e-5, atol=1e-6)
    best = model.objective(seed=3)(independent_output(model, answer[None]))
    torch.testing.assert_close(solution.value, best.expand(3), rtol=1e-8, atol=1e-9)
    assert statuses(solution) == {Status.CONVERGED}


@SMOOTH
def test_a_strongly_convex_problem_in_a_box(which: int) -> None:
    model = Ridge()
    method = smooth_methods(1 / model.curvature())[which]
    low, high = -0.05, 0.1
    answer = model.boxed_answer(3, low, high)
    assert 0 < int(((answer == low) | (answer == high)).sum()) < 6
    solution = optimize_input(
        model,
        torch.zeros(2, 6).double(),
        model.objective(seed=3),
        method=method,
        constraint=Box(low, high),
    )
    torch.testing.assert_close(solution.x, answer.expand(2, 6), rtol=1e-5, atol=1e-6)


@SMOOTH
@pytest.mark.parametrize("problems", [1, 3])
def test_named_parameters_have_the_known_answer(which: int, problems: int) -> None:
    """Rows of a problem share its context: least squares over all of them."""
    model, rows = Context(affine=True), 4
    x = rand(problems * rows, 4, seed=5)
    target, rho = rand(problems * rows, 3, seed=6), 2.0
    groups = torch.arange(problems).repeat(rows)  # rows of a problem need not be neighbours

    def objective(y: Tensor) -> Tensor:
        return 0.5 * (y[:, :3] - target).square().sum(1) + 0.5 * rho * y[:, 3:].square().sum(1)

    a, head = model.equilibrium.cell.a, model.head.weight.detach()
    inverse = torch.linalg.inv(torch.eye(6, dtype=a.dtype) - a)
    m = head @ inverse
    hessian = rows * (m.T @ m + rho * torch.eye(6, dtype=a.dtype))
    method = smooth_methods(1 / float(torch.linalg.eigvalsh(hessian)[-1]))[which]
    with torch.no_grad():
        offset = model.encoder(x) @ m.T + model.head.bias
    pull = torch.zeros(problems, 6).double().index_add(0, groups, (target - offset) @ m)
    answer = torch.linalg.solve(hessian, pull.T).T

    solution = optimize_input(
        model,
        x,
        objective,
        method=method,
        variables=["context"],
        groups=groups if problems > 1 else None,
    )
    found = solution.x["context"]
    assert found.shape == (problems, 6)
    torch.testing.assert_close(found, answer, rtol=1e-5, atol=1e-6)
    assert solution.value.shape == solution.status.shape == (problems,)
    assert solution.stats.f_evals.shape == (problems * rows,)
    assert not bool(model.context.any())  # the model keeps its own


@pytest.mark.parametrize("name", ["tensor", "series"])
def test_joint_and_nested_find_the_same_optimum_in_a_ball(name: str) -> None:
    model, x = NETWORKS[name](seed=3, solver=Anderson(tol=1e-9)), rand(8, 5, seed=1)
    target = rand(3, seed=9)

    def objective(y: Tensor) -> Tensor:
        return (y - 2 * target).square().sum(1)

    best = projected_gradient(model, x, objective, radius=0.7)
    for method in (Joint(max_iter=100, gap_tol=1e-6), Nested(max_iter=40)):
        solution = optimize_input(model, x, objective, method=method, constraint=L2Ball(0.7))
        torch.testing.assert_close(solution.value, best, rtol=2e-3, atol=1e-4)


def projected_gradient(
    model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], radius: float
) -> Tensor:
    """Values by plain projected gradient with exact gradients: another way to the optimum."""
    d = torch.zeros_like(x)
    best = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for k in range(150):
        v = (x + d).requires_grad_()
        loss = objective(model(v))
        best = torch.minimum(best, loss.detach())
        (g,) = torch.autograd.grad(loss.sum(), v)
        step = radius * 0.5 * 0.96**k
        d = d - step * g / g.norm(dim=1, keepdim=True)
        d = d * (radius / d.norm(dim=1, keepdim=True)).clamp(max=1)
    return best
