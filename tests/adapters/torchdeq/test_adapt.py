"""``jiio_torchdeq.adapt``: TorchDEQ's own layers, with a joint mode."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torchdeq
from torch import Tensor, nn
from torchdeq.core import DEQBase, DEQIndexing, DEQSliced

from jiio_plugins import (
    Anderson,
    Implicit,
    Joint,
    L2Ball,
    Nested,
    Status,
    Unrolled,
    count_evaluations,
    optimize_input,
)
from jiio_plugins.adversarial.step import AdversarialTraining
from jiio_plugins.evaluation import layers_as
from jiio_torchdeq import adapt
from tests.adapters.torchdeq.toys import TIGHT, Net, Ours, objective
from tests.helpers import linear, rand

CORES = pytest.mark.parametrize("core", ["sliced", "indexing"])


# Outside an optimisation ------------------------------------------------------------------------


@CORES
@pytest.mark.parametrize("pair", [False, True])
def test_the_answer_is_the_same_to_the_bit(core: str, pair: bool) -> None:
    net = Net(core=core, pair=pair, f_tol=1e-3, f_max_iter=9).eval()
    x, keys = rand(4, 5, seed=4), list(net.state_dict())
    with torch.no_grad():
        before = net(x)
        assert adapt(net) is net
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    assert isinstance(net.deq, DEQSliced if core == "sliced" else DEQIndexing)
    kind = type(net.deq)
    assert type(adapt(net).deq) is kind


@CORES
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("settings", [{"ift": True}, {"hook_ift": True}, {"grad": 3, "tau": 0.7}])
def test_training_is_as_before_to_the_bit(core: str, pair: bool, settings: dict[str, Any]) -> None:
    x = rand(4, 5, seed=4)

    def gradients(net: nn.Module) -> list[Tensor]:
        net(x).square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    theirs = gradients(Net(core=core, pair=pair, **settings))
    ours = gradients(adapt(Net(core=core, pair=pair, **settings)))
    assert len(theirs) == 5
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_several_states_are_returned_in_training() -> None:
    layer = adapt(torchdeq.get_deq(core="sliced", n_states=3, f_max_iter=30))
    u = rand(2, 4, seed=1)
    z_out, info = layer(lambda z: 0.5 * torch.tanh(z) + u, torch.zeros_like(u))
    assert len(z_out) == 3
    assert len(info["rel_lowest"]) == 2
    assert len(layer.eval()(lambda z: 0.5 * torch.tanh(z) + u, z_star=torch.zeros_like(u))[0]) == 1


@CORES
@pytest.mark.parametrize("pair", [False, True])
def test_in_eval_mode_there_is_the_exact_gradient(core: str, pair: bool) -> None:
    net, x = Net(core=core, pair=pair).eval(), rand(3, 5, seed=4).requires_grad_()
    assert torch.autograd.grad(net(x).sum(), x, allow_unused=True) == (None,)  # as TorchDEQ has it
    adapt(net)
    assert torch.autograd.gradcheck(net, (x,), eps=1e-5, rtol=1e-4, atol=1e-7)
    net(x).square().sum().backward()
    reference = Ours()
    reference(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)


def test_evaluations_and_products_are_counted() -> None:
    net, x = adapt(Net()).eval(), rand(4, 5, seed=4)
    with count_evaluations() as counter:
        net(x).sum().backward()
    assert counter.f_evals == 4 * net.calls > 0
    assert counter.vjps > 4 * 5
    assert 0 < counter.worst_residual <= 1e-11
    net.train()
    net.deq.produce_grad = type(net.deq)(grad=5).produce_grad
    net.calls = 0
    with count_evaluations() as counter:
        net(x).sum().backward()
    assert counter.f_evals == 4 * net.calls
    assert counter.vjps == 4 * 5


def test_small_losses_have_as_good_gradients() -> None:
    net = Net(b_tol=1e-6, b_max_iter=40, b_stop_mode="abs").eval()  # as TorchDEQ has it
    net, x = adapt(net), rand(4, 5, seed=4).requires_grad_()
    (exact,) = torch.autograd.grad(Ours()(x).sum(), x)
    for scale in (1.0, 1e-8):
        (gradient,) = torch.autograd.grad(scale * net(x).sum(), x)
        assert torch.allclose(gradient / scale, exact, rtol=1e-4)


def test_products_are_counted_whichever_part_they_come_through() -> None:
    layer = adapt(torchdeq.get_deq(f_solver="simple_fixed_point_iter", grad=4))
    u = rand(3, 4, seed=1).requires_grad_()

    def func(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(0.3 * a + u), torch.tanh(0.3 * b + a)

    with count_evaluations() as counter:
        z_out, _ = layer(func, (torch.zeros_like(u), torch.zeros_like(u)))
        z_out[-1][1].sum().backward()
    assert counter.vjps == 3 * 4


def test_evaluations_in_another_thread_are_counted() -> None:
    net, x = adapt(Net(ift=True)), rand(4, 5, seed=4)
    with count_evaluations() as counter:
        out = net(x).sum()
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    assert counter.f_evals == 4 * net.calls


def test_nothing_is_kept_alive() -> None:
    class Reassigning(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(x)
            z_out, _ = self.deq(lambda z: self.f(z, x), torch.zeros_like(x))
            x = self.head(z_out[-1])  # which the function holds now
            return x

    for net in (adapt(Reassigning()).eval(), adapt(Reassigning())):
        out = net(rand(4, 5, seed=4))
        out.sum().backward()
        gone = weakref.ref(out)
        del out
        gc.collect()
        assert gone() is None


def test_the_network_may_change_the_state_in_place() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            u = self.encoder(x)
            start = (torch.zeros_like(u), torch.zeros_like(u))

            def func(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
                return self.f(a, u), torch.tanh(0.5 * a + 0.3 * b)

            z_out, _ = self.deq(func, start)
            return self.head(nn.functional.relu(z_out[-1][1].add_(z_out[-1][0]), inplace=True))

    net, x = InPlace().eval(), rand(4, 5, seed=4)
    before = net(x).detach()
    assert torch.equal(adapt(net)(x), before)
    net(x).sum().backward()
    found = optimize_input(net, x, objective, constraint=L2Ball(0.5))
    assert bool((found.status == Status.CONVERGED).all())


def test_a_gradient_of_a_layers_own_stays() -> None:
    class OneStep(DEQSliced):
        def forward(self, func: Any, z_star: Any, **kwargs: Any) -> Any:
            z_out, _ = super().forward(func, z_star, **kwargs)
            return [func(z_out[-1])], None

    u = rand(4, 3, seed=1).requires_grad_()
    layer = adapt(OneStep(**TIGHT)).eval()
    z_out, info = layer(func=lambda z: 0.5 * torch.tanh(z) + u, z_star=torch.zeros_like(u))
    z_out[-1].sum().backward()
    assert info is None
    assert torch.equal(u.grad, torch.ones_like(u))  # of one evaluation


def test_hooks_and_training_mode() -> None:
    net = adapt(Net(hook_ift=True))
    found = optimize_input(
        net, rand(4, 5, seed=4), objective, constraint=L2Ball(0.5), training_mode=True
    )
    assert bool((found.status == Status.CONVERGED).all())
    assert net.deq.training


def test_parts_keep_their_dtype() -> None:
    layer = adapt(torchdeq.get_deq(f_solver="simple_fixed_point_iter")).eval()
    u = rand(3, 4, seed=1).requires_grad_()

    def func(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(0.3 * a + u), torch.tanh(0.3 * b + a.float())

    z_out, _ = layer(func, (torch.zeros_like(u), torch.zeros_like(u).float()))
    assert [t.dtype for t in z_out[-1]] == [torch.float64, torch.float32]
    z_out[-1][1].sum().backward()
    assert u.grad is not None


class Picklable(DEQBase):
    """A layer without functions of its own, which TorchDEQ's have and pickle refuses."""

    def forward(self, func: Any, z_init: Any) -> Any:
        return [self.f_solver(func, z_init, max_iter=30)[0]], {}


