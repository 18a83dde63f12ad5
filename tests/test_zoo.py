"""The models of the benchmark, hardly trained, through the joint mode; and its judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from benchmarks.zoo_models import KINDS, Case, Judge, judge as judge_module, load
from jiio_plugins import Anderson, Joint, L2Ball, Status, optimize_input
from jiio_plugins.joint import layer_mode
from tests.helpers import LinearNet, rand

if TYPE_CHECKING:
    from pathlib import Path

VERIFIED = 1e-5  # residual of a row that is called CONVERGED
SOME = [
    k for k in KINDS if not k.startswith("damped") or k in ("damped-easy-0.1", "damped-hard-2.2")
]


class Residual:
    """Answers with a given state, and notes its residual."""

    def __init__(self, z: Any) -> None:
        self.z = z

    def on_layer(self, layer: Any, f: Any, z0: Any) -> Any:
        z = f.layout.pack(self.z)
        fz = f(z)
        self.residual = (fz - z).norm(dim=1) / fz.norm(dim=1)
        return self.z


@torch.no_grad()
def residual(case: Case, x: Tensor, z: Any) -> Tensor:
    mode = Residual(z)
    with layer_mode(mode):
        case.model(x)
    return mode.residual


@pytest.mark.filterwarnings("ignore::jiio_plugins.ConvergenceWarning")  # after one step, they may
@pytest.mark.parametrize("kind", SOME)
def test_kind(kind: str) -> None:
    case = load(kind, samples=2, steps=1)
    solution = optimize_input(
        case.model,
        case.x,
        case.objective,
        constraint=case.constraint,
        method=Joint(max_iter=8),
        verify=Anderson(max_iter=60, tol=VERIFIED),
    )
    assert case.name == kind
    assert torch.isfinite(solution.x).all()
    assert (solution.x - case.x).flatten(1).norm(dim=1).max() <= case.eps * (1 + 1e-5)
    converged = solution.status == Status.CONVERGED
    assert residual(case, solution.x, solution.z)[converged].le(2 * VERIFIED).all()

    judge = Judge(case, max_iter=30)
    start, end = judge(case.x), judge(solution.x)
    both = converged & start.converged & end.converged
    assert (end.loss >= start.loss - 1e-3 * (1 + start.loss.abs()))[both].all()
    torch.testing.assert_close(-solution.value[both].double(), end.loss[both], rtol=1e-3, atol=1e-3)


def test_damping_keeps_the_fixed_point() -> None:
    one, other = (load(f"damped-hard-{a}", samples=2, steps=1) for a in ("1", "0.3"))
    first, second = (Judge(c)(c.x, gradient=True, radius=True) for c in (one, other))
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.gradient, second.gradient, rtol=1e-2, atol=1e-4)
    assert (second.radius > first.radius).all()


def test_judge_of_a_linear_model() -> None:
    model, x = LinearNet(), rand(4, 20, seed=5)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    case = Case("linear", model, x, lambda out: out @ weights, 1.0, L2Ball(1.0))
    verdict = Judge(case, tol=1e-10)(x, gradient=True, radius=True)
    bias = model.head.bias.detach()
    torch.testing.assert_close(verdict.loss, -(x @ model.matrix().T + bias) @ weights)
    torch.testing.assert_close(verdict.gradient, (weights @ model.matrix()).expand(4, -1))
    expected = torch.linalg.eigvals(model.equilibrium.cell.a).abs().max()
    torch.testing.assert_close(verdict.radius, expected.expand(4), rtol=0.02, atol=0)
    assert verdict.converged.all()
    assert verdict.gradient_converged.all()
    torch.testing.assert_close(verdict.own_loss, verdict.loss, rtol=1e-3, atol=1e-3)
    assert torch.equal(verdict.sure_loss, torch.minimum(verdict.loss, verdict.own_loss))
    assert verdict.right_by_either is None


@pytest.mark.filterwarnings("ignore::jiio_plugins.ConvergenceWarning")
def test_rows_that_are_slow_are_judged_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load("unfolded-pgd", samples=4, steps=1)
    at_once = Judge(case)(case.x, gradient=True, radius=True)
    monkeypatch.setattr(judge_module, "_QUICK", 8)
    quick = Judge(case, max_iter=8)(case.x)
    assert not quick.converged.all()
    in_two = Judge(case)(case.x, gradient=True, radius=True)
    for name in ("loss", "own_loss", "gradient", "radius"):
        one, other = getattr(at_once, name), getattr(in_two, name)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(at_once.converged, in_two.converged)
    assert torch.equal(at_once.gradient_converged, in_two.gradient_converged)


@pytest.mark.filterwarnings("ignore::jiio_plugins.ConvergenceWarning")
def test_an_attack_is_the_same_whether_its_model_was_trained_or_loaded(tmp_path: Path) -> None:
    trained, loaded = (load("unfolded-pgd", samples=2, cache=tmp_path, steps=1) for _ in range(2))
    assert list(tmp_path.iterdir())
    assert torch.equal(trained.x, loaded.x)
