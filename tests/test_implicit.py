"""``optimize_input(differentiable=True)`` against finite differences of the whole optimisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Box,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    count_evaluations,
    optimize_input,
)
from tests.helpers import Context, Net, PairNet, Series, rand

STEP = 1e-4
EXACT = Anderson(max_iter=600, memory=10, tol=1e-13)  # differences over STEP amplify what it leaves


def solve(model: nn.Module, x: Tensor, target: Tensor, radius: Tensor, kind: str, **kwargs: Any):
    sets = {
        "l2": lambda: L2Ball(radius),
        "l2+box": lambda: Intersection(L2Ball(radius), Box(-1.0, 1.0)),
        "l1": lambda: L1Ball(radius),
        "linf": lambda: LinfBall(radius),
        "free": lambda: None,
    }
    return optimize_input(
        model,
        x,
        lambda y: objective(y, target),
        constraint=sets[kind](),
        **{"differentiable": True, **kwargs},
    )


def objective(y: Tensor, target: Tensor) -> Tensor:
    loss = (y[:, :3] - target).square().sum(1)
    return loss + 0.3 * y[:, 3:].square().sum(1)  # Context's output holds the context


CASES = {
    "skip, l2": (Net(skip=True), "l2", {}),
    "two layers, l2 and box": (Series(), "l2+box", {}),
    "tuple state, linf": (PairNet(), "linf", {}),
    "l1": (Net(), "l1", {"method": Joint(max_iter=60)}),
    "nested, l2": (Net(), "l2", {"method": Nested()}),
    "groups": (
        Context(),
        "free",
        {
            "method": Joint(max_iter=100, step_size=0.1),
            "variables": ["context"],
            "groups": torch.tensor([0, 1, 1, 0, 1, 2]),
        },
    ),
    "one group": (
        Context(),
        "free",
        {"method": Joint(max_iter=100, step_size=0.02), "variables": ["context"]},
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_gradient_with_respect_to_everything(name: str) -> None:
    model, kind, kwargs = CASES[name]
    rows = 6 if "variables" in kwargs else 3
    x = (0.5 * rand(rows, 4 if "variables" in kwargs else 5, seed=1)).clamp(-0.9, 0.9)
    x.requires_grad_()
    target = (3 * rand(rows, 3, seed=2)).requires_grad_()
    radius = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = {**dict(model.named_parameters()), "target": target, "radius": radius, "x": x}

    def flat_x() -> Tensor:
        solution = solve(model, x, target, radius, kind, differentiable=EXACT, **kwargs)
        found = solution.x if isinstance(solution.x, Tensor) else solution.x["context"]
        assert float(solution.stats.implicit.joint.max()) < 1e-9
        return found.flatten()

    found = flat_x()
    weights = rand(found.numel(), seed=3)
    gradients = torch.autograd.grad(found @ weights, list(leaves.values()), allow_unused=True)
    for k, ((leaf_name, leaf), got) in enumerate(zip(leaves.items(), gradients, strict=True)):
        direction = rand(max(1, leaf.numel()), seed=10 + k).reshape(leaf.shape)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(sign * STEP * direction)
            values.append(float(flat_x().detach() @ weights))
            with torch.no_grad():
                leaf.sub_(sign * STEP * direction)
        expected = (values[0] - values[1]) / (2 * STEP)
        slope = 0.0 if got is None else float((got * direction).sum())
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6), leaf_name


def test_only_first_derivatives() -> None:
    x, target = rand(2, 5, seed=1), (3 * rand(2, 3, seed=2)).requires_grad_()
    solution = solve(Net(), x, target, torch.tensor(0.5), "l2")
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(solution.x.sum(), target, create_graph=True)


def test_nothing_to_attach_to_gives_a_plain_result() -> None:
    model = Net().requires_grad_(False)
    solution = solve(model, rand(2, 5, seed=1), 3 * rand(2, 3, seed=2), torch.tensor(0.5), "l2")
    assert not solution.x.requires_grad


def test_value_and_caller_are_untouched() -> None:
    model, x, target = Net().train(), rand(2, 5, seed=1), 3 * rand(2, 3, seed=2)
    plain = optimize_input(model, x, lambda y: objective(y, target), constraint=L2Ball(0.5))
    assert not plain.x.requires_grad
    attached = solve(model, x, target, 0.5, "l2")
    assert bool((attached.value <= plain.value + 1e-6).all())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert attached.x.requires_grad


def test_costs_and_residuals_are_reported() -> None:
    x, target = rand(2, 5, seed=1), 3 * rand(2, 3, seed=2)
    with count_evaluations() as counter:
        solution = solve(Net(), x, target, 0.5, "l2")
        before = counter.vjps
        residuals = solution.stats.implicit
        assert residuals.adjoint is None
        solution.x.sum().backward()
    assert counter.vjps > before
    assert float(residuals.adjoint.max()) < 1e-9


@pytest.mark.filterwarnings("ignore:.*relative residual")
@pytest.mark.parametrize("differentiable", [True, Anderson(max_iter=8, tol=0.05)])
@pytest.mark.parametrize("constraint", [Box(0.0, 1.0), L2Ball(0.0), L2Ball(0.3)])
def test_a_differentiable_solution_is_in_the_set(differentiable: Any, constraint: Any) -> None:
    x, mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(5) < 3
    for seed in range(4):
        model, target = Net(seed=seed).float(), 3 * rand(6, 3, seed=seed, dtype=torch.float32)
        sets = [constraint]
        if isinstance(constraint, L2Ball):
            sets.append(L2Ball(constraint.radius, mask=mask))
        for chosen in sets:
            found = optimize_input(
                model,
                x,
                lambda y, goal=target: objective(y, goal),
                constraint=chosen,
                method=Joint(max_iter=5),
                differentiable=differentiable,
            )
            reached = found.x.detach()
            if isinstance(chosen, Box):
                assert 0 <= float(reached.min()) <= float(reached.max()) <= 1
            else:
                moved = reached - x
                assert float(moved.norm(dim=1).max()) <= constraint.radius * (1 + 1e-6)
                assert chosen is constraint or not bool(moved[:, ~mask].any())


def test_steps_of_zero_have_no_derivative() -> None:
    with pytest.raises(ValueError, match="needs a final_step_size above 0"):
        solve(Net(), rand(2, 5, seed=1), rand(2, 3, seed=2), 0.5, "free", method=Joint(step_size=0))


def test_a_loose_solution_warns() -> None:
    """Four free directions in six dimensions: the optimum is not unique."""
    model, x = Context(), rand(4, 4, seed=1)
    with pytest.warns(UserWarning, match="relative residual"):
        optimize_input(
            model,
            x,
            lambda y: -y[:, 0].tanh() * 1e-3,
            variables=["context"],
            method=Joint(max_iter=2, step_size=100.0),
            differentiable=Anderson(max_iter=3, tol=1e-9),
        )


def test_a_solver_sets_how_exact_the_gradient_is() -> None:
    target = (3 * rand(2, 3, seed=2)).requires_grad_()
    x, radius = rand(2, 5, seed=1), torch.tensor(0.5)
    gradients, evals = [], []
    for differentiable in (True, Anderson(max_iter=6, tol=1e-2)):
        solution = optimize_input(
            Net(),
            x,
            lambda y: objective(y, target),
            constraint=L2Ball(radius),
            differentiable=differentiable,
        )
        gradients.append(torch.autograd.grad(solution.x.square().sum(), target)[0])
        evals.append(float(solution.stats.implicit.adjoint_evals.max()))
    assert evals[1] < evals[0]
    assert 0 < float((gradients[1] - gradients[0]).norm()) < 0.05 * float(gradients[0].norm())
    with pytest.raises(TypeError, match=r"differentiable must be .* got 'yes'"):
        optimize_input(Net(), x, lambda y: objective(y, target), differentiable="yes")
