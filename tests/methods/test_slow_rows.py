"""Cells that contract slowly or not at all: what `Joint` does in their rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Damped,
    Equilibrium,
    Joint,
    L2Ball,
    Nested,
    Picard,
    Status,
    optimize_input,
)
from jiio_plugins.attacks import attack as jiio_attack
from jiio_plugins.data import load_digits
from jiio_plugins.joint import Problem, Variable
from jiio_plugins.methods import solve
from jiio_plugins.methods.best import BestSoFar
from jiio_plugins.methods.inverse import SecantInverse
from jiio_plugins.methods.records import Evaluation
from jiio_plugins.models import load_pretrained
from jiio_plugins.verification import verified
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


@pytest.mark.parametrize(
    ("lengths", "sigma"), [((3.0, 5.0), 3.0), ((0.2, 5.0), 1.0), ((99.0,), 10.0)]
)
def test_what_no_pair_spans_is_stretched_as_the_least_of_them(
    lengths: tuple[float, ...], sigma: float
) -> None:
    inverse, everything = SecantInverse(torch.zeros(1, 4), 3), torch.ones(1, dtype=torch.bool)
    unit = torch.eye(4)
    r = unit[3:]
    torch.testing.assert_close(inverse(r), r)  # without a pair it is r
    for k, length in enumerate(lengths):
        inverse.learn(length * unit[[k]], -unit[[k]], torch.zeros(1), everything)
    torch.testing.assert_close(inverse(r), sigma * r)
    none = inverse.restrict(torch.tensor([-1]))
    torch.testing.assert_close(none(r), r)
    torch.testing.assert_close(inverse(unit[:1]), lengths[0] * unit[:1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)],
)
def test_only_rounding_is_no_pair(dtype: torch.dtype, precision: torch.dtype | None) -> None:
    """Where a cell contracts slowly all residuals are small, and tell about it nevertheless."""
    z, everything = rand(2, 6, seed=1, dtype=dtype), torch.ones(2, dtype=torch.bool)
    rounding = torch.finfo(precision or dtype).eps
    inverse = SecantInverse(z, 4, precision)
    for share in (1.0, 100.0):
        y = -share * rounding * z
        inverse.learn(0.5 * z, y, z.norm(dim=1), everything)
        assert inverse.count.tolist() == [int(share > 1)] * 2
    torch.testing.assert_close(inverse(y), -0.5 * z, rtol=2e-3, atol=0)


def test_without_a_memory_it_is_the_identity() -> None:
    inverse, r = SecantInverse(torch.zeros(2, 3), 0), rand(2, 3, seed=1)
    inverse.learn(r, r, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert torch.equal(inverse(r), r)


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


def test_the_rate_is_that_of_the_cell_wherever_z_starts() -> None:

    class Near(Damped):
        def initial_state(self, u: Tensor) -> Tensor:
            z = torch.zeros_like(u)
            for _ in range(200):
                z = self.cell(z, u)
            return 1.3 * z

    x, model = rand(12, 5, seed=4), Net(0.1)
    far = slow_rate(model, x)
    model.equilibrium.cell = Near(model.equilibrium.cell.cell, 0.1)
    near = slow_rate(model, x)
    torch.testing.assert_close(near, far, rtol=0.2, atol=0)


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


@pytest.mark.parametrize("seed", [4, 5, 6, 8])
def test_no_step_is_taken_along_a_gradient_of_nothing_settled(seed: int) -> None:
    """A cell that repels is first seen in the first iteration, whose step is the longest."""
    x, values = rand(12, 5, seed=seed), []
    for model, method in ((Net(1.0), Nested(max_iter=30, solver=TIGHT)), (Net(2.4), Joint())):
        found = optimize_input(
            model, x, lambda y: -squared(y), method=method, constraint=L2Ball(0.5)
        )
        values.append(found.value)
    assert float((values[1] / values[0]).min()) > 0.97


def test_a_run_of_one_step_takes_it() -> None:
    found = attack(0.1, max_iter=1, warmup=1)
    assert ((found.x - rand(12, 5, seed=4)).norm(dim=1) > 0.4).any()


def test_only_a_row_that_has_not_settled_is_solved_afresh() -> None:
    """One that has settled at each v has followed its fixed point."""
    for steps, solved in ((60, False), (3, True)):
        most = {"max_state_steps": steps, "max_adjoint_steps": steps}
        costs = [attack(2.4, anchors=anchors, **most).stats.f_evals for anchors in (0, 2)]
        assert bool((costs[0] != costs[1]).any()) == solved


def test_without_control_a_repelling_cell_is_attacked_along_no_gradient() -> None:
    off = attack(2.4, max_state_steps=2)
    on = attack(2.4)
    assert float(on.stats.costate_residual.median()) < 0.1
    assert float(off.stats.costate_residual.median()) > float(on.stats.costate_residual.median())


@pytest.mark.parametrize("name", ["max_state_steps", "max_adjoint_steps"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Joint(**{name: 0})
    with pytest.raises(ValueError, match="anchors"):
        Joint(anchors=-1)


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
    looked, elsewhere = iteration.anchored
    assert looked.tolist() == elsewhere.tolist() == [True, False, False]


@pytest.mark.parametrize("a", [1.0, 0.3, 0.05])
def test_an_anchor_comes_as_near_whatever_the_damping(a: float) -> None:
    """Residuals are a times as large, so that one relative to z would stop too early."""
    model, x = Net(a), rand(12, 5, seed=4)
    problem = Problem(Variable(model, x), squared, L2Ball(0.5))
    iteration: Any = Joint(max_iter=80).start(problem)
    iteration.unsure = torch.ones(12, dtype=torch.bool)
    iteration.z = 10 - iteration.z
    before = problem.f_evals
    iteration._anchor(problem.v_start, torch.ones(12))
    solved = problem.solve(problem.v_start, TIGHT).z
    error = (iteration.z - solved).norm(dim=1) / solved.norm(dim=1)
    assert float(error.max()) < 0.04
    assert float((problem.f_evals - before).max()) <= 15


def test_the_losses_of_another_fixed_point_are_forgotten() -> None:
    """But not those of where z was solved for: the model itself finds them."""
    problem = Problem(
        Variable(nn.Linear(2, 1), rand(3, 2, seed=1, dtype=torch.float32)),
        lambda y: y.sum(1),
        L2Ball(1.0),
    )
    best, none = BestSoFar(problem, None), torch.zeros(3)
    state = torch.zeros(3, 1)

    def update(x: float, loss: list[float], anchored: tuple[Tensor, Tensor] | None = None) -> None:
        at = Evaluation(torch.tensor(loss), None, *[state] * 5, none, state)
        best.update(torch.full((3, 2), x), at, anchored)

    update(1.0, [-5.0, -5.0, -5.0])
    looked, elsewhere = torch.tensor([[True, True, False], [True, False, False]])
    update(2.0, [-1.0, -4.0, -4.0], (looked, elsewhere))
    update(3.0, [-2.0, -3.0, -3.0])
    assert best.loss.tolist() == [-2.0, -5.0, -5.0]
    assert best.v[:, 0].tolist() == [3.0, 1.0, 1.0]
    assert best.loss_sure.tolist() == [-1.0, -4.0, float("inf")]
    assert best.v_sure[:2, 0].tolist() == [2.0, 2.0]


def test_a_surer_iterate_is_judged_where_the_end_is_no_better() -> None:
    """A run that ends at another fixed point is worth what the model finds there."""
    model = nn.Sequential(Equilibrium(TwoFixedPoints(), solver=TIGHT))
    x = torch.full((2, 1), 1.0, dtype=torch.float64)
    problem = Problem(Variable(model, x), lambda y: -y.sum(1), L2Ball(3.0))
    with problem.variable.guarded():
        result = solve(problem, Joint(max_iter=4))
        down, up = torch.full_like(x, -1.5), torch.full_like(x, 1.2)
        claimed = torch.tensor([-1.0, torch.inf], dtype=torch.float64)
        result = replace(result, v=down, v_best=down, v_sure=up, loss_sure=claimed)
        solution, v = verified(problem, result, TIGHT)
    assert v[:, 0].tolist() == [1.2, 1.0]  # without a sure one it is the start
    assert solution.value is not None
    assert (solution.value < -0.9).all()


def test_a_surer_iterate_is_judged_where_the_two_answers_at_the_end_differ() -> None:
    """A value counts as far as both the model and the independent solve promise it."""
    model = nn.Sequential(Equilibrium(TwoFixedPoints(), solver=Picard(max_iter=1)))
    x = torch.full((2, 1), 0.1, dtype=torch.float64)
    problem = Problem(Variable(model, x), lambda y: -y.sum(1), L2Ball(3.0))
    with problem.variable.guarded():
        result = solve(problem, Joint(max_iter=4))
        end, sure = torch.full_like(x, 0.2), torch.full_like(x, 1.2)
        claimed = torch.tensor([-1.0, torch.inf], dtype=torch.float64)
        result = replace(result, v=end, v_best=end, v_sure=sure, loss_sure=claimed)
        solution, v = verified(problem, result, TIGHT)
    assert v[:, 0].tolist() == [1.2, 0.2]
    assert (solution.status == Status.DISAGREEMENT).all()
    own = solution.stats.model_value
    assert own is not None
    torch.testing.assert_close(own, -torch.tanh(v[:, 0]))


class Failing(nn.Module):
    """A cell that repels plain iteration, and now and then fails in marked rows.

    Attributes:
        at: numbers of the evaluations, without a graph or with one, that fail.
        back: whether the backward pass fails instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cell = Damped(TanhCell(8, 0.8, seed=1), 2.4)
        self.at: set[tuple[bool, int]] = set()
        self.back = False
        self.calls = {False: 0, True: 0}

    def forward(self, z: Tensor, u: Tensor, marked: Tensor) -> Tensor:
        out: Tensor = self.cell(z, u)
        live = torch.is_grad_enabled()
        self.calls[live] += 1
        if (live, self.calls[live]) not in self.at:
            return out
        if self.back:
            if out.requires_grad:
                out.register_hook(lambda g: torch.where(marked, torch.nan, g))
            return out
        return torch.where(marked, torch.nan, out)


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = linear(5, 8, 2), linear(8, 3, 3)
        self.equilibrium = Equilibrium(Failing(), solver=TIGHT)

    def forward(self, x: Tensor, marked: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.encoder(x), marked))


