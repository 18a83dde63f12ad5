"""Values by independent solves: honest, never worse than the start, with a status for each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jiio_plugins import (
    Anderson,
    Broyden,
    Equilibrium,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    Picard,
    Solution,
    Status,
    attack,
    count_evaluations,
    is_adversarial,
    optimize_input,
)
from jiio_plugins.joint import Problem, Variable
from jiio_plugins.methods import solve
from jiio_plugins.methods.records import Followed
from jiio_plugins.verification import Judge
from jiio_plugins.verification.results import _led_astray, _random
from tests.cases import (
    CONSTRAINTS,
    METHODS,
    NETWORKS,
    every_combination,
    every_method,
    every_network,
    mixed_batch,
    squared,
    statuses,
)
from tests.helpers import TIGHT, Elementwise, LinearNet, Net, TanhCell, independent_output, rand

# Honest values ----------------------------------------------------------------------------------


@every_combination
def test_value_and_output_are_those_of_an_independent_solve(
    name: str, method: str, constraint: str
) -> None:
    loose = Anderson(tol=3e-2, max_iter=100)
    model, x = NETWORKS[name](seed=2, solver=loose), mixed_batch(16)
    target = rand(3, seed=3)

    def objective(y: Tensor) -> Tensor:
        return (y - target).square().sum(1)

    solution = optimize_input(
        model, x, objective, method=METHODS[method], constraint=CONSTRAINTS[constraint]
    )
    output = independent_output(model, solution.x)
    torch.testing.assert_close(solution.output, output, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(solution.value, objective(output), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        own = model(solution.x)
    torch.testing.assert_close(solution.stats.model_output, own, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(solution.stats.model_value, objective(own), rtol=1e-9, atol=1e-10)
    assert float(solution.stats.z_residual.max()) <= 1e-9
    if CONSTRAINTS[constraint] is not None:
        x = CONSTRAINTS[constraint].bind(x).project(x)  # where it starts
    start = objective(independent_output(model, x))
    assert bool((solution.value <= start * (1 + 1e-6) + 1e-7).all())
    assert not solution.output.requires_grad
    assert not solution.x.requires_grad


def test_the_state_is_that_of_the_tight_solve() -> None:
    for name, make in NETWORKS.items():
        model, x = make(solver=Anderson(tol=1e-2)), rand(3, 5, seed=1)
        solution = optimize_input(model, x, squared, constraint=L2Ball(0.2))
        states: list[Any] = []
        for layer in (m for m in model.modules() if isinstance(m, Equilibrium)):
            layer.register_forward_hook(lambda m, a, out, seen=states: seen.append(out))
        independent_output(model, solution.x)
        expected = states[0] if len(states) == 1 else tuple(states)
        torch.testing.assert_close(solution.z, expected, rtol=1e-6, atol=1e-7, msg=name)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    rate=st.sampled_from([0.3, 0.9, 0.99]),
    step=st.sampled_from([0.01, 1.0, 20.0]),
    steps=st.integers(1, 4),
    warmup=st.integers(1, 3),
    norm=st.sampled_from([L1Ball, L2Ball, LinfBall]),
)
def test_never_worse_than_the_start(
    seed: int, rate: float, step: float, steps: int, warmup: int, norm: Any
) -> None:
    """Slow cells, a step that is far too long, one step only: the start is the fallback."""
    model = LinearNet(inputs=5, n=8, outputs=3, rate=rate, seed=seed)
    x = rand(6, 5, seed=seed + 1)
    target = independent_output(model, x) + 0.05 * rand(6, 3, seed=seed + 2)  # x is nearly optimal

    def objective(y: Tensor) -> Tensor:
        return (y - target).square().sum(1)

    method = Joint(max_iter=steps, step_size=step, warmup=warmup)
    solution = optimize_input(
        model,
        x,
        objective,
        method=method,
        constraint=norm(1.0),
        verify=Anderson(max_iter=500, tol=1e-10),
    )
    start = objective(independent_output(model, x, steps=6000))
    assert bool((solution.value <= start * (1 + 1e-5) + 1e-8).all())


def test_the_adjoint_tells_the_loss_at_the_fixed_point() -> None:
    """Of a linear network and loss, to first order is all, but for what μ is off by."""
    model, x = LinearNet(inputs=5, n=8, outputs=3, rate=0.95, seed=1), rand(6, 5, seed=2)
    exact = independent_output(model, x, steps=2000).sum(1)
    few = Anderson(max_iter=3, tol=1e-12)
    for method, off in (
        (Nested(max_iter=1, solver=few, adjoint_solver=TIGHT), 1e-8),
        (Joint(max_iter=8, warmup=2), torch.inf),
    ):
        problem = Problem(Variable(model, x), lambda y: y.sum(1), L2Ball(1.0))
        result = solve(problem, method)
        error = (result.loss_first - exact).abs()
        assert bool((result.shift_first > 1e-3).all())
        assert bool((error <= off).all())
        assert bool((error <= 20 * result.error_first + 1e-8).all())  # 20 is 1 / (1 - 0.95)


@pytest.mark.parametrize("kind", [Picard, Broyden])
def test_any_verifier(kind: Any) -> None:
    model, x, solver = Net(), rand(4, 5, seed=1), kind(max_iter=500, tol=1e-9)
    usual = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    other = optimize_input(model, x, squared, constraint=L2Ball(0.5), verify=solver)
    torch.testing.assert_close(other.value, usual.value, rtol=1e-7, atol=1e-8)


class Sluggish(nn.Module):
    """``z -> z + d (c(z, u) − z)``: the fixed point of c, approached at the rates ``1 − d``."""

    def __init__(self, d: Tensor, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("d", d)
        self.cell = cell

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return z + self.d * ((u if self.cell is None else self.cell(z, u)) - z)


SLOW = {
    "tanh": Sluggish(torch.full((64,), 0.02).double(), TanhCell(64, 0.8, 2)),
    "spread": Sluggish(torch.logspace(-2, -1, 64).double()),
    "two rates": Sluggish(torch.tensor([0.01] * 8 + [0.5] * 56).double()),
}


@pytest.mark.parametrize("tol", [1e-4, 1e-9])  # the latter is the verification's
@pytest.mark.parametrize(
    "method", [Joint(), Nested(max_iter=4), Nested(max_iter=4, warm_start=True)]
)
@pytest.mark.parametrize("constraint", [None, L2Ball(0.3), LinfBall(0.1)])
@pytest.mark.parametrize("cell", SLOW.values(), ids=SLOW)
def test_no_sample_of_a_slow_cell_is_worse_than_its_start(
    cell: nn.Module, constraint: Any, method: Any, tol: float
) -> None:
    """Its residual says little of how far off the start's running loss is."""
    model = Equilibrium(cell, solver=Anderson(max_iter=500, tol=tol))
    x = rand(8, 64, seed=1)
    with torch.no_grad():
        target = model(x) + 0.01 * rand(8, 64, seed=2)

    def objective(z: Tensor) -> Tensor:
        return (z - target).square().sum(1)

    start = optimize_input(model, x, objective, constraint=L2Ball(0.0)).value
    found = optimize_input(model, x, objective, constraint=constraint, method=method)
    assert bool((found.value <= start * (1 + 1e-5)).all())


