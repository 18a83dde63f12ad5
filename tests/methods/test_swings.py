"""A v that swings about where it will rest takes shorter steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from jiio_plugins import Joint, L2Ball, LinfBall, attack_objective, optimize_input
from jiio_plugins.data import load_digits
from jiio_plugins.methods import relaxed
from jiio_plugins.methods.swings import overshoot, shortened
from jiio_plugins.models import load_pretrained

if TYPE_CHECKING:
    from jiio_plugins import Constraint
    from jiio_plugins.methods import Progress


def followed(turns: list[Tensor], start: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Where v ends, and its shares 1/κ, if T is ``v -> turn v`` for one turn after another."""
    v = before = start
    known, shares = torch.ones_like(v[:, :1]), []
    for turn in turns:
        whole = torch.einsum("pij,pj->pi", turn, v) - v
        known = overshoot(whole / known, v - before, known)
        v, before = v + whole / known, v
        shares.append(1 / known.squeeze(1))
    return v, shares


def test_a_swing_is_cut_to_the_point_that_it_goes_about() -> None:
    """T turns v round in the first problem, halves it in the second, turns by 90° in the third."""
    eye, start = torch.eye(2), torch.tensor([[1.0, 0.5]]).expand(3, 2)
    turn = torch.stack([-eye, eye / 2, torch.tensor([[0.0, -1.0], [1.0, 0.0]])])
    v, shares = followed([turn] * 4, start)
    assert torch.equal(v[0], torch.zeros(2))
    assert torch.equal(v[1], start[1] / 16)
    assert torch.equal(v[2], start[2])
    assert shares[-1].tolist() == [0.5, 1.0, 1.0]


def test_its_share_has_a_least_and_grows_again() -> None:
    eye = torch.eye(2, dtype=torch.float64)[None]
    _, shares = followed([-9 * eye] * 3 + [0.9 * eye] * 5, torch.ones(1, 2, dtype=torch.float64))
    assert [float(share) for share in shares[:2]] == [1.0, 0.5]
    assert float(shares[-1]) == 1.0


def test_who_stands_still_or_has_no_number_keeps_its_share() -> None:
    move = torch.tensor([[1.0, 1.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, 1.0]])
    last = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [torch.nan, 1.0]])
    known = torch.full((4, 1), 1.5)
    assert torch.equal(overshoot(move, last, known), known)


@pytest.mark.parametrize("step", [0.1, 2.0])
def test_a_shorter_step_goes_its_share_of_the_way_on_a_sphere(step: float) -> None:
    d, radius, known = torch.tensor([1.0, 0.0]), torch.tensor([[0.5]]), torch.tensor([[1.6]])
    whole = torch.tensor([[0.5 * step]], dtype=torch.float64)
    v = 0.5 * torch.tensor([[math.cos(0.01), math.sin(0.01)]], dtype=torch.float64)

    def turned(length: Tensor) -> float:
        end = v + length * d
        return float(torch.atan2(v[0, 1], v[0, 0]) - torch.atan2(end[0, 1], end[0, 0]))

    part = shortened(whole, radius, known)
    assert turned(part) == pytest.approx(turned(whole) / 1.6, rel=1e-3)


def run(constraint: Constraint, **settings: Any) -> tuple[Any, float]:
    """The solution, and how far v has gone in the later half of the run, in units of ε."""
    x, y = (t[:48] for t in load_digits("test"))
    seen: list[Tensor] = []

    def keep(progress: Progress) -> None:
        seen.append(progress.v)

    found = optimize_input(
        load_pretrained("digits").requires_grad_(False),
        x,
        attack_objective("cross-entropy", y),
        constraint=constraint,
        method=Joint(max_iter=30, gap_tol=0.0, **settings),
        callback=keep,
    )
    way = torch.stack(seen[15:]).diff(dim=0).norm(dim=2).sum(0).mean() / 0.5
    return found, float(way)


def test_a_run_on_a_model_goes_a_shorter_way_to_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    found, way = run(L2Ball(0.5))
    monkeypatch.setattr(relaxed, "overshoot", lambda move, last, known: known)
    whole, longer = run(L2Ball(0.5))
    assert way < 0.9 * longer
    assert float(found.stats.f_evals.mean()) < float(whole.stats.f_evals.mean())
    assert float(found.value.mean()) < 0.99 * float(whole.value.mean())  # both are negative


def test_it_is_of_l2_balls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of a gradient do not swing but flip, entry by entry."""
    monkeypatch.setattr(relaxed, "overshoot", None)  # not to be called
    found, _ = run(LinfBall(0.05))
    assert bool(torch.isfinite(found.value).all())
    with pytest.raises(TypeError, match="not callable"):
        run(L2Ball(0.5))


def test_it_belongs_to_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxed, "overshoot", None)
    found, _ = run(L2Ball(0.5), max_state_steps=2)
    assert bool(torch.isfinite(found.value).all())
