"""Steps of the whole joint iterate, from its history."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from jiio_plugins import Joint, optimize_input
from jiio_plugins.methods import mixing
from jiio_plugins.methods.mixing import QuasiNewton, Secants
from tests.helpers import Net, rand


def test_quasi_newton_steps_are_those_of_bfgs() -> None:
    """On quadratics of which z and J_zᵀμ know nothing: against the dense recursion."""
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
    """``H r``, H built from ``scale · I`` by the update formula; scale is ‖s‖ / ‖y‖ √cos."""
    s, y = pairs[-1]
    scale = (s * y).sum(1).sqrt() * s.norm(dim=1).sqrt() / y.norm(dim=1).pow(1.5)
    eye = torch.eye(s.shape[1])
    h = scale[:, None, None] * eye
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
        moved = change[0] @ a.T + change[1] @ b.T
        z, v = z_next, v_next
        r = z @ a.T + v @ b.T - z
        dv = rand(1, d, seed=50 + k)
        gamma = secants.weights(
            (both(moved - change[0]), -change[1][:, None]),
            [both(moved)],
            (both(r), dv[:, None]),
            torch.ones(1, 3, dtype=torch.float64),
        )
    arrived = (z + r) - (gamma @ secants.d[0])[:, 0, :n]
    settled = torch.linalg.solve(torch.eye(n) - a, b @ (v + dv).T).T
    assert torch.allclose(arrived, settled, atol=1e-5)


def both(z: Tensor) -> Tensor:
    """Z, and an adjoint of zeros."""
    return torch.stack((z, torch.zeros_like(z)), dim=1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_target_that_is_not_finite_has_no_weights(bad: float) -> None:
    """Nor is there one for a difference that is not. The other problem's are as they would be."""

    def weights(target: float | None, difference: float | None) -> Tensor:
        secants = Secants(memory=4)
        for k in range(3):
            y, t = rand(2, 2, 5, seed=k), rand(2, 2, 5, seed=9)
            last = k == 2
            if last and difference is not None:
                y[1, 0, 3] = difference
            if last and target is not None:
                t[1, 1, 2] = target
            squares = torch.ones(2, 3, dtype=torch.float64)
            blocks = y, rand(2, 1, 3, seed=20 + k)
            gamma = secants.weights(blocks, [y], (t, rand(2, 1, 3, seed=30)), squares)
        return gamma

    sound = weights(None, None)
    assert bool((sound != 0).all())
    for found in (weights(bad, None), weights(None, bad)):
        assert torch.equal(found[0], sound[0])
        assert bool((found[1] == 0).all())


def test_bad_mixing_is_named() -> None:
    with pytest.raises(ValueError, match="quasi-newton, anderson"):
        Joint(mixing="broyden")  # type: ignore[arg-type]


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