# Status -----------------------------------------------------------------------------------------


@every_method
@every_network
def test_radius_zero_is_no_improvement(name: str, method: Any) -> None:
    model, x = NETWORKS[name](), rand(5, 5, seed=1)
    solution = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.0))
    assert torch.equal(solution.x, x)
    assert statuses(solution) == {Status.NO_IMPROVEMENT}
    assert "NO_IMPROVEMENT" in solution.report()


def test_an_unfinished_verification_says_so() -> None:
    model, x = Net(rate=0.95, solver=Anderson(tol=1e-2)), rand(3, 5, seed=1)
    solution = optimize_input(
        model, x, squared, constraint=L2Ball(0.3), verify=Anderson(max_iter=2, tol=1e-12)
    )
    assert statuses(solution) == {Status.NOT_VERIFIED}
    assert "do not trust this value" in solution.report()
    assert float(solution.stats.z_residual.min()) > 1e-12


def test_a_cell_without_a_fixed_point_is_not_verified() -> None:
    model, x = Net(), rand(3, 5, seed=1)
    model.equilibrium = Equilibrium(Elementwise(lambda z, u: z * z + z + 1 + u.square()))
    solution = optimize_input(model, x, squared, constraint=L2Ball(0.3))
    assert statuses(solution) == {Status.NOT_VERIFIED}
    assert bool(torch.isfinite(solution.x).all())