def run_failing(at: set[tuple[bool, int]], back: bool = False) -> tuple[Any, dict[bool, int]]:
    model: Any = Marked()
    cell = model.equilibrium.cell
    cell.at, cell.back = at, back
    marked = torch.arange(5)[:, None] == 1
    method = Joint(max_iter=16, gap_tol=0.0)
    problem = Problem(
        Variable(model, rand(5, 5, seed=4), [marked]), lambda y: -squared(y), L2Ball(0.5)
    )
    with problem.variable.guarded():
        return solve(problem, method), cell.calls


@pytest.mark.parametrize("kind", ["state", "evaluation", "backward"])
def test_a_failure_in_a_slow_row_stays_there_and_passes(kind: str) -> None:
    """NaN of an anchor or a mixed step, of the evaluation with its graph, of an adjoint step."""
    sound, calls = run_failing(set())
    live = kind != "state"
    numbers = range(8 if kind == "state" else 2, calls[live], 9 if kind == "state" else 4)
    others = torch.arange(5) != 1
    for number in numbers:
        found, _ = run_failing({(live, number)}, back=kind == "backward")
        for name in ("v", "z", "mu", "loss_last"):
            whole, broken = getattr(sound, name), getattr(found, name)
            torch.testing.assert_close(broken[others], whole[others], rtol=1e-9, atol=1e-9)
            assert torch.isfinite(broken).all(), (name, number)
        assert float(found.loss_last[1]) < 0.9 * float(sound.loss_last[1]), number


