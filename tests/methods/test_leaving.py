"""Problems that come to rest in a ball leave the run, and are left out of its evaluations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Equilibrium, Joint, L2Ball, LinfBall, Nested, optimize_input
from jiio_plugins.methods import Backpropagated, Method, relaxed
from jiio_plugins.methods.iteration import JointIteration
from tests.cases import squared
from tests.helpers import TIGHT, CountedCell, linear, rand

BALLS = [L2Ball(0.5), LinfBall(0.1)]


class Net(nn.Module):
    """One layer, whose cell counts the rows of its products."""

    def __init__(self, norm: float = 0.5) -> None:
        super().__init__()
        self.encoder = linear(5, 8, 2)
        self.cell = CountedCell(8, norm, seed=1)
        self.equilibrium = Equilibrium(self.cell, solver=TIGHT)
        self.head = linear(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.encoder(x)))


def up(output: Tensor) -> Tensor:
    return -squared(output)


def run(x: Tensor, ball: Any, model: Net | None = None, **settings: Any) -> Any:
    method = Joint(**{"max_iter": 60, **settings})
    return optimize_input(model or Net(), x, up, method=method, constraint=ball, verify=TIGHT)


@pytest.mark.parametrize("ball", BALLS)
def test_at_rest_is_as_good_as_all_steps_and_costs_less(ball: Any) -> None:
    x = rand(6, 5, seed=4)
    left, whole = run(x, ball), run(x, ball, gap_tol=0.0)
    assert (whole.stats.iterations == 60).all()
    assert (left.stats.iterations < 30).all()
    assert len(left.stats.iterations.unique()) > 1
    assert left.converged.all()
    assert (left.value <= whole.value + 2e-3 * whole.value.abs()).all()
    assert (left.stats.vjps < 0.6 * whole.stats.vjps).all()


def test_a_slow_row_leaves_where_its_last_moves_say_that_it_has_settled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its residuals do not: they are small whatever its errors are."""
    monkeypatch.setattr(relaxed, "_SLOW", -1.0)
    x, ball = rand(6, 5, seed=4), L2Ball(0.5)
    left, whole = run(x, ball), run(x, ball, gap_tol=0.0)
    assert (left.stats.iterations < 60).all()
    assert (left.stats.iterations > 20).all()  # settled so closely no sooner
    assert (left.value <= whole.value + 2e-3 * whole.value.abs()).all()
    everyone = lambda self: torch.ones_like(self.slow)  # noqa: E731
    monkeypatch.setattr(relaxed.Relaxed, "_unsettled", everyone)
    assert (run(x, ball).stats.iterations == 60).all()


@pytest.mark.parametrize("norm", [0.5, 0.95])
@pytest.mark.parametrize("ball", BALLS)
def test_leaving_rows_out_changes_costs_alone(
    norm: float, ball: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, some, every = rand(6, 5, seed=4), Net(norm), Net(norm)
    left = run(x, ball, some)
    monkeypatch.setattr(JointIteration, "_may_leave_out", lambda *_: False)
    held = run(x, ball, every)
    torch.testing.assert_close(left.x, held.x, rtol=0, atol=1e-9)
    torch.testing.assert_close(left.value, held.value, rtol=0, atol=1e-9)
    for name in ("f_evals", "vjps", "iterations"):
        assert torch.equal(getattr(left.stats, name), getattr(held.stats, name))
    assert sum(some.cell.products) < sum(every.cell.products)


@pytest.mark.parametrize("norm", [0.5, 0.95])
def test_a_row_that_leaves_does_not_depend_on_its_batch(norm: float) -> None:
    x = rand(6, 5, seed=4)
    together = run(x, BALLS[0], Net(norm))
    for k in range(6):
        alone = run(x[k : k + 1], BALLS[0], Net(norm))
        torch.testing.assert_close(alone.x[0], together.x[k], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.costate[0], together.costate[k], rtol=0, atol=1e-6)
        assert alone.stats.vjps[0] == together.stats.vjps[k]


def test_a_callback_sees_all_rows() -> None:
    seen: list[Any] = []
    x = rand(6, 5, seed=4)
    optimize_input(Net(), x, up, method=Joint(), constraint=BALLS[0], callback=seen.append)
    for progress in seen:
        assert len(progress.loss) == len(progress.z) == len(progress.gradient) == 6
        assert torch.isfinite(progress.gradient).all()
        assert (progress.gradient != 0).any(1).all()


@pytest.mark.parametrize("method", [Nested(max_iter=40), Backpropagated(max_iter=40)])
def test_what_pgd_does_is_what_it_is_told(method: Method) -> None:
    x = rand(6, 5, seed=4)
    plain, left = (
        optimize_input(Net(), x, up, method=replace(method, gap_tol=g), constraint=BALLS[0])
        for g in (0.0, 1e-3)
    )
    assert (plain.stats.iterations == 40).all()
    assert (left.stats.iterations < 40).all()
    torch.testing.assert_close(left.value, plain.value, rtol=5e-3, atol=0)


class Cached(Net):
    """It cannot be called on some of the rows: it was built for a batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(6, 5))


def test_a_model_that_wants_all_rows_gets_them() -> None:
    x = rand(6, 5, seed=4)
    with pytest.warns(UserWarning, match="cannot be called on some of the rows"):
        left = run(x, BALLS[0], Cached())
    with pytest.warns(UserWarning, match="cannot be called on some of the rows"):
        whole = run(x, BALLS[0], Cached(), gap_tol=0.0)
    assert (left.stats.iterations < 60).any()
    torch.testing.assert_close(left.value, whole.value, rtol=5e-3, atol=0)


def test_gap_tol_is_checked() -> None:
    with pytest.raises(ValueError, match="gap_tol must not be negative, got -1"):
        Joint(gap_tol=-1)
