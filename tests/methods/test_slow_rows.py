"""Cells that contract slowly or not at all: what `Joint` does in their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Damped, Equilibrium, Joint, L2Ball, Nested, Status, optimize_input
from jiio_plugins.attacks import attack as jiio_attack
from jiio_plugins.data import load_digits
from jiio_plugins.joint import Problem, Variable
from jiio_plugins.methods.inverse import SecantInverse
from jiio_plugins.models import load_pretrained
from tests.cases import squared
from tests.helpers import TIGHT, TanhCell, contraction, linear, rand


class Net(nn.Module):
    """``tanh(W z + u)`` with ‖W‖ = 0.8, damped: the same fixed points whatever the damping."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.encoder = linear(5, 8, 2)
        self.equilibrium = Equilibrium(Damped(TanhCell(8, 0.8, seed=1), a), solver=TIGHT)
        self.head = linear(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.encoder(x)))


def slow_rate(model: nn.Module, x: Tensor) -> Tensor:
    problem = Problem(Variable(model, x), squared)
    return problem.warm_up(problem.v_start, 5).rate


def attack(a: float, **settings: Any) -> Any:
    x = rand(12, 5, seed=4)
    return optimize_input(
        Net(a),
        x,
        lambda y: -squared(y),
        method=Joint(**settings),
        constraint=L2Ball(0.5),
    )


def test_pairs_of_a_linear_map_solve_it() -> None:
    a = contraction(6, 3.0, symmetric=False, seed=1)  # repels plain iteration
    b, z = rand(4, 6, seed=2), rand(4, 6, seed=3)
    inverse, everything = SecantInverse(z, 6), torch.ones(4, dtype=torch.bool)
    for _ in range(40):
        r = z @ a.T + b - z
        if r.norm() < 1e-9:
            break
        move = inverse(r)
        change = move @ a.T - move
        inverse.learn(move, change, torch.zeros(4), everything)
        z = z + move
    solution = torch.linalg.solve(torch.eye(6, dtype=z.dtype) - a, b.T).T
    torch.testing.assert_close(z, solution, rtol=0, atol=1e-6)


def test_a_row_that_stands_still_keeps_its_pairs() -> None:
    z = rand(2, 6, seed=1)
    inverse, first = SecantInverse(z, 2), torch.tensor([True, False])
    inverse.learn(z, -z, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    before = inverse.y[1].clone()
    for seed in range(3):
        inverse.learn(rand(2, 6, seed=seed), rand(2, 6, seed=seed + 9), torch.zeros(2), first)
    assert torch.equal(inverse.y[1], before)


def test_rows_that_turn_slow_on_the_way_do_not_depend_on_their_batch() -> None:
    x, y = load_digits("test")
    model, x, y = load_pretrained("digits").double(), x[:8].double(), y[:8]

    def run(rows: slice) -> Any:
        return jiio_attack(model, x[rows], y[rows], norm=2, eps=2.0, lower=0.0, upper=1.0)

    whole, parts = run(slice(None)), [run(slice(k, k + 3)) for k in range(0, 8, 3)]
    problem = Problem(Variable(model, x), squared)
    slow = problem.warm_up(problem.v_start, 5).rate > 0.6
    assert bool((whole.stats.vjps > 50)[~slow].any())  # some took more VJPs, slow or not at first
    torch.testing.assert_close(torch.cat([p.x for p in parts]), whole.x, rtol=0, atol=1e-9)
    for name in ("f_evals", "vjps"):
        alone = torch.cat([getattr(p.stats, name) for p in parts])
        assert torch.equal(alone, getattr(whole.stats, name))


def test_the_warm_up_tells_slow_rows() -> None:
    x = rand(12, 5, seed=4)
    rates = [slow_rate(Net(a), x).median() for a in (1.0, 0.3, 0.1)]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("a", [0.1, 2.4])
def test_damping_a_cell_does_not_weaken_an_attack(a: float) -> None:
    model, x = Net(1.0), rand(12, 5, seed=4)
    reference = optimize_input(
        model,
        x,
        lambda y: -squared(y),
        method=Nested(max_iter=30, solver=TIGHT),
        constraint=L2Ball(0.5),
    )
    found = attack(a)
    assert float((found.value / reference.value).min()) > 0.97
    assert found.converged.all()


def test_without_control_a_repelling_cell_is_attacked_along_no_gradient() -> None:
    off = attack(2.4, max_state_steps=2)
    on = attack(2.4)
    assert float(on.stats.costate_residual.median()) < 0.1
    assert float(off.stats.costate_residual.median()) > float(on.stats.costate_residual.median())


@pytest.mark.parametrize("name", ["max_state_steps", "max_adjoint_steps"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Joint(**{name: 0})


class TwoFixedPoints(nn.Module):
    """``tanh(3 z + u)``, which has one near 1 and one near -1: a solve from 0 follows u's sign."""

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(3 * z + u)


def test_a_state_at_another_fixed_point_than_the_model_finds_is_a_status() -> None:
    """Pushed down from above, z stays up where the model's own solve is down already."""
    model = nn.Sequential(Equilibrium(TwoFixedPoints(), solver=TIGHT))
    x = torch.full((3, 1), 1.0, dtype=torch.float64)
    states: list[Tensor] = []
    solution = optimize_input(
        model,
        x,
        lambda y: y.sum(1),
        method=Joint(max_iter=20, step_size=0.2, anchors=0),
        constraint=L2Ball(1.6),
        callback=lambda progress: states.append(progress.z),
    )
    assert (states[-1] > 0.9).all()
    assert (solution.z < -0.9).all()
    assert (solution.status == Status.GRADIENT_UNSETTLED).all()


def test_an_anchor_leads_back_to_the_fixed_point_that_the_model_finds() -> None:
    problem = Problem(
        Variable(
            nn.Sequential(Equilibrium(TwoFixedPoints(), solver=TIGHT)),
            torch.full((3, 1), -0.6, dtype=torch.float64),
        ),
        lambda y: y.sum(1),
        L2Ball(0.1),
    )
    iteration: Any = Joint().start(problem)
    iteration.z = torch.full_like(iteration.z, 0.97)  # where a state that came from above is
    iteration.unsure = torch.tensor([True, True, False])
    before = problem.f_evals
    iteration._anchor(problem.v_start, torch.tensor([1.0, 0.0, 1.0]))
    assert float(iteration.z[0]) < -0.9
    assert (iteration.z[1:] == 0.97).all()  # one costs nothing any more, one is sure
    assert ((problem.f_evals > before) == torch.tensor([True, False, False])).all()
