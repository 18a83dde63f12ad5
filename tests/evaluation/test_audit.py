"""The warnings: each fires where it should, and none for a sound model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Implicit, JacobianFree, Picard
from jiio_plugins.data.classification import load_digits
from jiio_plugins.evaluation import Attack, RobustnessReport, engine_attack, robust_accuracy
from jiio_plugins.evaluation.audit import passive
from jiio_plugins.methods.joint import Joint
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import map_leaves
from jiio_plugins.verification import Verdict


def digits(images: int) -> tuple[Tensor, Tensor]:
    x, y = load_digits("test")
    return x[:images], y[:images]


def evaluate(
    model: nn.Module, images: int = 20, eps: float = 0.3, audit: int = 20
) -> RobustnessReport:
    x, y = digits(images)
    jiio = engine_attack("JIIO", Joint(max_iter=12), "implicit", eps=eps, norm=2)
    return robust_accuracy(model, x, y, [jiio], eps=eps, norm=2, audit=audit, progress=False)


def kinds(report: RobustnessReport) -> set[str]:
    return {w.kind for w in report.warnings}


def test_a_sound_model_is_not_suspected() -> None:
    report = evaluate(load_pretrained("digits"))
    assert report.warnings == ()
    checks = report.checks
    assert checks["disagreement"] == 0
    assert checks["own_residual_max"] < 2e-4
    assert checks["gradient_cosine_median"] > 0.999
    losses = list(checks["loss_by_steps"].values())
    assert losses == sorted(losses)
    assert checks["accuracy_at_large_eps"] == 0
    exact = checks["loss_by_gradient"]["exact"]
    assert checks["loss_by_gradient"]["own"] == pytest.approx(exact, rel=0.02)
    assert checks["loss_by_gradient"]["unrolled"] == pytest.approx(exact, rel=0.1)


class NoisyCell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.initial_state = cell, cell.initial_state

    def forward(self, z: Any, *injection: Tensor) -> Any:
        return map_leaves(self.cell(z, *injection), Tensor, lambda t: t + torch.rand_like(t))


@pytest.mark.filterwarnings("ignore:the adjoint of an equilibrium layer has not settled")
def test_a_random_model_is_not_told_to_be_solved_more_tightly() -> None:
    model: Any = load_pretrained("digits")
    model.equilibrium.cell = NoisyCell(model.equilibrium.cell)
    model.equilibrium.solver = short = Anderson(max_iter=5)
    x, y = digits(8)
    state, nothing = torch.get_rng_state(), {"nothing": lambda model, x, y: x}
    report = robust_accuracy(model, x, y, nothing, eps=0.3, norm=2, verify=short, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert kinds(report) == {"random"}
    assert "Take what is random out of it" in str(report)
    assert "max_iter" not in str(report)
    assert report.checks["random"]
    assert report.checks["unconverged_solves"] > 0  # or what is said were of no use


@pytest.mark.filterwarnings("ignore:the adjoint of an equilibrium layer has not settled")
def test_too_few_solver_iterations_are_caught() -> None:
    model: Any = load_pretrained("digits")
    model.equilibrium.solver = Anderson(max_iter=2)
    report = evaluate(model)
    assert {"disagreement", "inexact-solve", "inexact-gradient", "gradient-kind"} <= kinds(report)
    assert report.checks["own_residual_median"] > 0.05
    assert report.checks["gradient_cosine_median"] < 0.9


@pytest.mark.filterwarnings("ignore:the adjoint of an equilibrium layer has not settled")
@pytest.mark.parametrize("adjoint", [Implicit(solver=Picard(max_iter=1)), JacobianFree()])
def test_an_inexact_backward_pass_is_caught(adjoint: Any) -> None:
    model: Any = load_pretrained("digits")
    model.equilibrium.adjoint = adjoint
    report = evaluate(model)
    assert {"inexact-gradient", "gradient-kind"} <= kinds(report)
    assert not {"disagreement", "inexact-solve", "unverified", "large-eps"} & kinds(report)
    assert "exact gradients" in report.warnings[-1].message


class Flat(torch.autograd.Function):
    """A step function: no gradient leads anywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(16 * x) / 16

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)


class Shattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = load_pretrained("digits")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(Flat.apply(x))
        return logits


def test_gradients_that_lead_nowhere_are_caught() -> None:
    report = evaluate(Shattered(), images=12)
    assert {"inexact-gradient", "steps", "large-eps"} <= kinds(report)
    assert report.checks["accuracy_at_large_eps"] == 1
    assert "only 0 of 12 images" in next(w.message for w in report.warnings if w.kind == "steps")


def verdict(rows: int, broken: int = 0) -> Verdict:
    wrong = torch.arange(rows) < broken
    one = torch.ones(rows)
    return Verdict(wrong, wrong, one > 0, one, one, 1e-5 * one, 1e-5 * one)


def attempt(rows: range, broken: range) -> tuple[Tensor, Tensor]:
    index = torch.tensor(list(rows))
    return index, torch.isin(index, torch.tensor(list(broken)))


def suite(**gradients: str) -> list[Attack]:
    return [Attack(name, lambda model, x, y: x, kind) for name, kind in gradients.items()]


@pytest.mark.parametrize(
    ("kind", "warning"),
    [("unrolled", "gradient-kind"), ("intermediate", "gradient-kind"), ("none", "black-box")],
)
def test_another_kind_that_breaks_more_is_caught(kind: str, warning: str) -> None:
    attacks = suite(pgd="own", other=kind)
    withstood = attempt(range(100), range(40))

    def found(extra: int) -> set[str]:
        other = attempt(range(40, 100), range(40, 40 + extra))
        attempts = {"pgd": withstood, "other": other}
        return {w.kind for w in passive({"clean": verdict(100)}, attacks, attempts)[1]}

    assert found(20) == {warning}
    assert found(2) == set()  # any further attack breaks a few


def test_only_samples_that_both_kinds_were_given_count() -> None:
    attacks = suite(unrolled="unrolled", pgd="own")
    # the unrolled attack came first, and what it broke was never given to the other
    attempts = {
        "unrolled": attempt(range(100), range(50)),
        "pgd": attempt(range(50, 100), range(0)),
    }
    checks, warnings = passive({"clean": verdict(100)}, attacks, attempts)
    assert checks["only_broken_by_gradient-kind"] == [0, 100]
    assert warnings == []


def test_a_few_disagreements_are_noise() -> None:
    one = verdict(100)
    for rows, expected in ((2, set()), (3, {"disagreement"})):
        model_loss = torch.where(torch.arange(100) < rows, 2.0, 1.0)
        history = {"clean": replace(one, model_loss=model_loss)}
        assert {w.kind for w in passive(history, [], {})[1]} == expected


def test_small_or_no_audits() -> None:
    model = load_pretrained("digits")
    assert "skipped" in evaluate(model, audit=4).checks["audit"]
    assert "audited" not in evaluate(model, audit=0).checks
    nothing = evaluate(model, eps=0.0, images=8)
    assert nothing.warnings == ()
    assert nothing.checks["gradient_cosine_median"] > 0.999
    assert math.isclose(nothing.accuracy.value, nothing.clean.value)
