"""Normalised weights are computed once in a run, and nothing of it is left behind."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchdeq
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import jiio_torchdeq  # noqa: F401 (makes known where TorchDEQ computes weights)
from jiio_plugins import Joint, L2Ball, Nested, envelope_loss, joint_solution, optimize_input
from jiio_plugins.joint import guarded
from jiio_plugins.models import load_pretrained
from tests.cases import squared
from tests.helpers import Net, linear, rand

if TYPE_CHECKING:
    from collections.abc import Callable


class LinearCell(nn.Module):
    """``tanh(0.5 W z + u)`` by a module, whose weight may be normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(8, 8, seed=5)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + u)


def net(normalise: Callable[[nn.Module], Any]) -> Net:
    model = Net()
    model.equilibrium.cell = LinearCell()
    normalise(model.equilibrium.cell.linear)
    for _ in range(30):  # the power iterations of a spectral norm
        model(rand(2, 5, seed=9))
    return model.eval()


class TorchDEQNet(nn.Module):
    """The same with weights that TorchDEQ normalises, once a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(lambda _: None)
        torchdeq.apply_norm(self.net.equilibrium, "weight_norm", target_norm=0.6)

    def forward(self, x: Tensor) -> Tensor:
        torchdeq.reset_deq(self)
        return self.net(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: net(parametrizations.weight_norm),
    "spectral norm": lambda: net(parametrizations.spectral_norm),
    "orthogonal": lambda: net(parametrizations.orthogonal),
    "TorchDEQ": lambda: TorchDEQNet().eval(),
}
HOOKS: dict[str, Callable[[], nn.Module]] = {
    "weight norm by a hook": lambda: net(weight_norm),
    "spectral norm by a hook": lambda: net(spectral_norm),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


class Calls(TorchDispatchMode):
    """Counts weight normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += "_weight_norm_interface" in str(func)
        return func(*args, **(kwargs or {}))


def state(model: nn.Module) -> list[Any]:
    """What a module holds, by identity."""
    return [
        (
            name,
            sorted((key, id(value)) for key, value in vars(m).items()),
            [*map(id, m._forward_pre_hooks.values())],
        )
        for name, m in model.named_modules()
    ]


def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jiio_plugins.joint.weights._finders", [])


def test_the_weights_of_a_classifier_are_computed_once() -> None:
    model, x = load_pretrained("digits"), torch.rand(2, 1, 8, 8)
    weights = sum(isinstance(m, parametrize.ParametrizationList) for m in model.modules())
    counts = []
    for steps in (3, 12):
        with Calls() as calls:
            optimize_input(model, x, squared, constraint=L2Ball(0.5), method=Joint(max_iter=steps))
        counts.append(calls.count)
    assert counts == [2 * weights] * 2  # in the loop, and in the verification


@every_model
@pytest.mark.parametrize("method", [Joint(max_iter=6), Nested(max_iter=3)])
def test_results_are_the_same(
    build: Callable[[], nn.Module], method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, model = rand(4, 5, seed=1), build()
    found = optimize_input(model, x, squared, constraint=L2Ball(0.5), method=method)
    unfolded(monkeypatch)
    want = optimize_input(model, x, squared, constraint=L2Ball(0.5), method=method)
    assert torch.equal(found.x, want.x)
    assert torch.equal(found.value, want.value)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*deprecated:FutureWarning")
@pytest.mark.parametrize("build", [*MODELS.values(), *HOOKS.values()], ids=[*MODELS, *HOOKS])
@pytest.mark.parametrize("fault", [False, True])
def test_nothing_is_left_behind(build: Callable[[], nn.Module], fault: bool) -> None:
    model, x = build(), rand(4, 5, seed=1)
    model(x)
    output = model(x)
    before = state(model)

    def callback(progress: Any) -> None:
        if fault and progress.iteration == 2:
            raise RuntimeError("stop")

    try:
        optimize_input(model, x, squared, constraint=L2Ball(0.5), callback=callback)
    except RuntimeError:
        assert fault
    assert state(model) == before
    assert torch.equal(model(x), output)


def test_a_weight_that_changes_is_computed_anew() -> None:
    """In place, by another parameter, or by one that requires a gradient."""
    layer = parametrizations.weight_norm(nn.Linear(3, 3)).eval()
    ways = layer.parametrizations.weight
    with guarded(layer):
        first = layer.weight
        assert layer.weight is first
        with torch.no_grad():
            ways.original0.mul_(2)
        torch.testing.assert_close(layer.weight, 2 * first)
        given = {"parametrizations.weight.original0": 3 * ways.original0}
        got = torch.func.functional_call(layer, given, torch.eye(3))
        torch.testing.assert_close(got - layer.bias, 6 * first.T)
    assert layer.weight.requires_grad
    with guarded(layer):
        other = copy.deepcopy(layer).requires_grad_()
    assert other.weight.requires_grad


def test_what_may_be_another_each_time_is_left_alone() -> None:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight)

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Noise())
    busy = parametrizations.spectral_norm(nn.Linear(3, 3))  # its power iteration goes on
    with guarded(layer), guarded(busy, evaluate=False):
        assert not torch.equal(layer.weight, layer.weight)
        assert busy.weight is not busy.weight


@every_model
def test_gradients_of_the_weights_are_the_same(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a solution and of a training step, after searches whose weights were constants."""
    x, model, ball = rand(4, 5, seed=1), build(), L2Ball(0.3)

    def gradients() -> list[Tensor | None]:
        method = Joint(max_iter=40)
        found = optimize_input(
            model, x, squared, constraint=ball, method=method, differentiable=True
        )
        inner = joint_solution(model, x, squared, constraint=ball)
        loss = found.x.square().sum() + envelope_loss(model, inner, squared).sum()
        return list(torch.autograd.grad(loss, [*model.parameters()], allow_unused=True))

    got = gradients()
    unfolded(monkeypatch)
    torch.testing.assert_close(got, gradients(), rtol=0, atol=0)
    assert all(g is not None for g in got)
