"""Around the layer: compile, TorchScript, FX, activation checkpointing, data parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jiio_plugins import Joint, L2Ball, Nested, optimize_input
from jiio_plugins.equilibrium import uncompiled
from tests.cases import squared
from tests.helpers import Net, TanhCell, assert_same, gradients, input_gradient, linear, rand
from tests.joint.test_guard import snapshot


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compile_breaks_the_graph_at_the_layer() -> None:
    torch._dynamo.reset()
    net, x = Net(), rand(2, 5, seed=1)
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-9, atol=1e-9)
    assert_same(
        {"input": input_gradient(compiled, x)}, {"input": input_gradient(net, x)}, rtol=1e-9
    )
    plain = optimize_input(net, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
    fast = optimize_input(compiled, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.value, plain.value, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize("part", ["model", "cell", "objective"])
def test_compiled_code_whose_graph_can_be_walked_once(part: str) -> None:
    """As with the default backend, which is slow to compile: its buffers are given away."""
    torch._dynamo.reset()
    nets = [Net(), Net()]
    for net in nets:
        net.encoder, net.head = (
            nn.Sequential(layer, nn.SiLU(), nn.Softmax(1)) for layer in (net.encoder, net.head)
        )
    net, compiled = nets
    x, options = rand(3, 5, seed=1), {"backend": "aot_eager"}
    objective = squared
    if part == "model":
        compiled = torch.compile(compiled, **options)
    elif part == "objective":
        objective = torch.compile(squared, **options)
    else:
        compiled.equilibrium.cell = torch.compile(compiled.equilibrium.cell, **options)
    expected, got = ({"x": input_gradient(m, x)} for m in (net, compiled))
    assert_same(expected, got, rtol=1e-9)  # compiled by now, with its buffers given away
    for method in (Joint(), Nested())[: 2 if part == "model" else 1]:
        for settings in ({"constraint": L2Ball(0.5)}, {"differentiable": True}):
            plain, found = (
                optimize_input(m, x, loss, method=method, **settings)
                for m, loss in ((net, squared), (compiled, objective))
            )
            torch.testing.assert_close(found.x, plain.x, rtol=1e-6, atol=1e-6)


def test_threads_leave_the_compiler_on() -> None:
    """The block that began first ends first. It must not put back what the other found."""
    torch._dynamo.reset()
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda t: 2 * t, backend=backend)
    one, other = uncompiled(), uncompiled()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert not compiled
    other.__exit__(None, None, None)
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert compiled


def test_compile_with_fullgraph_raises() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Net(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"data-dependent loop|torch\.compiler\.disable"):
        compiled(rand(2, 5, seed=1))


def counting_head() -> nn.Module:
    """A head with buffers that a forward in train mode moves."""
    return nn.Sequential(linear(8, 3, seed=3), nn.BatchNorm1d(3, dtype=torch.float64))


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.(script|freeze)` is deprecated")
def test_frozen_parts_have_no_flag() -> None:
    plain, net, x = Net(), Net(), rand(4, 5, seed=1)
    net.head = torch.jit.freeze(torch.jit.script(net.head.eval()))
    assert not hasattr(net.head, "training")
    one, two = (
        optimize_input(model, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
        for model in (plain, net)
    )
    torch.testing.assert_close(two.x, one.x, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")
@pytest.mark.filterwarnings("ignore:training_mode=True with BatchNorm")
@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace])
@pytest.mark.parametrize("training_mode", [False, True])
def test_generated_parts_are_modules_like_others(make: Any, training_mode: bool) -> None:
    plain, net, x = Net(), Net(), rand(4, 5, seed=1)
    plain.head, net.head = counting_head(), counting_head()
    for owner, part in ((net, "encoder"), (net.equilibrium, "cell"), (net, "head")):
        setattr(owner, part, make(getattr(owner, part)))
    before = snapshot(net, x)
    one, two = (
        optimize_input(
            model,
            x,
            lambda y: y.square().sum(1),
            method=Joint(max_iter=5),
            constraint=L2Ball(0.5),
            training_mode=training_mode,
        )
        for model in (plain, net)
    )
    torch.testing.assert_close(two.x, one.x, rtol=1e-8, atol=1e-10)
    assert snapshot(net, x) == before


class Checkpointed(nn.Module):
    """:class:`Net` with activation checkpointing around one of its parts."""

    def __init__(self, part: str, reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.part, self.reentrant = Net(), part, reentrant

    def _call(self, part: str, *args: Tensor) -> Tensor:
        module = getattr(self.net, part)
        if part != self.part:
            return module(*args)
        return checkpoint(module, *args, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        u = self._call("encoder", x)
        return self._call("head", self._call("equilibrium", u))


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_checkpointing_encoder_or_head_works(part: str) -> None:
    x = rand(3, 5, seed=1)
    wrapped, plain = Checkpointed(part), Net()
    assert_same(
        {"input": input_gradient(wrapped, x)}, {"input": input_gradient(plain, x)}, rtol=1e-9
    )
    one = optimize_input(wrapped, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    two = optimize_input(plain, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    torch.testing.assert_close(one.x, two.x, rtol=1e-9, atol=1e-9)


def test_checkpointing_the_layer_raises_in_joint_mode() -> None:
    x = rand(3, 5, seed=1)
    wrapped = Checkpointed("equilibrium")
    plain = input_gradient(Net(), x)
    torch.testing.assert_close(input_gradient(wrapped, x), plain, rtol=1e-8, atol=1e-10)
    with pytest.raises(RuntimeError, match="activation checkpointing must not wrap the layer"):
        optimize_input(wrapped, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    # and the next optimisation is none the worse for it
    optimize_input(Net(), x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # from the solves
@pytest.mark.parametrize("part", ["encoder", "equilibrium", "head"])
def test_reentrant_checkpointing_is_refused_by_autograd(part: str) -> None:
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimize_input(Checkpointed(part, reentrant=True), rand(3, 5, seed=1), lambda y: y.sum(1))


def test_checkpointing_inside_the_cell_works() -> None:
    class Cell(TanhCell):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return checkpoint(super().forward, z, u, use_reentrant=False)

    net, x = Net(), rand(3, 5, seed=1)
    expected = input_gradient(net, x)
    plain = optimize_input(net, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    net.equilibrium.cell = Cell(8, 0.7, seed=2)
    torch.testing.assert_close(input_gradient(net, x), expected, rtol=1e-8, atol=1e-10)
    again = optimize_input(net, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    torch.testing.assert_close(again.x, plain.x, rtol=1e-9, atol=1e-9)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/sync", rank=0, world_size=1)
    try:
        net, x = Net(), rand(3, 5, seed=1)
        expected = gradients(net, x)
        wrapped = nn.parallel.DistributedDataParallel(net)
        y = wrapped(x)
        ((rand(*y.shape, seed=77) * y).sum() + y.square().sum()).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)
        got = optimize_input(wrapped, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
        plain = optimize_input(net, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
        assert torch.equal(got.x, plain.x)
    finally:
        dist.destroy_process_group()


def test_data_parallel_raises() -> None:
    with pytest.raises(TypeError, match=r"DataParallel.*pass model\.module"):
        optimize_input(nn.DataParallel(Net()), rand(2, 5, seed=1), lambda y: y.sum(1))