def test_pickles_work() -> None:
    u = rand(3, 4, seed=1)
    for layer in (Picklable(), adapt(Picklable())):
        again = pickle.loads(pickle.dumps(layer))
        assert type(again) is type(layer)
        (z,), _ = again(lambda z: 0.5 * torch.tanh(z) + u, torch.zeros_like(u))
        assert torch.allclose(z, 0.5 * torch.tanh(z) + u, atol=1e-3)


def test_copies_work() -> None:
    net = copy.deepcopy(adapt(Net()).eval())
    x = rand(4, 5, seed=4)
    assert torch.equal(net(x), Net().eval()(x))
    assert optimize_input(net, x, objective, constraint=L2Ball(0.5)).report().startswith("4 ×")


# Inside one -------------------------------------------------------------------------------------


@CORES
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("method", [Joint(max_iter=8), Nested(max_iter=5), Nested(warm_start=True)])
def test_it_is_the_optimisation_of_the_same_network(core: str, pair: bool, method: Any) -> None:
    x = rand(6, 5, seed=4)
    net = adapt(Net(core=core, pair=pair))
    calls = net.calls
    found = optimize_input(net, x, objective, constraint=L2Ball(0.5), method=method)
    wanted = optimize_input(Ours(), x, objective, constraint=L2Ball(0.5), method=method)
    assert net.calls > calls
    assert torch.allclose(found.x, wanted.x, atol=1e-7)
    assert torch.allclose(found.value, wanted.value, atol=1e-8)
    assert bool((found.status == Status.CONVERGED).all())
    assert torch.equal(found.stats.vjps, wanted.stats.vjps)
    assert net.training  # as it was


