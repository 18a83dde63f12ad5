"""What every method does: the adjoint, steps on v, an early stop, the callback."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Equilibrium,
    Joint,
    L2Ball,
    LinfBall,
    Nested,
    Solution,
    Unrolled,
    optimize_input,
)
from tests.cases import NETWORKS, Ridge, every_method, every_network, mixed_batch, squared
from tests.helpers import Net, independent_output, rand

if TYPE_CHECKING:
    from collections.abc import Callable


# The adjoint ------------------------------------------------------------------------------------


class Injected(nn.Module):
    """``cell(z, u) + e``: the gradient with respect to e is the adjoint μ."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.e = cell, None
        build = getattr(cell, "initial_state", None)
        if build is not None:
            self.initial_state = build

    def forward(self, z: Any, u: Tensor) -> Any:
        out = self.cell(z, u)
        parts = out if isinstance(out, tuple) else (out,)
        if self.e is None:
            self.e = tuple(torch.zeros_like(p, requires_grad=True) for p in parts)
        moved = tuple(p + e for p, e in zip(parts, self.e, strict=True))
        return moved if isinstance(out, tuple) else moved[0]


def exact_adjoint(model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Any:
    """μ of every layer, by autograd through an unrolled, converged solve."""
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, Equilibrium)]
    for layer in layers:
        layer.adjoint, layer.cell = Unrolled(steps=400), Injected(layer.cell)
    loss = objective(model(x)).sum()
    states = [layer.cell.e for layer in layers]
    grads = torch.autograd.grad(loss, [e for es in states for e in es])
    out, at = [], 0
    for es in states:
        part = tuple(grads[at : at + len(es)])
        out.append(part if len(es) > 1 else part[0])
        at += len(es)
    return out[0] if len(out) == 1 else tuple(out)


@every_network
@pytest.mark.parametrize(
    "method",
    [
        Joint(max_iter=300),
        Joint(max_iter=300, relaxation=1.0, state_steps=1),
        Nested(max_iter=2, solver=Anderson(tol=1e-12, max_iter=200)),
        Nested(max_iter=100, solver=Anderson(tol=1e-12, max_iter=3), warm_start=True),
    ],
    ids=["joint", "paper", "nested", "warm"],
)
def test_the_costate_is_the_adjoint(name: str, method: Any) -> None:
    """With v held still by a ball of radius 0, μ converges to the exact adjoint."""
    model, x = NETWORKS[name](), rand(4, 5, seed=1)
    solution = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.0))
    assert torch.equal(solution.x, x)
    exact = exact_adjoint(model, x, squared)
    torch.testing.assert_close(solution.costate, exact, rtol=1e-6, atol=1e-8)
    assert float(solution.stats.costate_residual.max()) < 1e-7


def test_the_costate_of_an_unbounded_problem_too() -> None:
    """Where v is free and has settled, z, μ and v fulfil their equations together."""
    model, x = Ridge(rate=0.9), rand(3, 6, seed=1)
    method = Joint(max_iter=600, step_size=1 / model.curvature(), tol=1e-11)
    solution = optimize_input(model, x, model.objective(seed=3), method=method)
    exact = exact_adjoint(model, solution.x, model.objective(seed=3))
    torch.testing.assert_close(solution.costate, exact, rtol=1e-5, atol=1e-7)


# stop and callback ------------------------------------------------------------------------------


@every_method
def test_stop_saves_what_is_left(method: Any) -> None:
    model, x, target = Net(seed=1), mixed_batch(16), rand(3, seed=2)

    def objective(y: Tensor) -> Tensor:
        return (y - target).square().sum(1)

    def run(stop: Any) -> Solution:
        return optimize_input(model, x, objective, method=method, constraint=L2Ball(0.5), stop=stop)

    full = run(None)
    easy = run(lambda y: objective(y) < 1e9)
    never = run(lambda y: objective(y) < -1.0)
    assert torch.equal(easy.x, x)  # held from the first evaluation
    assert easy.stats.iterations.tolist() == [4] * 16
    assert bool((easy.stats.vjps < full.stats.vjps).all())
    torch.testing.assert_close(never.x, full.x, rtol=0, atol=1e-12)
    assert never.stats.f_evals.tolist() == full.stats.f_evals.tolist()
    level = float((0.5 * (objective(full.output) + objective(independent_output(model, x)))).mean())
    half = run(lambda y: objective(y) < level)
    hit = half.value < level
    assert bool(hit.any())
    cheaper = half.stats.iterations < full.stats.iterations
    assert bool((half.value[cheaper] < level * 1.05).all())
    assert bool(cheaper.any())


