"""Attacks side by side: what is measured, what is refused, what is as strong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Joint, attack
from jiio_plugins.data import load_digits
from jiio_plugins.evaluation import Comparison, Row, engine_attack
from jiio_plugins.evaluation.comparison import SWEEP, cost_at, front
from jiio_plugins.models import load_pretrained


def compare(images: int = 6, norm: float = 2, eps: float = 0.5) -> Comparison:
    x, y = load_digits("test")
    return Comparison(load_pretrained("digits"), x[:images], y[:images], norm=norm, eps=eps)


def unchanged(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x


def test_a_row_measured_again_gets_a_time() -> None:
    comparison = compare()
    jiio = engine_attack("JIIO", Joint(max_iter=8), "implicit", norm=2, eps=0.5)
    row = Row("JIIO, 8", "JIIO")
    found = comparison.measure(row, jiio.run)
    loss, cost = row.loss, row.cost
    comparison.measure(row, jiio.run)
    assert comparison.rows[1:] == [row]
    assert (len(row.all_seconds), row.loss, row.cost) == (2, loss, cost)
    assert found.shape == comparison.x.shape
    assert row.loss > comparison.rows[0].loss
    assert 0 < row.vjps < row.f_evals < 60
    assert row.judge_residual < 1e-2
    assert f" {row.verification:.1f} " in str(comparison)
    assert 10 < row.verification < 100
    assert all(3 < part < 60 for part in comparison.gradient)
    assert comparison.gradients(sum(comparison.gradient)) == 1
    assert f" {comparison.gradients(row.cost + row.verification):.2f} " in str(comparison)


def test_an_attack_without_verification_pays_for_none() -> None:
    comparison, row = compare(images=2), Row("JIIO", "JIIO")

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(model, x, y, norm=2, eps=0.5, lower=0, upper=1, verify=False).x

    comparison.measure(row, run)
    assert row.verification == 0
    assert row.cost > 30


def test_the_judge_is_a_solve_of_its_own() -> None:
    comparison = compare()
    row = Row("nothing", "nothing")
    comparison.measure(row, unchanged)
    clean = comparison.rows[0]
    assert (row.accuracy, row.loss, row.cost) == (clean.accuracy, clean.loss, 0)
    assert 0 < clean.judge_residual <= 1e-5


def test_an_attack_in_place_is_held_against_the_images_as_they_were() -> None:
    comparison = compare(images=2)
    comparison.model.train()
    before = comparison.x.clone()
    with pytest.raises(ValueError, match="the attack 'dark' left the ball"):
        comparison.measure(Row("dark", "dark"), lambda model, x, y: x.mul_(0.0))
    assert torch.equal(comparison.x, before)
    assert comparison.model.training
    assert all(p.requires_grad for p in comparison.model.parameters())


def test_what_is_refused() -> None:
    comparison = compare()
    with pytest.raises(ValueError, match="the attack 'far' left the ball"):
        comparison.measure(Row("far", "far"), lambda model, x, y: 1 - x)
    with pytest.raises(ValueError, match="the attack 'bright' left the box"):
        comparison.measure(Row("bright", "bright"), lambda model, x, y: x + 0.01)
    with pytest.raises(TypeError, match="must return a floating-point tensor, got NoneType"):
        comparison.measure(Row("none", "none"), lambda model, x, y: None)  # type: ignore[arg-type,return-value]
    assert [r.method for r in comparison.rows] == ["clean"]
    with pytest.raises(ValueError, match="x holds no images"):
        compare(images=0)
    with pytest.raises(ValueError, match="norm must be 1, 2 or inf, got 3"):
        compare(norm=3)


def test_the_cheapest_that_is_as_strong(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare()
    pgd = Row("PGD", "PGD", accuracy=0.1, loss=3.0, f_evals=90, vjps=30, seconds=8)
    comparison.rows += [
        Row("weak", "JIIO", accuracy=0.1, loss=2.0, f_evals=5, seconds=1),
        Row("right too often", "JIIO", accuracy=0.2, loss=3.0, f_evals=5, seconds=1),
        Row("dear", "JIIO", accuracy=0.1, loss=4.0, f_evals=40, seconds=3),
        Row("cheap", "JIIO with retry", accuracy=0.1, loss=2.95, f_evals=20, vjps=10, seconds=2),
        pgd,
    ]
    price = comparison.gradients(30)
    prices = {"gradients": price, "gradients, verified": price}
    assert comparison.against(pgd) == {"jiio": "cheap", "f+VJP": 4, "seconds": 4, **prices}
    assert comparison.against(Row("strong", "PGD", loss=9.0)) == {}
    printed = capsys.readouterr().out
    assert "cheap is as strong as [PGD]" in printed
    assert "no JIIO run is as strong as: strong" in printed


def test_of_a_sweep_the_front_is_shown() -> None:
    comparison = compare()
    comparison.rows += [
        Row(name, SWEEP, loss=loss, f_evals=cost)
        for name, loss, cost in (("good", 2.0, 10), ("beaten", 1.0, 20))
    ]
    assert "good" in str(comparison)
    assert "beaten" not in str(comparison)
    record = comparison.to_dict()
    assert [row["method"] for row in record["rows"]] == ["clean"]
    assert [row["method"] for row in record["warm"]] == ["good", "beaten"]
    assert record["torch"] == torch.__version__


def test_fronts() -> None:
    points = [(10, 1.0), (20, 3.0), (30, 2.0), (40, 4.0)]
    rows = [Row("", "", loss=loss, f_evals=cost) for cost, loss in points]
    assert [r.loss for r in front(rows)] == [1.0, 3.0, 4.0]
    assert cost_at(2.0, rows) == 15
    assert cost_at(3.5, rows) == 30
    assert cost_at(0.5, rows) == 10
    assert cost_at(4.1, rows) is None