def test_a_solve_that_ends_early_disagrees() -> None:
    net = adapt(Net(f_solver="fixed_point_iter", f_max_iter=1))
    found = optimize_input(net, rand(6, 5, seed=4), objective, constraint=L2Ball(0.5))
    assert Status.DISAGREEMENT in found.status.tolist()


def test_rules_from_outside() -> None:
    net, x = adapt(Net(f_max_iter=3)).eval(), rand(3, 5, seed=4)
    reference = Ours()
    with layers_as(solver=Anderson(max_iter=200, tol=1e-12)):
        assert torch.allclose(net(x), reference(x), atol=1e-10)
        assert net(x).requires_grad
    with layers_as(adjoint=Unrolled(steps=200)):
        assert torch.allclose(net(x), reference(x), atol=1e-10)
    with layers_as(adjoint=Implicit()):  # to the layer's own tolerance, in as many iterations
        assert 1e-6 < float((net(x) - reference(x)).abs().max().detach()) < 0.1


def test_differentiable_results() -> None:
    x = rand(3, 5, seed=4)

    def gradients(net: nn.Module) -> list[Tensor]:
        found = optimize_input(
            net,
            x,
            lambda out: out.square().sum(1),
            differentiable=True,
            constraint=L2Ball(0.3),
            method=Joint(max_iter=60),
        )
        found.x.square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    for ours, theirs in zip(gradients(adapt(Net())), gradients(Ours()), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_normalised_weights(norm: str) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear(6, 6, seed=5)
            torchdeq.apply_norm(self, norm, filter_out=["encoder", "head"], target_norm=0.6)

        def f(self, z: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.linear(z) + u)

        def forward(self, x: Tensor) -> Tensor:
            torchdeq.reset_deq(self)
            return super().forward(x)

    net, x = adapt(Normed()), rand(4, 5, seed=4)
    for _ in range(30):
        net(x)  # the power iterations of the spectral norm
    found = optimize_input(net, x, objective, constraint=L2Ball(0.5))
    assert bool((found.status == Status.CONVERGED).all())
    training = AdversarialTraining(norm=2, eps=0.5, jacobian_weight=0.1)
    for _ in range(2):
        training(net.train(), x, torch.arange(4) % 3).loss.backward()
    assert all(p.grad is not None for p in net.linear.parameters())


def test_a_class_of_the_users_own() -> None:
    class Mine(DEQSliced):
        def forward(self, func: Any, start: Any, *, note: str, **kwargs: Any) -> Any:
            assert note == "kept"
            return super().forward(func, start, **kwargs)

    class Holder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.deq = Mine(**TIGHT)

        def forward(self, x: Tensor) -> Tensor:
            u = self.encoder(x)
            z_out, _ = self.deq(lambda z: self.f(z, u), start=torch.zeros_like(u), note="kept")
            return self.head(z_out[-1])

    x = rand(6, 5, seed=4)
    found = optimize_input(adapt(Holder()), x, objective, constraint=L2Ball(0.5))
    wanted = optimize_input(Ours(), x, objective, constraint=L2Ball(0.5))
    assert torch.allclose(found.value, wanted.value, atol=1e-8)


# Bad input --------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        adapt(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Linear holds no TorchDEQ layer: .*get_deq"):
        adapt(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"jiio_torchdeq\.adapt\(model\)"):
        optimize_input(Net(), rand(4, 5, seed=4), objective)
    u = rand(4, 6, seed=1)
    layer = adapt(torchdeq.get_deq()).eval()
    with pytest.raises(TypeError):
        layer(lambda z: z)
    with (
        layers_as(solver=Anderson()),
        pytest.raises(ValueError, match=r"the output of the cell .* is a tensor of shape \(4, 3\)"),
    ):
        layer(lambda z: z[:, :3], torch.zeros_like(u))
