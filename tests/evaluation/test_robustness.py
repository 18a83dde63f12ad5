"""``robust_accuracy``: the worst verified case, its costs, its refusals, what it leaves alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Equilibrium,
    JacobianFree,
    Joint,
    Phantom,
    Picard,
    Unrolled,
    adapt,
)
from jiio_plugins.evaluation import Attack, engine_attack, robust_accuracy
from jiio_plugins.models import load_pretrained
from tests.equilibrium.specimens import ByFunction, iterate
from tests.helpers import Affine, Net, rand

BALL: dict[str, Any] = {"eps": 0.3, "norm": float("inf"), "lower": -2.0, "upper": 2.0}
QUIET: dict[str, Any] = {"audit": 0, "progress": False}


class Threshold(nn.Module):
    """``z = z/2 + x``, so z* = 2x; class 1 where the first entry of x is positive."""

    def __init__(self, solver: Any = None) -> None:
        super().__init__()
        half = 0.5 * torch.eye(2, dtype=torch.float64)
        self.equilibrium = Equilibrium(Affine(half), solver=solver)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = self.equilibrium(x.flatten(1)) * self.scale
        return torch.stack([-z[:, 0], z[:, 0]], dim=1)


X = torch.tensor([[0.1], [0.2], [0.25], [1.0], [-0.1], [0.5]]).double() * torch.tensor([1.0, 0.0])
Y = torch.tensor([1, 1, 1, 1, 1, 1])  # the fifth is wrong as it is


def down_by(size: float, calls: list[int] | None = None, evaluations: int = 0) -> Any:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(x))
        for _ in range(evaluations):
            model(x)
        return x - size * torch.tensor([1.0, 0.0], dtype=x.dtype)

    return attack


def evaluate(attacks: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:
    return robust_accuracy(model or Threshold(), X, Y, attacks, **{**BALL, **QUIET, **kwargs})


def test_worst_case_per_sample() -> None:
    suite = {"weak": down_by(0.15), "wrong way": down_by(-0.3), "strong": down_by(0.3)}
    report = evaluate(suite)
    assert report.correct == (True, True, True, True, False, True)
    assert report.robust == (False, False, False, True, False, True)
    assert report.broken_by == ("weak", "strong", "strong", None, "clean", None)
    assert [a.attacked for a in report.attacks] == [5, 4, 4]
    assert [a.broken for a in report.attacks] == [1, 0, 2]
    assert [a.together.value for a in report.attacks] == pytest.approx([4 / 6, 4 / 6, 2 / 6])
    assert report.attacks[0].alone is not None
    assert report.attacks[0].alone.value == pytest.approx(4 / 6)
    assert [a.alone for a in report.attacks[1:]] == [None, None]
    assert report.clean.value == pytest.approx(5 / 6)
    assert report.accuracy.value == report.model_accuracy.value == pytest.approx(2 / 6)
    assert report.converged_accuracy == report.accuracy
    # unbroken samples keep the image of highest loss, broken ones the one that broke them, the
    # misclassified one itself
    shift = torch.tensor([0.15, 0.3, 0.3, 0.3, 0.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(report.worst[:, 0], X[:, 0] - shift)
    loss = nn.functional.cross_entropy(Threshold()(report.worst), Y, reduction="none")
    torch.testing.assert_close(torch.tensor(report.worst_loss).double(), loss, rtol=1e-3, atol=1e-6)


def test_order_and_skipping_change_no_verdict() -> None:
    suite = {"weak": down_by(0.15), "strong": down_by(0.3)}
    skipped = evaluate(suite)
    whole = evaluate(dict(reversed(suite.items())), skip_broken=False, batch_size=2)
    assert whole.robust == skipped.robust
    assert [a.attacked for a in whole.attacks] == [5, 5]
    assert [a.alone.value for a in whole.attacks] == pytest.approx([2 / 6, 4 / 6])
    assert whole.broken_by[0] == "strong"  # the first of the suite that broke it


def test_batches_and_costs() -> None:
    calls: list[int] = []
    model = Threshold(Picard(max_iter=4, tol=0.0))
    report = evaluate([Attack("three", down_by(0.0, calls, 3))], model, batch_size=2)
    assert calls == [2, 2, 1]
    (line,) = report.attacks
    # three calls of four evaluations a sample, and one each that would carry a graph
    assert (line.f_evals, line.vjps) == (15, 0)
    assert line.seconds > 0

    class Engine:
        __name__ = "JIIO"

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return engine_attack("", Joint(max_iter=6, gap_tol=0.0), "implicit", **BALL).run(
                model, x, y
            )

    (line,) = evaluate([Engine()]).attacks
    assert line.name == "JIIO"
    assert line.vjps == 6 + 3  # of the adjoint's warm-up
    assert line.f_evals > 6


def two_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf).sum(), leaf)
    return x


@pytest.mark.parametrize(
    ("adjoint", "steps"), [(JacobianFree(), 1), (Phantom(steps=3), 3), (Unrolled(steps=7), 7)]
)
def test_a_gradient_through_k_evaluations_is_k_vjps(adjoint: Any, steps: int) -> None:
    model = Threshold()
    model.equilibrium.adjoint = adjoint
    report = evaluate([Attack("two", two_gradients, "own")], model)
    assert report.attacks[0].vjps == 2 * steps
    assert "no VJPs are known" not in str(report)


def test_a_backward_pass_of_the_layers_own_is_told() -> None:
    model: Any = Threshold()
    model.equilibrium = ByFunction(model.equilibrium.cell, iterate)
    suite = [Attack("two", two_gradients, "own"), Attack("none", down_by(0.0), "none")]
    report = evaluate(suite, adapt(model))
    assert [a.vjps for a in report.attacks] == [0, 0]
    assert report.attacks[0].f_evals > 0
    assert "no VJPs are known of two: the model's layers run a backward pass" in str(report)


def test_an_attack_that_has_nothing_left_to_do() -> None:
    report = evaluate(
        {"all": down_by(0.3), "more": down_by(0.3)},
        eps=2.0,
        lower=None,
        upper=None,
        skip_broken=True,
    )
    everything = robust_accuracy(
        Threshold(), X[:1], Y[:1], {"all": down_by(0.3), "more": down_by(0.3)}, **BALL, **QUIET
    )
    assert report.attacks[1].attacked == 2
    assert everything.attacks[1].attacked == 0
    assert everything.attacks[1].loss is None
    assert "–" in str(everything)


def test_known_examples_are_judged_first() -> None:
    small = evaluate({"weak": down_by(0.15)})
    report = evaluate({"strong": down_by(0.3)}, known=small.worst)
    assert report.broken_by == ("known", "strong", "strong", None, "clean", None)
    assert [(a.name, a.attacked) for a in report.attacks] == [("known", 5), ("strong", 4)]
    assert report.attacks[0].f_evals == 0
    with pytest.raises(ValueError, match="shape of x"):
        evaluate({"strong": down_by(0.3)}, known=small.worst[:2])
    with pytest.raises(ValueError, match="'known' left the ball"):
        evaluate({"strong": down_by(0.3)}, known=X - 0.5)


class Truncated(Threshold):
    """Adds what its solver leaves of the way to z*, so that stopping early changes its answer."""

    def __init__(self, evaluations: int, sign: float) -> None:
        super().__init__(Picard(max_iter=evaluations, tol=0.0))
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        z = self.equilibrium(x.flatten(1))
        left = (2 * x.flatten(1) - z)[:, :1]  # 0 at the fixed point
        sign = 2.0 * self.sign
        return torch.cat([-z[:, :1] - sign * left, z[:, :1] + sign * left], dim=1)


def test_broken_takes_both_answers_and_the_report_has_each() -> None:
    # after one evaluation z = x and left = x: the model says sign(x + 2 left) or sign(x − 2 left)
    same, opposite = Truncated(1, 1.0), Truncated(1, -1.0)
    suite = {"strong": down_by(0.3)}
    agreed = evaluate(suite, same)
    assert agreed.accuracy.value == pytest.approx(2 / 6)
    split = evaluate(suite, opposite)
    # its clean answers are the opposite of what the converged solve says
    assert split.model_accuracy.value == pytest.approx(1 / 6)
    assert split.converged_accuracy.value == pytest.approx(2 / 6)
    assert split.agreed_accuracy.value == 1.0  # never are both wrong
    assert split.accuracy == split.model_accuracy
    assert "\nrobust accuracy 16.7 % [3.0, 56.4]; by the model" in str(split)
    kinds = [w.kind for w in split.warnings]
    assert kinds[:2] == ["disagreement", "inexact-solve"]
    assert "disagreement" in [w.kind for w in agreed.warnings]  # the losses are far apart


def test_what_is_not_verified_breaks_nothing() -> None:
    report = evaluate({"strong": down_by(0.3)}, verify=Picard(max_iter=2, tol=1e-6))
    assert report.agreed_accuracy.value == 1.0
    assert report.accuracy == report.model_accuracy
    assert report.accuracy.value == pytest.approx(2 / 6)
    assert report.unverified == 6
    assert "robust accuracy at most 33.3 % [" in str(report)
    assert [w.kind for w in report.warnings] == ["disagreement", "unverified"]
    assert "upper bound" in report.warnings[-1].message
    assert report.tolerance == 1e-6


def returns(value: Any) -> Any:
    return lambda model, x, y: value(x)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda x: x + 0.31, ValueError, r"'bad' left the ball: .* = 0\.31 .*allowed is 0\.3"),
        (lambda x: x * torch.nan, ValueError, "'bad' returned NaN"),
        (lambda x: x[:, :1], ValueError, r"shape it was given, \(5, 2\), got \(5, 1\)"),
        (lambda x: x[:2], ValueError, r"got \(2, 2\)"),
        (lambda x: x.long(), TypeError, "floating-point tensor, got torch.int64"),
        (lambda x: x.numpy(), TypeError, "got ndarray"),
        (lambda x: None, TypeError, "got NoneType"),
    ],
)
def test_attacks_that_are_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate({"bad": returns(value)})


def test_leaving_the_box() -> None:
    with pytest.raises(ValueError, match=r"'bad' left the box \[-0.2, 1.0\]: .* to 1.3"):
        evaluate({"bad": returns(lambda x: x + 0.3)}, lower=-0.2, upper=1.0)
    rounded = evaluate({"rounding": returns(lambda x: x + 1e-16)}, lower=-0.2, upper=1.0)
    assert float(rounded.worst.max()) <= 1.0


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_the_ball_is_that_of_the_norm(norm: float) -> None:
    size = 0.3 / 2 ** (1 / norm)
    evaluate({"inside": returns(lambda x: x + size)}, norm=norm)
    with pytest.raises(ValueError, match=f"L{norm:g} norm"):
        evaluate({"outside": returns(lambda x: x + 1.001 * size)}, norm=norm)


def test_an_error_in_an_attack_says_which() -> None:
    def fails(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("inner")

    with pytest.raises(RuntimeError, match="inner") as caught:
        evaluate({"fails": fails}, batch_size=2)
    assert caught.value.__notes__ == ["raised by the attack 'fails', images 0 … 1"]
    with pytest.raises(RuntimeError, match="inner"):
        evaluate({"fails": fails, "fails too": fails}, known=X)


def test_a_suite_goes_on_where_an_attack_raises_and_says_so() -> None:
    """What was found before stays, that of its own first batches too."""
    batches: list[int] = []

    def fails(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        batches.append(len(x))
        if len(batches) > 1:
            raise RuntimeError("out of memory\nand more")
        return x - 0.15 * torch.tensor([1.0, 0.0], dtype=x.dtype)

    suite = {"wrong way": down_by(-0.3), "fails": fails, "strong": down_by(0.3)}
    words = "'fails' was left out, it raised RuntimeError: out of memory. The accuracy"
    with pytest.warns(UserWarning, match=words):
        report = evaluate(suite, batch_size=2)
    assert [result.name for result in report.attacks] == ["wrong way", "strong"]
    assert report.left_out == {"fails": "it raised RuntimeError: out of memory"}
    assert "left out (fails): it raised RuntimeError: out of memory" in str(report)
    assert report.broken_by == ("fails", "strong", "strong", None, "clean", None)
    whole = evaluate({"strong": down_by(0.3)}, batch_size=2)
    assert report.robust == whole.robust


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X * torch.nan}, ValueError, "NaN or Inf"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "holds no images"),
        ({"x": X.long()}, TypeError, "floating point"),
        ({"x": X + 5}, ValueError, "within the box"),
        ({"y": Y.float()}, TypeError, "integer classes"),
        ({"y": Y == 1}, TypeError, "integer classes"),
        ({"y": torch.eye(2)[Y]}, ValueError, "one-hot"),
        ({"y": Y.tolist()}, TypeError, "tensor of classes, got list"),
        ({"y": Y[:3]}, ValueError, r"one class per image \(6,\), got \(3,\)"),
        ({"y": Y + 1}, ValueError, r"labels must be in 0 … 1 .* got 2 … 2"),
        ({"y": Y - 2}, ValueError, r"labels must be in 0 … 1"),
        ({"model": nn.Linear(2, 2).double()}, ValueError, "no equilibrium layer"),
        ({"model": lambda x: x}, TypeError, "nn.Module, got function"),
        ({"attacks": []}, ValueError, "attacks is empty"),
        ({"attacks": "JIIO"}, TypeError, "list of attacks"),
        ({"attacks": [down_by(0.1), down_by(0.2)]}, ValueError, "a name of its own"),
        ({"attacks": {"clean": down_by(0.1)}}, ValueError, "a name of its own"),
        ({"attacks": {"a": 3}}, TypeError, "run must be callable"),
        ({"eps": -1.0}, ValueError, "not negative, got -1"),
        ({"eps": float("nan")}, ValueError, "finite"),
        ({"norm": 3}, ValueError, "norm must be 1, 2 or inf, got 3"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"audit": -1}, ValueError, "audit not negative"),
        ({"verify": 1e-5}, TypeError, "verify must be Anderson"),
        ({"lower": torch.zeros(6, 2)}, ValueError, "broadcast over the batch"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = change.get("model", Threshold())
    arguments = {"x": X, "y": Y, "attacks": {"a": down_by(0.1)}, **BALL, **QUIET, **change}
    arguments.pop("model", None)
    with pytest.raises(error, match=message):
        robust_accuracy(model, **arguments)


def test_gradient_kinds_are_checked() -> None:
    with pytest.raises(ValueError, match="gradient must be one of implicit, own"):
        Attack("a", down_by(0.1), "exact")


def test_nothing_of_the_callers_is_changed() -> None:
    class WithBuffers(Net):
        def __init__(self) -> None:
            super().__init__(inputs=2, outputs=2)
            self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x))

    model = WithBuffers().train()
    model.head.eval()
    model.encoder.weight.requires_grad_(False)
    model.encoder.bias.grad = torch.full_like(model.encoder.bias, 3.0)
    x, y = rand(12, 2, seed=3).clamp(-1, 1).requires_grad_(), torch.arange(12) % 2

    def rude(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert not any(module.training for module in model.modules())
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - what other libraries do
        model.train()
        model(x)  # moves the batch statistics
        x += 0.01  # its own copy
        return x

    def rude_and_failing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rude(model, x, y)
        raise RuntimeError("on purpose")

    def snapshot() -> list[Any]:
        return [
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            {k: v.clone() for k, v in model.state_dict().items()},
            (model.equilibrium.solver, model.equilibrium.adjoint),
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            x.detach().clone(),
            x.requires_grad,
            y.clone(),
        ]

    before = snapshot()
    robust_accuracy(model, x, y, {"rude": rude}, **BALL, audit=8, progress=False)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="on purpose"):
        robust_accuracy(model, x, y, {"fails": rude_and_failing}, **BALL, **QUIET)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="on purpose"):
        robust_accuracy(model, x, y, {"rude": rude, "fails": rude_and_failing}, **BALL, **QUIET)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)


def test_float32_images_on_the_shipped_classifier() -> None:
    from jiio_plugins.data.classification import load_digits

    x, y = load_digits("test")
    ball: dict[str, Any] = {"eps": 0.5, "norm": 2.0}
    report = robust_accuracy(
        load_pretrained("digits"),
        x[:16],
        y[:16],
        [engine_attack("JIIO", Joint(max_iter=12), "implicit", **ball)],
        verify=Anderson(max_iter=300, tol=1e-5),
        **ball,
        **QUIET,
    )
    assert report.accuracy.value < 0.5 < report.clean.value
    assert report.unverified == 0
    assert report.warnings == ()
    size = (report.worst - x[:16]).flatten(1).norm(dim=1)
    assert float(size.max()) <= 0.5 * (1 + 1e-5)