def test_a_loose_layer_disagrees() -> None:
    """The model's own solver stops long before the fixed point."""
    model = LinearNet(inputs=5, n=8, outputs=3, rate=0.95, solver=Picard(max_iter=2, tol=0.0))
    x = rand(4, 5, seed=1)
    solution = optimize_input(model, x, lambda y: -squared(y), constraint=L2Ball(0.3))
    assert statuses(solution) == {Status.DISAGREEMENT}
    with torch.no_grad():
        own = -squared(model(solution.x))
    torch.testing.assert_close(solution.stats.model_value, own)
    assert float((own - solution.value).abs().min()) > 1e-2


def test_disagreement_is_judged_by_the_sample() -> None:
    """Rows whose solve is easy agree; the others do not."""

    class Cell(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return u[:, :1] * z + u

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.equilibrium = Equilibrium(Cell(), solver=Picard(max_iter=12, tol=0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.equilibrium(x)

    x = torch.tensor([[0.1, 1.0, 2.0], [0.95, 1.0, 2.0], [-0.2, 1.0, 0.0]]).double()
    solution = optimize_input(
        Gate(), x, squared, constraint=L2Ball(0.01), verify=Anderson(max_iter=300, tol=1e-9)
    )
    found = [Status(int(s)) for s in solution.status]
    assert found == [Status.CONVERGED, Status.DISAGREEMENT, Status.CONVERGED]


@every_method
def test_an_objective_that_is_nan(method: Any) -> None:
    """For one row: that one says so and stays at its start, the others do not notice."""
    model, x = Net(), rand(4, 5, seed=1)

    def broken(y: Tensor) -> Tensor:
        return squared(y) * torch.tensor([1.0, 1.0, torch.nan, 1.0])

    solution = optimize_input(model, x, broken, method=method, constraint=L2Ball(0.5))
    clean = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.5))
    assert Status(int(solution.status[2])) == Status.NONFINITE
    assert torch.equal(solution.x[2], x[2])
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(solution.x[others], clean.x[others], rtol=0, atol=1e-10)
    assert solution.status[others].tolist() == clean.status[others].tolist()


@every_method
def test_a_cell_that_is_nan(method: Any) -> None:
    """For one row: never a NaN in x, never CONVERGED; the others do not notice."""

    def cell(z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + u) + torch.where(u[:, :1] > 50, torch.nan, 0.0)

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.equilibrium = Equilibrium(Elementwise(cell))

        def forward(self, x: Tensor) -> Tensor:
            return self.equilibrium(x)

    x = rand(4, 5, seed=1)
    x[2, 0] = 100.0
    solution = optimize_input(Direct(), x, squared, method=method, constraint=L2Ball(0.5))
    assert Status(int(solution.status[2])) == Status.NONFINITE
    assert bool(torch.isfinite(solution.x).all())
    others = torch.tensor([0, 1, 3])
    clean = optimize_input(Direct(), x[others], squared, method=method, constraint=L2Ball(0.5))
    torch.testing.assert_close(solution.x[others], clean.x, rtol=0, atol=1e-8)
    assert statuses(clean) == {Status.CONVERGED}
    assert bool((solution.status[others] == clean.status).all())


class Noisy(nn.Module):
    """:class:`Net` with noise in one of its parts, also in eval mode."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.net, self.part = Net(solver=Anderson(max_iter=60, tol=1e-8)), part
        cell = self.net.equilibrium.cell
        self.net.equilibrium.cell = Elementwise(lambda z, u: self.noise("cell", cell(z, u)))
        if part == "start":  # z = tanh 3z + u has two fixed points that attract
            self.net.equilibrium.cell = Elementwise(lambda z, u: torch.tanh(3 * z + 0.1 * u))
            self.net.equilibrium.cell.initial_state = torch.randn_like
            self.net.equilibrium.solver = Picard(max_iter=3)

    def noise(self, part: str, t: Tensor) -> Tensor:
        return t + 0.3 * torch.randn_like(t) if part == self.part else t

    def forward(self, x: Tensor) -> Tensor:
        u = self.noise("encoder", self.net.encoder(x))
        z = self.net.equilibrium(u)
        z = nn.functional.dropout(z, 0.3, training=self.part == "dropout")  # of 0 it leaves 0
        return self.noise("head", self.net.head(z))


@pytest.mark.parametrize("part", ["encoder", "cell", "start", "head", "dropout"])
def test_a_model_that_is_random_is_a_status(part: str) -> None:
    def search(model: nn.Module) -> Solution:
        x, method = rand(4, 5, seed=1), Joint(max_iter=5)
        return optimize_input(model, x, squared, method=method, constraint=L2Ball(0.3))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = search(Noisy(part))
    assert statuses(found) == {Status.RANDOM}
    assert "RANDOM: the model gives two answers to two calls" in found.report()
    assert Status.RANDOM not in statuses(search(Noisy("none")))


def test_only_rows_in_doubt_are_called_again_unless_one_is_random() -> None:
    doubtful = torch.tensor([False, True, False, True])

    def asked(model: nn.Module) -> tuple[list[bool], list[float]]:
        problem = Problem(Variable(model, rand(4, 5, seed=1)), squared)
        final = Judge(problem, TIGHT).everything(problem.v_start)
        random, f_evals = _random(problem, final, doubtful)
        return random.tolist(), f_evals.tolist()

    assert asked(Net(solver=TIGHT)) == ([False] * 4, [0, 3, 0, 3])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert asked(Noisy("head")) == ([True] * 4, [3, 6, 3, 6])


# A search along something else than the gradient ------------------------------------------------


def unsettled(model: nn.Module, **settings: Any) -> Solution:
    """One VJP for each adjoint, of a cell that needs many."""
    method = Nested(max_iter=3, solver=TIGHT, adjoint_solver=Anderson(max_iter=1))
    x = rand(4, 5, seed=1)
    return optimize_input(model, x, squared, method=method, constraint=L2Ball(0.3), **settings)


def test_an_adjoint_that_has_not_settled_is_a_status() -> None:
    slow = Net(rate=0.99)
    with torch.no_grad():  # rotations: what an adjoint takes in does not decay
        slow.equilibrium.cell.weight.copy_(0.99 * torch.linalg.qr(rand(8, 8, seed=3)).Q)
        slow.encoder.weight.mul_(0.1)
    solution = unsettled(slow)
    assert statuses(solution) == {Status.GRADIENT_UNSETTLED}
    assert not bool(solution.converged.any())
    assert float(solution.stats.costate_residual.min()) > 0.5
    assert (
        "GRADIENT_UNSETTLED: the value is verified, but where the loop ended" in solution.report()
    )
    assert "adjoint residual: median" in solution.report()
    # what is wrong with the value comes first
    slow.equilibrium.solver = Anderson(max_iter=3)
    assert statuses(unsettled(slow)) == {Status.DISAGREEMENT}
    assert statuses(unsettled(slow, verify=Anderson(max_iter=1))) == {Status.NOT_VERIFIED}


@pytest.mark.parametrize("rate", [0.6, 0.9, 0.97])
def test_a_gradient_in_doubt_is_compared_with_the_exact_one(rate: float) -> None:
    """The residual of μ says little about an angle where the cell rotates."""
    told, products = torch.zeros(2, 2), 0.0
    for seed in range(4):
        model, x, last = Net(seed=seed, rate=rate, solver=TIGHT), rand(16, 5, seed=seed), []
        with torch.no_grad():
            model.equilibrium.cell.weight.copy_(rate * torch.linalg.qr(rand(8, 8, seed=seed)).Q)
        solution = optimize_input(
            model,
            x,
            squared,
            method=Joint(max_iter=20, max_state_steps=2, adjoint_warmup=3, gap_tol=0.0),
            constraint=L2Ball(0.3),
            callback=last.append,
        )
        v = last[-1].v.reshape(x.shape).requires_grad_()
        (exact,) = torch.autograd.grad(squared(model(v)).sum(), v)
        aligned = cosine_similarity(exact, last[-1].gradient) > 0.9
        for row in zip(solution.converged.long(), aligned.long(), strict=True):
            told[row] += 1
        products += float(solution.stats.verification_vjps.sum())
    (_, flagged_right), (wrong, right) = told.tolist()
    assert wrong <= 1
    assert flagged_right <= 4
    assert right >= 56
    assert 0 < products < 64


def test_where_z_lags_the_gradient_that_was_followed_is_compared() -> None:
    """Its adjoint may be right, and what it was followed by wrong all the same."""
    problem = Problem(Variable(Net(solver=TIGHT), rand(4, 5, seed=1)), squared, L2Ball(0.3))
    result = solve(problem, Joint(max_iter=40, gap_tol=0.0))
    assert result.followed is not None
    assert result.followed.near.all()
    final = Judge(problem, TIGHT).everything(result.v)
    opposite = torch.tensor([True, False, True, False])
    near = torch.tensor([True, True, False, False])
    gradient = torch.where(opposite[:, None], -1, 1) * result.followed.gradient
    off, none = torch.full((4,), 0.05), torch.zeros(4, dtype=torch.bool)
    first, lagging = torch.tensor([True, False, False, False]), [True, False, False, False]
    for slow, amplification, expected in (
        (none, 10.0, lagging),  # a residual tells little there
        (first, 3.0, lagging),  # z was settled step by step, since plain steps do not serve
        (none, 3.0, [False] * 4),
    ):
        astray, _, vjps = _led_astray(
            problem,
            replace(result, followed=Followed(gradient, near, slow)),
            final,
            off,
            torch.full((4,), amplification),
        )
        assert (vjps > 0).all()
        assert astray.tolist() == expected


def test_a_slow_row_is_compared_also_where_large_residuals_hide_that_it_is() -> None:
    problem = Problem(Variable(Net(solver=TIGHT), rand(4, 5, seed=1)), squared, L2Ball(0.3))
    slow = torch.tensor([True, False, False, True])
    result = solve(problem, Joint(max_iter=40, gap_tol=0.0))
    assert result.followed is not None
    result = replace(result, followed=result.followed._replace(slow=slow))
    final, off = Judge(problem, TIGHT).everything(result.v), torch.full((4,), 0.05)
    _, _, vjps = _led_astray(problem, result, final, off, torch.full((4,), 0.7))
    assert (vjps > 0).tolist() == slow.tolist()


def test_where_residuals_are_amplified_the_adjoint_is_solved_more_finely() -> None:
    model, x = Net(rate=0.9, solver=TIGHT), rand(4, 5, seed=1)

    def products(amplification: list[float], rows: list[int]) -> list[float]:
        problem = Problem(Variable(model, x[rows]), squared, L2Ball(0.3))
        result = solve(problem, Joint(max_iter=5, gap_tol=0.0))
        result = replace(result, jz_mu=torch.zeros_like(result.jz_mu))
        final = Judge(problem, TIGHT).everything(result.v)
        off = torch.full((len(rows),), 0.05)
        _, _, vjps = _led_astray(problem, result, final, off, torch.tensor(amplification))
        return vjps.tolist()

    every = [0, 1, 2, 3]
    coarse, loose, fine = (products([most] * 4, every) for most in (3.0, 5.0, 50.0))
    assert all(one <= two < three for one, two, three in zip(coarse, loose, fine, strict=True))
    assert sum(coarse) < sum(loose)
    assert products([5.0, 50.0, 3.0, 50.0], every) == [loose[0], fine[1], coarse[2], fine[3]]
    assert products([50.0], [1]) == fine[1:2]


def test_the_last_gradient_counts_where_v_has_hardly_moved_since() -> None:
    problem = Problem(Variable(Net(), rand(4, 5, seed=1)), squared, L2Ball(0.3))
    far = solve(problem, Joint(max_iter=1))  # its step is all of its way
    assert far.followed is not None
    assert not far.followed.near.any()
    assert solve(problem, Nested(max_iter=2)).followed is None


@pytest.mark.parametrize("method", [Joint(max_iter=5), Nested(max_iter=3)])
@pytest.mark.parametrize("constraint", [None, L2Ball(0.3)], ids=["free", "l2"])
def test_a_callback_sees_the_residual_of_the_adjoint(method: Any, constraint: Any) -> None:
    seen: list[Tensor] = []
    solution = optimize_input(
        Net(),
        rand(4, 5, seed=1),
        squared,
        method=method,
        constraint=constraint,
        callback=lambda progress: seen.append(progress.mu_residual),
    )
    assert len(seen) == method.max_iter
    assert torch.equal(seen[-1], solution.stats.costate_residual)
    assert statuses(solution) == {Status.CONVERGED}


# Without verification ---------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("constraint", [None, L2Ball(0.3)], ids=["free", "l2"])
def test_verification_can_be_left_out(method: Any, constraint: Any) -> None:
    x = rand(4, 5, seed=1)
    model = Net(solver=Anderson(tol=1e-9))
    with count_evaluations() as counter:
        found = optimize_input(
            model, x, squared, method=method, constraint=constraint, verify=False
        )
    assert statuses(found) == {Status.UNVERIFIED}
    assert "UNVERIFIED: nobody has checked" in str(found)
    assert found.value is None
    assert found.output is None
    assert found.stats.model_value is None
    assert found.stats.verification_f_evals.tolist() == [0.0] * 4
    assert counter.f_evals == float(found.stats.f_evals.sum())
    assert counter.verification_f_evals == 0
    if constraint is not None:
        assert bool(((found.x - x).norm(dim=1) <= 0.3 + 1e-9).all())
    before, after = (squared(independent_output(model, at)) for at in (x, found.x))
    assert bool((after < before).all())
    checked = optimize_input(model, x, squared, method=method, constraint=constraint)
    assert bool((found.stats.f_evals <= checked.stats.f_evals).all())
    torch.testing.assert_close(found.x, checked.x)


def test_a_verification_that_is_left_out_leaves_gradients_and_nan_statuses() -> None:
    x = rand(3, 5, seed=1)
    live = x.clone().requires_grad_()
    ball = L2Ball(0.3)
    found = [
        optimize_input(Net(), live, squared, constraint=ball, differentiable=True, verify=verify)
        for verify in (False, True)
    ]
    gradients = [torch.autograd.grad(s.x.sum(), live)[0] for s in found]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def broken(y: Tensor) -> Tensor:
        return torch.where(torch.arange(3) == 1, torch.nan, squared(y))

    nan = optimize_input(Net(), x, broken, constraint=ball, verify=False)
    assert nan.status.tolist() == [Status.UNVERIFIED, Status.NONFINITE, Status.UNVERIFIED]
    assert bool(torch.isfinite(nan.x).all())


def test_what_needs_a_verification_says_so() -> None:
    x, y = rand(3, 5, seed=1), torch.arange(3)
    ball: dict[str, Any] = {"norm": 2, "eps": 0.3, "verify": False}
    found = attack(Net(), x, y, random_starts=1, **ball)
    assert statuses(found) == {Status.UNVERIFIED}
    with pytest.raises(ValueError, match="found with verify=False, so nobody has checked it"):
        is_adversarial(found, y)
    for more in ({"random_starts": 2}, {"retry": Joint()}):
        with pytest.raises(ValueError, match="verify=False leaves nothing to choose"):
            attack(Net(), x, y, **ball, **more)
    with pytest.raises(TypeError, match="verify must be Anderson"):
        optimize_input(Net(), x, squared, verify=0)  # type: ignore[arg-type]
