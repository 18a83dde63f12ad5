"""Smooth problems: no iterate is kept that makes a problem's objective worse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from jiio_plugins import Equilibrium, Joint, optimize_input
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Groups, Variable
from jiio_plugins.methods import mixing
from jiio_plugins.methods.mixing import QuasiNewton, Secants
from tests.helpers import TIGHT, Net, PairNet, Series, TanhCell, linear, rand


class Wells(nn.Module):
    """``Σ y⁴ − y²`` of an equilibrium's output: a maximum at 0, saddles, and minima."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = linear(3, 5, seed=1)
        nn.init.zeros_(self.encoder.bias)
        self.equilibrium = Equilibrium(TanhCell(5, 0.5, seed=2), solver=TIGHT)
        self.head = linear(5, 3, seed=3)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(self.equilibrium(self.encoder(x)))


def wells(y: Tensor) -> Tensor:
    return (y**4 - y**2).sum(1)


def hessian_at(model: nn.Module, x: Tensor) -> Tensor:
    def objective(v: Tensor) -> Tensor:
        u, z = model.encoder(v[None]), 0.0
        for _ in range(120):
            z = torch.tanh(z @ model.equilibrium.cell.weight.T + u if torch.is_tensor(z) else u)
        return wells(4 * model.head(z)).sum()

    return torch.autograd.functional.hessian(objective, x)


def test_a_minimum_is_found_where_a_root_finder_finds_saddles() -> None:
    model = Wells()
    x = 0.15 * rand(24, 3, seed=4)  # around the maximum
    solution = optimize_input(model, x, wells, method=Joint(max_iter=400, step_size=0.05, tol=1e-9))
    start = wells(model(x)).detach()
    assert bool((solution.value < start).all())
    for row in solution.x:
        assert float(torch.linalg.eigvalsh(hessian_at(model, row)).min()) > -1e-6


@pytest.mark.parametrize("step", [0.1, 0.4, 2.0])
@pytest.mark.parametrize("kind", ["quasi-newton", "anderson"])
def test_a_step_too_long_is_cut_until_the_state_can_follow(kind: Any, step: float) -> None:
    """The longest is ten times too long for plain descent: v outruns z, and its loss misleads."""
    model, x = Wells(), 0.3 * rand(16, 3, seed=5)
    start = wells(model(x)).detach()
    for iterations in (2, 4, 8, 16, 32, 64 if kind == "quasi-newton" else 200):
        method = Joint(max_iter=iterations, step_size=step, tol=0.0, mixing=kind)
        solution = optimize_input(model, x, wells, method=method)
        assert bool((solution.value <= start + 1e-12).all())
    assert bool((solution.value < start).all())
    # the minima are at -0.75
    if kind == "anderson":
        assert float(solution.value.mean()) < -0.65
    else:
        assert float(solution.value.max()) < -0.74


def test_quasi_newton_steps_are_those_of_bfgs() -> None:
    """On quadratics of which z and w know nothing: against the dense recursion."""
    rows, d = 3, 6
    hessian = rand(rows, d, d, seed=1)
    hessian = hessian @ hessian.mT + 0.5 * torch.eye(d)
    mix = QuasiNewton(memory=20)
    v, idle, alpha = rand(rows, d, seed=2), torch.zeros(rows, 2, 4), 0.05
    one, never = torch.ones(rows, 1, 1), torch.zeros(rows, dtype=torch.bool)
    seen: list[tuple[Tensor, Tensor]] = []
    for _ in range(5):
        r = -alpha * (hessian @ v[:, :, None]).squeeze(2)
        _, moved = mix((idle, v[:, None]), (idle, r[:, None]), one, never)
        moved = moved[:, 0]
        seen.append((v, r))
        pairs = [(v1 - v0, r0 - r1) for (v0, r0), (v1, r1) in itertools.pairwise(seen)]
        if pairs:  # the length may be cut
            assert torch.allclose(normalize(moved - v), normalize(bfgs(pairs, r)))
        v = moved


def bfgs(pairs: list[tuple[Tensor, Tensor]], r: Tensor) -> Tensor:
    """``H r``, H built from ``γ I`` by the update formula; γ = ‖s‖ / ‖y‖ √cos of the last pair."""
    s, y = pairs[-1]
    gamma = (s * y).sum(1).sqrt() * s.norm(dim=1).sqrt() / y.norm(dim=1).pow(1.5)
    eye = torch.eye(s.shape[1])
    h = gamma[:, None, None] * eye
    for s, y in pairs:
        rho = 1 / (s * y).sum(1)[:, None, None]
        left = eye - rho * s[:, :, None] * y[:, None, :]
        h = left @ h @ left.mT + rho * s[:, :, None] * s[:, None, :]
    return (h @ r[:, :, None]).squeeze(2)