def begun() -> Any:
    """An iteration of three rows that all are slow."""
    variable = Variable(
        nn.Sequential(Equilibrium(TwoFixedPoints(), solver=TIGHT)), rand(3, 2, seed=1)
    )
    iteration: Any = Joint().start(Problem(variable, squared, L2Ball(0.1)))
    iteration.slow, iteration.control = torch.ones(3, dtype=torch.bool), True
    return iteration


def test_an_anchor_that_fails_leaves_a_state_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    iteration = begun()
    problem, solve_as_it_is = iteration.problem, Problem.solve

    def failing(self: Problem, *args: Any, **kwargs: Any) -> Any:
        found = solve_as_it_is(self, *args, **kwargs)
        fz = found.fz.clone()
        fz[0], fz[1] = torch.nan, torch.inf
        known = {"amplification": found.amplification, "residual": found.residual}
        return SimpleNamespace(fz=fz, evals=found.evals, **known)

    monkeypatch.setattr(Problem, "solve", failing)
    iteration.unsure = torch.ones(3, dtype=torch.bool)
    before = iteration.z = -iteration.z  # at the other fixed point
    iteration._anchor(problem.v_start, torch.ones(3))
    assert torch.equal(iteration.z[:2], before[:2])
    assert not torch.equal(iteration.z[2], before[2])
    assert torch.isfinite(iteration.jz_mu).all()


