"""What is JIIO's own: its warm-up, its steps on the state, and what acceleration gains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Equilibrium, Joint, L2Ball, Nested, joint_solution, optimize_input
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from tests.cases import Ridge, Wells, squared, wells
from tests.helpers import TIGHT, Elementwise, Net, TanhCell, linear, rand

if TYPE_CHECKING:
    from jiio_plugins.methods import Method


def test_its_warmup_is_a_second_step_at_the_same_state() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    start = Joint(max_iter=1, warmup=2, adjoint_warmup=1)
    found = joint_solution(model, x, squared, method=start, constraint=L2Ball(0.5))
    z = found.flat.z  # after a step with ω = 1.5 from where the adjoint was evaluated
    problem = Problem(Variable(model, x), squared)
    state = problem.warm_up(x, 2).z
    lin = problem.linearize(x, state)
    b = lin.gradient(problem.loss(lin.output))
    assert torch.allclose(z, state + 1.5 * (lin.fz - state))
    assert torch.allclose(found.flat.mu, b + lin.jz_mu(b))
    assert torch.allclose(found.flat.jz_mu, lin.vjp(found.flat.mu)[0])


class Outputs(nn.Module):
    """A tuple with an integer in it, and what the head's weights multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = Net(seed=1).float(), []
        self.head = linear(3, 3, 2).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.net(x))
        self.seen.append(y.dtype)
        return y, y.argmax(1)


@pytest.mark.parametrize("method", [Joint(max_iter=6), Nested(max_iter=2)])
def test_precision_is_that_of_the_loop_alone(method: Method) -> None:
    model, x, losses = Outputs(), rand(4, 5, seed=2).float(), []

    def objective(output: tuple[Tensor, Tensor]) -> Tensor:
        assert output[1].dtype == torch.int64
        losses.append(output[0].dtype)
        return output[0].square().sum(1)

    halved = replace(method, precision=torch.bfloat16)
    found = optimize_input(model, x, objective, constraint=L2Ball(0.5), method=halved)
    assert torch.bfloat16 in model.seen
    assert model.seen[-1] == torch.float32
    assert set(losses) == {torch.float32}
    full = optimize_input(model, x, objective, constraint=L2Ball(0.5), method=method)
    assert torch.allclose(found.value, full.value, rtol=0.05)
    assert not torch.equal(found.x, full.x)
    with pytest.raises(ValueError, match=r"precision must be torch\.bfloat16"):
        Joint(precision=torch.float64)


def test_rows_that_start_at_one_input_share_the_warm_up() -> None:
    model = Wells()
    x = torch.full((8, 3), 0.2, dtype=torch.float64)
    alone, together = (
        optimize_input(model, rows, wells, method=Joint(max_iter=3)) for rows in (x[:1], x)
    )
    assert torch.allclose(together.x, alone.x.expand(8, 3))
    saved = alone.stats.f_evals - together.stats.f_evals[0]
    assert float(saved) == pytest.approx(5 * 7 / 8)


def test_acceleration_pays_where_v_settles() -> None:
    """At the same number of iterations the mixed run is far nearer to the optimum."""
    model, x = Ridge(rho=0.2), rand(3, 6, seed=4)
    answer, step = model.answer(seed=3), 0.5 / model.curvature()
    gaps = [
        (
            optimize_input(
                model,
                x,
                model.objective(seed=3),
                method=Joint(max_iter=40, step_size=step, tol=0.0, acceleration=memory),
            ).x
            - answer
        )
        .norm(dim=1)
        .max()
        for memory in (5, 0)
    ]
    assert float(gaps[0]) < 0.05 * float(gaps[1])


def test_one_state_step_may_be_damped_but_is_not_over_relaxed() -> None:
    model, x = Net(seed=1), rand(6, 5, seed=2)

    def end(state_steps: int, relaxation: float) -> Tensor:
        method = Joint(max_iter=5, state_steps=state_steps, relaxation=relaxation)
        return optimize_input(model, x, squared, method=method, constraint=L2Ball(0.5)).x

    assert torch.equal(end(1, 1.5), end(1, 1.0))
    assert not torch.equal(end(1, 0.5), end(1, 1.0))
    assert not torch.equal(end(2, 1.5), end(2, 1.0))


class Slowly(nn.Module):
    """``z = −0.8 z + x``, which over-relaxed steps leave, then ``z = 0.1 z + 10 z₁``."""

    class Linear(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = rate

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return self.rate * z + u

    def __init__(self) -> None:
        super().__init__()
        self.first = Equilibrium(self.Linear(-0.8))
        self.second = Equilibrium(self.Linear(0.1))
        self.head = linear(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(10 * self.first(x)) / 10)


def test_a_later_layer_does_not_hide_that_an_earlier_one_is_over_relaxed() -> None:
    residuals: list[float] = []
    optimize_input(
        Slowly(),
        rand(8, 5, seed=1),
        squared,
        method=Joint(max_iter=40),
        constraint=L2Ball(0.5),
        callback=lambda progress: residuals.append(float(progress.z_residual.max())),
    )
    assert residuals[-1] < 0.05


class Glitch(torch.autograd.Function):
    """The identity, whose backward pass has NaN in some rows, once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.clone()
        g[ctx.rows] = torch.nan
        return g, None


class Glitching(nn.Module):
    """``tanh(W z + u)``, which in one pass of a loop has NaN for row 2, in f or in ``J_zᵀμ``."""

    def __init__(self, rate: float, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind, self.passes = linear(5, 8, seed=1), kind, 0
        self.cell = TanhCell(8, rate, seed=2)
        self.equilibrium = Equilibrium(Elementwise(self.f), solver=TIGHT)

    def f(self, z: Tensor, u: Tensor) -> Tensor:
        self.passes += z.requires_grad
        rows = [2] if self.passes == 3 and len(z) == 4 else []
        if z.requires_grad and self.kind == "adjoint":
            z = Glitch.apply(z, rows)
        fz = self.cell(z, u)
        if self.kind == "state":
            fz = fz.index_fill(0, torch.tensor(rows, dtype=torch.long), torch.nan)
        return fz

    def forward(self, x: Tensor) -> Tensor:
        return self.equilibrium(self.encoder(x))


@pytest.mark.parametrize("rate", [0.5, 0.97])
@pytest.mark.parametrize("kind", ["state", "adjoint"])
def test_nan_in_one_pass_does_not_stay(kind: str, rate: float) -> None:
    """z and μ go on from what they were: the search ends where it would have without that."""
    x = rand(4, 5, seed=3)
    found, clean = (
        optimize_input(
            Glitching(rate, k), x, squared, method=Joint(max_iter=30), constraint=L2Ball(1.0)
        )
        for k in (kind, "none")
    )
    assert bool((clean.value < 0.8 * squared(Glitching(rate, "none")(x))).all())
    torch.testing.assert_close(found.value, clean.value, rtol=1e-3, atol=1e-6)
    assert found.status.tolist() == clean.status.tolist()
    assert bool(torch.isfinite(found.stats.costate_residual).all())