@every_method
def test_callback_sees_every_step(method: Any) -> None:
    model, x = Net(), rand(3, 5, seed=1)
    seen: list[Any] = []
    method = replace(method, gap_tol=0.0)  # none leaves
    solution = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), callback=seen.append
    )
    assert [p.iteration for p in seen] == list(range(method.max_iter))
    assert solution.stats.iterations.tolist() == [method.max_iter] * 3
    assert torch.equal(seen[0].v, x)
    last = seen[-1]
    assert last.v.shape == last.gradient.shape == (3, 5)
    assert last.loss.shape == last.z_residual.shape == (3,)
    assert not last.loss.requires_grad
    assert float(last.loss.sum()) < float(seen[0].loss.sum())


# Arguments --------------------------------------------------------------------------------------


def test_step_sizes_per_problem() -> None:
    model, x = Net(), rand(3, 5, seed=1)
    steps = torch.tensor([0.0, 1.0, 2.0]).double()
    mixed = optimize_input(model, x, squared, method=Joint(step_size=steps), constraint=L2Ball(0.5))
    assert torch.equal(mixed.x[0], x[0])
    for i in (1, 2):
        one = optimize_input(
            model,
            x[i : i + 1],
            squared,
            method=Joint(step_size=float(steps[i])),
            constraint=L2Ball(0.5),
        )
        torch.testing.assert_close(one.x, mixed.x[i : i + 1], rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match=r"step_size must hold one value or one per problem \(3\)"):
        optimize_input(
            model, x, squared, method=Joint(step_size=torch.ones(2)), constraint=L2Ball(0.5)
        )


@pytest.mark.parametrize("make", [Joint, partial(Nested, warm_start=True)])
@pytest.mark.parametrize(("iterations", "first"), [(1, 3.0), (4, 3.0), (12, 2.5), (40, 2.0)])
@pytest.mark.parametrize("ball", [L2Ball, LinfBall])
def test_steps_in_a_ball_fall_from_twice_the_radius_or_more(
    ball: Any, iterations: int, first: float, make: Any
) -> None:
    x = rand(3, 5, seed=1)
    feasible = ball(0.5).bind(x)
    lengths = torch.cat(make(max_iter=iterations).steps(feasible, x), dim=1)
    assert torch.all(lengths[:, 0] == 0.5 * (first if ball is L2Ball else 2.0))
    if iterations > 1:
        assert torch.allclose(lengths[:, -1], x.new_tensor(0.8 / iterations))
        assert bool((lengths.diff(dim=1) < 0).all())
    given = torch.cat(make(max_iter=iterations, step_size=1.5).steps(feasible, x), dim=1)
    assert torch.all(given[:, 0] == 0.75)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Joint(max_iter=0), "max_iter must be at least 1, got 0"),
        (lambda: Nested(warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: Joint(step_size=-1.0), "step_size must be finite and not negative, got -1"),
        (lambda: Joint(final_step_size=math.nan), "final_step_size must be finite and not neg"),
        (lambda: Joint(relaxation=2.0), r"relaxation must be in \(0, 2\), got 2"),
        (lambda: Joint(relaxation=0.0), r"relaxation must be in \(0, 2\), got 0"),
        (lambda: Joint(state_steps=0), "state_steps must be at least 1"),
        (lambda: Joint(adjoint_warmup=-1), "adjoint_warmup must be at least 0, got -1"),
        (lambda: Joint(acceleration=-1), "acceleration must be at least 0, got -1"),
    ],
)
def test_bad_arguments_of_the_methods(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_unknown_keywords_raise() -> None:
    for kind in (Joint, Nested):
        with pytest.raises(TypeError, match="iterations"):
            kind(iterations=3)