def test_an_adjoint_step_that_fails_leaves_what_the_steps_before_it_found() -> None:
    class Failing:
        calls, apart = 0, None

        def vjp(self, mu: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
            self.calls += 1
            jz_mu = 0.9 * mu
            if self.calls == 2:
                jz_mu[0] = torch.nan
            return jz_mu, mu

    iteration, dl_dz = begun(), rand(3, 2, seed=2)
    iteration.jz_mu = rand(3, 2, seed=3)
    iteration.mu = iteration.jz_mu + dl_dz
    first, linearized = 0.9 * iteration.mu, Failing()
    iteration.products(linearized, dl_dz, torch.ones(3))
    assert linearized.calls > 2
    torch.testing.assert_close(iteration.jz_mu_next[0], first[0])  # of no pairs it is the plain one
    assert torch.isfinite(iteration.jz_mu_next).all()


def test_a_row_turns_slow_after_all_that_were_have_left() -> None:
    iteration, dl_dz = begun(), rand(3, 2, seed=2)
    iteration.jz_mu = rand(3, 2, seed=3)
    iteration.mu = iteration.jz_mu + dl_dz

    class Halving:
        def __init__(self, rows: Tensor) -> None:
            self.apart = rows

        def jz_mu_apart(self, mu: Tensor) -> Tensor:
            return 0.5 * mu

        def vjp(self, mu: Tensor) -> tuple[Tensor, Tensor]:
            return 0.5 * mu, mu

    for rows, stay in ((torch.tensor([0]), torch.tensor([1, 2])), (torch.tensor([1]), None)):
        iteration.slow = torch.zeros(len(iteration.z), dtype=torch.bool).index_fill(0, rows, True)
        iteration.products(Halving(rows), dl_dz, torch.ones(len(iteration.z)))
        assert len(iteration.inverse.count) == 1
        if stay is not None:
            iteration.restrict(stay)
            dl_dz = dl_dz[stay]
            assert not len(iteration.inverse.count)


def test_a_pair_of_a_step_that_failed_is_not_taken_in() -> None:
    z, everything = rand(3, 6, seed=1), torch.ones(3, dtype=torch.bool)
    inverse = SecantInverse(z, 4)
    inverse.learn(z, -0.5 * z, torch.zeros(3), everything)
    before, bad = inverse(z), z.clone()
    bad[0], bad[1] = torch.nan, torch.inf
    inverse.learn(bad, z, torch.zeros(3), everything)
    inverse.learn(z, bad, torch.zeros(3), everything)
    assert torch.equal(inverse(z)[:2], before[:2])
    assert inverse.count.tolist() == [1, 1, 3]


class Overflowing(nn.Module):
    """``z/2 + u``, and infinite in marked rows."""

    def forward(self, z: Tensor, u: Tensor, marked: Tensor) -> Tensor:
        return torch.where(marked, torch.inf, z / 2 + u)


def test_a_warm_up_that_overflows_leaves_a_state_where_it_is() -> None:
    model: Any = Marked()
    model.equilibrium.cell = Overflowing()
    x, marked = rand(5, 5, seed=4), torch.arange(5)[:, None] == 1
    problem = Problem(Variable(model, x, [marked]), squared, L2Ball(0.5))
    with problem.variable.guarded():
        warm = problem.warm_up(problem.v_start, 5)
        settled = 2 * model.encoder(x)
    assert bool((warm.z[1] == 0).all())
    others = torch.arange(5) != 1
    torch.testing.assert_close(warm.z[others], settled[others], rtol=0.1, atol=0.1)