def test_state_and_adjoint_follow_a_step_of_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """With linear maps and a full history they arrive where they settle for the new v."""
    monkeypatch.setattr(mixing, "_RIDGE", 1e-13)
    n, d = 5, 3
    a, b = 0.3 * rand(n, n, seed=1), rand(n, d, seed=2)
    secants = Secants(memory=n + d)
    z, v = rand(1, n, seed=3), rand(1, d, seed=4)
    for k in range(n + d):
        z_next, v_next = rand(1, n, seed=10 + k), rand(1, d, seed=30 + k)
        change = z_next - z, v_next - v
        image = change[0] @ a.T + change[1] @ b.T
        z, v = z_next, v_next
        r = z @ a.T + v @ b.T - z
        dv = rand(1, d, seed=50 + k)
        gamma = secants.weights(
            (both(image - change[0]), -change[1][:, None]),
            [both(image)],
            (both(r), dv[:, None]),
            torch.ones(1, 3, dtype=torch.float64),
        )
    arrived = (z + r) - (gamma @ secants.d[0])[:, 0, :n]
    settled = torch.linalg.solve(torch.eye(n) - a, b @ (v + dv).T).T
    assert torch.allclose(arrived, settled, atol=1e-5)


def both(z: Tensor) -> Tensor:
    """Z, and an adjoint of zeros."""
    return torch.stack((z, torch.zeros_like(z)), dim=1)


@pytest.mark.parametrize("index", [None, [0] * 5, [2, 0, 1, 0, 0]])
def test_states_of_a_problem_lie_together(index: list[int] | None) -> None:
    groups = Groups(5, None if index is None else torch.tensor(index))
    z, w = rand(5, 4, seed=1), rand(5, 4, seed=2)
    joined = groups.join(z, w)
    assert len(joined) == groups.problems
    for part, block in zip(groups.part(joined), (z, w), strict=True):
        assert torch.equal(part, block)
    norms = joined.square().sum(2)
    expected = torch.stack([groups.sum(t.square().sum(1)) for t in (z, w)], dim=1)
    torch.testing.assert_close(norms, expected)


def test_rows_that_start_at_one_input_share_the_warm_up() -> None:
    model = Wells()
    x = torch.full((8, 3), 0.2, dtype=torch.float64)
    alone, together = (
        optimize_input(model, rows, wells, method=Joint(max_iter=3)) for rows in (x[:1], x)
    )
    assert torch.allclose(together.x, alone.x.expand(8, 3))
    saved = alone.stats.f_evals - together.stats.f_evals[0]
    assert float(saved) == pytest.approx(5 * 7 / 8)


def test_bad_mixing_is_named() -> None:
    with pytest.raises(ValueError, match="quasi-newton, anderson"):
        Joint(mixing="broyden")  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [Net, PairNet, Series])
def test_the_estimate_of_the_objective_is_exact_to_second_order(network: Any) -> None:
    """``ℓ(f) + μᵀ J_z (f − z)`` at a state and adjoint that are off by ε: the error falls as ε²."""
    x = rand(4, 5, seed=1)
    problem = Problem(Variable(network(), x), lambda y: y.square().sum(1))
    exact = problem.solve(x, TIGHT)
    z, value = exact.z, problem.loss(exact.output)
    w = torch.zeros_like(z)
    for _ in range(200):
        at = problem.linearize(x, z)
        b, _ = at.gradient(problem.loss(at.output))
        w, _ = at.vjp(w + b)
    errors = []
    for eps in (1e-2, 1e-3):
        away, off = z + eps * rand(*z.shape, seed=2), w + eps * rand(*z.shape, seed=3)
        at = problem.linearize(x, away)
        loss = problem.loss(at.output)
        b, _ = at.gradient(loss)
        at.vjp(off + b)
        estimate = loss.detach() + (at.own_jz_mu * (at.fz - away)).sum(1)
        errors.append(float((estimate - value).abs().max()))
    assert errors[1] < 2e-2 * errors[0]


@pytest.mark.parametrize("kind", ["quasi-newton", "anderson"])
def test_under_autocast_the_iterate_keeps_its_precision(kind: Any) -> None:
    model, x = Net(seed=1).float(), rand(6, 5, seed=2).float()
    seen = set()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = optimize_input(
            model,
            x,
            lambda y: y.float().square().sum(1),
            method=Joint(max_iter=12, mixing=kind),
            callback=lambda progress: seen.add(progress.z.dtype),
        )
    assert seen == {torch.float32}
    assert solution.costate is not None
    assert solution.costate.dtype == torch.float32
