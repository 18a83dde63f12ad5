"""``JIIOLearner`` against what learn2learn and its users' loops expect of a learner."""

from __future__ import annotations

import copy
from typing import Any

import learn2learn as l2l
import pytest
import torch
from learn2learn.algorithms.base_learner import BaseLearner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from jiio_learn2learn import JIIOLearner
from jiio_plugins import Anderson, Equilibrium, JacobianFree, count_evaluations
from tests.adapters.learn2learn.toys import Toy, task
from tests.helpers import TIGHT, TanhCell, linear, rand


def learner(**kwargs: Any) -> JIIOLearner:
    settings = {"lr": 1.0, "reg": 0.3, "iters": 200, **kwargs}
    return JIIOLearner(settings.pop("model", None) or Toy(), settings.pop("lr"), **settings)


# The contract -----------------------------------------------------------------------------------


def test_it_is_a_base_learner() -> None:
    model = Toy()
    maml = learner(model=model)
    assert isinstance(maml, BaseLearner)
    assert maml.module is model
    assert maml.context is model.context  # BaseLearner hands unknown attributes on
    assert set(maml.state_dict()) == {f"module.{name}" for name in model.state_dict()}
    maml.load_state_dict(maml.state_dict())
    copy.deepcopy(maml)


@pytest.mark.parametrize("training", [True, False])
def test_clones_keep_the_mode_and_the_settings(training: bool) -> None:
    maml = learner(allow_unused=True).train(training)
    clone = maml.clone(first_order=True)
    assert type(clone) is JIIOLearner
    assert clone.training is training
    assert all(m.training is training for m in clone.modules())
    assert (clone.first_order, maml.first_order) == (True, False)
    assert (clone.allow_unused, clone.allow_nograd) == (True, False)
    x, y, _, _ = task(30)
    clone.adapt(cross_entropy(clone(x), y))
    assert all(m.training is training for m in clone.modules())


def test_a_subclass_clones_to_itself() -> None:
    class Mine(JIIOLearner):
        pass

    assert type(Mine(Toy(), 1.0).clone()) is Mine


def test_forward_is_the_model_at_the_current_v() -> None:
    maml, (x, y, query, _) = learner(), task(30)
    clone = maml.clone()
    assert torch.equal(clone(x), maml.module(x))
    clone.adapt(cross_entropy(clone(x), y))
    moved = copy.deepcopy(maml.module)
    with torch.no_grad():
        moved.context.copy_(clone.context)
    for batch in (query, x):
        torch.testing.assert_close(clone(batch).detach(), moved(batch).detach(), rtol=0, atol=1e-9)


def test_adapt_returns_none_and_leaves_the_original_alone() -> None:
    maml, (x, y, _, _) = learner(), task(30)
    before = {name: t.clone() for name, t in maml.state_dict().items()}
    state = torch.get_rng_state()
    clone = maml.clone()
    assert clone.adapt(cross_entropy(clone(x), y)) is None
    assert torch.equal(state, torch.get_rng_state())
    for name, value in maml.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and p.requires_grad for p in maml.parameters())
    assert not torch.equal(clone.context, maml.context)


# One optimum, by many ways ----------------------------------------------------------------------


def adapted(loss_of: Any, calls: int = 1, **kwargs: Any) -> Tensor:
    clone, (x, y, _, _) = learner(tol=1e-11, **kwargs).clone(), task(30)
    for _ in range(calls):
        clone.adapt(loss_of(clone, x, y))
    return clone.context.detach()


def mean_loss(clone: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(clone(x), y)


def summed_then_divided(clone: Any, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(clone(x), y, reduction="sum")
    loss /= len(x)
    return loss


def closure(clone: Any, x: Tensor, y: Tensor) -> Any:
    return lambda: cross_entropy(clone(x), y)


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("loss_of", [mean_loss, summed_then_divided, closure])
def test_every_form_of_the_loss_gives_the_same_optimum(loss_of: Any, calls: int) -> None:
    v = adapted(loss_of, calls)
    torch.testing.assert_close(v, adapted(mean_loss), rtol=0, atol=1e-9)
    model, (x, y, _, _) = Toy(), task(30)
    v = v.clone().requires_grad_()
    output = torch.func.functional_call(model, {"context": v}, (x,))
    objective = cross_entropy(output, y) + 0.15 * (v - model.context.detach()).square().sum()
    (gradient,) = torch.autograd.grad(objective, v)
    assert float(gradient.norm()) < 1e-8


def test_a_closure_may_use_the_adapted_parameters() -> None:
    def with_decay(clone: Any, x: Tensor, y: Tensor) -> Any:
        v0 = Toy().context.detach()
        return lambda: cross_entropy(clone(x), y) + 0.15 * (clone.context - v0).square().sum()

    expected = adapted(mean_loss)
    torch.testing.assert_close(adapted(with_decay, reg=0.0), expected, rtol=0, atol=1e-9)


def test_several_calls_continue_warm() -> None:
    clone, (x, y, _, _) = learner(iters=8, tol=1e-8).clone(), task(30)
    for _ in range(12):
        clone.adapt(cross_entropy(clone(x), y), first_order=True)
    torch.testing.assert_close(clone.context.detach(), adapted(mean_loss), rtol=0, atol=1e-5)
    with count_evaluations() as counter:
        clone.adapt(cross_entropy(clone(x), y), first_order=True)
    assert counter.vjps / len(x) <= 4


def test_names_in_the_head_and_before_the_cell() -> None:
    """ANIL: only the head; and a bias of the encoder."""
    for names in (("head.weight", "head.bias"), ("encoder.bias",)):
        maml, (x, y, query, query_y) = learner(adapt=names), task(30)
        clone = maml.clone()
        first = cross_entropy(clone(x), y)
        clone.adapt(first)
        assert cross_entropy(clone(x), y).item() < first.item()
        cross_entropy(clone(query), query_y).backward()
        assert all(p.grad is not None for p in maml.parameters() if p is not maml.module.context)


def test_normalised_weights_are_computed_once_unless_they_are_adapted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    compute = parametrizations._WeightNorm.forward
    monkeypatch.setattr(
        parametrizations._WeightNorm, "forward", lambda *a: calls.append(1) or compute(*a)
    )
    plain, model = Toy(), Toy()
    weight_norm(model.encoder)
    x, y, query, query_y = task(30)
    ends = []
    for maml in (learner(model=plain), learner(model=model)):
        clone = maml.clone()
        loss = cross_entropy(clone(x), y)
        calls.clear()
        clone.adapt(loss)
        ends.append(clone.context.detach())
        assert len(calls) < 5
        clone(x)
        assert maml.module is plain or len(calls) > 2  # nothing is left behind
        cross_entropy(clone(query), query_y).backward()
    torch.testing.assert_close(*ends)
    inner = [name for name, _ in model.named_parameters() if name.endswith("original0")]
    assert model.get_parameter(inner[0]).grad is not None
    clone = learner(model=model, adapt=inner).clone()
    loss = cross_entropy(clone(x), y)
    clone.adapt(loss)
    assert cross_entropy(clone(x), y).item() < loss.item()
    assert len(calls) > 10


def test_a_random_parametrisation_keeps_one_mask_too() -> None:
    model = Toy().train()
    register_parametrization(model.encoder, "weight", nn.Dropout(0.4))
    model.head = nn.Sequential(nn.Dropout(0.4), model.head)
    x, y, _, _ = task(30)
    clone = learner(model=model).clone()
    clone.adapt(lambda: cross_entropy(clone(x), y))
    assert float(clone.residuals.joint.max()) < 1e-6


HEAD = ("head.weight", "head.bias")


def slope_of_head(clone: Any, maml: Any, z: Tensor, y: Tensor) -> float:
    """Norm of the task's gradient in the head's parameters, for the features ``z``."""
    v0 = [t.detach() for t in maml.module.head.parameters()]
    v = [t.detach().requires_grad_() for t in (clone.module.head.weight, clone.module.head.bias)]
    loss = cross_entropy(nn.functional.linear(z.detach(), *v), y)
    loss = loss + 0.15 * sum((a - b).square().sum() for a, b in zip(v, v0, strict=True))
    return max(float(g.norm()) for g in torch.autograd.grad(loss, v))


@pytest.mark.parametrize("memory", [0, 10])
@pytest.mark.parametrize("first_order", [False, True])
def test_iterations_on_a_head_alone_cost_no_evaluation_of_f(memory: int, first_order: bool) -> None:
    """The fixed point does not move with the head: it is solved for once."""
    maml = learner(adapt=HEAD, memory=memory, tol=1e-11, first_order=first_order)
    clone, (x, y, query, query_y) = maml.clone(), task(30)
    for _ in range(2):
        loss = cross_entropy(clone(x), y)
        with count_evaluations() as counter:
            clone.adapt(loss)
        assert counter.f_evals <= 3 * len(x)
        assert counter.vjps == 0
        toy = clone.module
        z = toy.equilibrium(toy.encoder(x) + toy.film(toy.context))
        assert slope_of_head(clone, maml, z, y) < 1e-8
    loss.backward()  # its graph is its own
    cross_entropy(clone(query), query_y).backward()
    assert all(p.grad is not None for p in maml.parameters())


def test_a_network_may_change_a_held_state_in_place() -> None:
    class InPlace(Toy):
        def forward(self, x: Tensor) -> Tensor:
            z = self.equilibrium(self.encoder(x) + self.film(self.context))
            z += 0.3
            return self.head(z.relu_())

    maml, (x, y, query, query_y) = learner(model=InPlace(), adapt=HEAD, tol=1e-11), task(30)
    clone = maml.clone()
    clone.adapt(cross_entropy(clone(x), y))
    toy = clone.module
    z = toy.equilibrium(toy.encoder(x) + toy.film(toy.context))
    assert slope_of_head(clone, maml, (z + 0.3).relu(), y) < 1e-8
    cross_entropy(clone(query), query_y).backward()
    assert all(p.grad is not None for p in maml.parameters())


def test_a_head_alone_after_more_than_a_head() -> None:
    class Parts(Toy):
        def forward(self, x: Tensor, head_alone: bool = False) -> Tensor:
            z = self.equilibrium(self.encoder(x) + self.film(self.context))
            return self.head(z.detach() if head_alone else z)

    maml, (x, y, _, _) = (
        learner(model=Parts(), adapt=("context", *HEAD), allow_unused=True),
        task(30),
    )
    clone = maml.clone()
    clone.adapt(cross_entropy(clone(x), y))
    before = clone.context
    clone.adapt(cross_entropy(clone(x, head_alone=True), y))
    assert clone.context is before


def test_the_gradient_of_a_head_alone_is_exact_whatever_the_layer_does() -> None:
    grads = []
    for loose in (False, True):
        model = Toy()
        if loose:
            model.equilibrium.solver = Anderson(max_iter=3, tol=0.1)
            model.equilibrium.adjoint = JacobianFree()
        maml, (x, y, _, _) = learner(model=model, adapt=HEAD, tol=1e-11), task(30)
        clone = maml.clone()
        clone.adapt(cross_entropy(clone(x), y))
        clone.module.head.weight.square().sum().backward()
        grads.append(model.encoder.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=1e-9)


def test_dropout_before_the_layer_keeps_one_mask_where_the_head_alone_is_adapted() -> None:
    class Skip(Toy):
        def forward(self, x: Tensor) -> Tensor:
            u = torch.nn.functional.dropout(self.encoder(x), 0.5, self.training)
            return self.head(self.equilibrium(u + self.film(self.context)) + u)

    seen: list[tuple[Tensor, Tensor]] = []
    model = Skip()
    model.dropout = nn.Dropout(0.5)  # tells the learner
    handle = model.equilibrium.register_forward_hook(
        lambda layer, args, z: seen.append((args[0].detach(), z.detach()))
    )
    clone, (x, y, _, _) = learner(model=model, adapt=HEAD).clone(), task(30)
    loss = cross_entropy(clone(x), y)
    seen.clear()
    clone.adapt(loss)
    handle.remove()
    assert len(seen) > 2
    for u, z in seen:
        assert torch.equal(u, seen[0][0])
        torch.testing.assert_close(model.equilibrium.cell(z, u), z, rtol=0, atol=1e-7)


def test_gradients_reach_support_inputs_and_what_made_them() -> None:
    features = linear(4, 4, seed=1)
    maml, (x, y, query, query_y) = learner(), task(30)
    clone = maml.clone()
    clone.adapt(cross_entropy(clone(features(x)), y))
    cross_entropy(clone(query), query_y).backward()
    assert float(features.weight.grad.norm()) > 1e-6


def test_first_order_is_the_gradient_at_a_constant_v() -> None:
    """learn2learn's test_first_order_adaptation."""
    maml, (x, y, query, query_y) = learner(first_order=True), task(30)
    clone = maml.clone()
    clone.adapt(cross_entropy(clone(x), y))
    reference = copy.deepcopy(maml.module)
    with torch.no_grad():
        reference.context.copy_(clone.context)
    cross_entropy(reference(query), query_y).backward()
    cross_entropy(clone(query), query_y).backward()
    for got, expected in zip(maml.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-9)


# Users' loops -----------------------------------------------------------------------------------


def fast_adapt(clone: Any, seed: int, steps: int, divide: bool) -> tuple[Tensor, float]:
    x, y, query, query_y = task(seed)
    for _ in range(steps):
        error = nn.CrossEntropyLoss()(clone(x), y)
        if divide:
            error /= len(x)
        clone.adapt(error)
    predictions = clone(query)
    error = nn.CrossEntropyLoss()(predictions, query_y)
    if divide:
        error /= len(query)
    correct = (predictions.argmax(dim=1).view(query_y.shape) == query_y).sum().float()
    return error, (correct / query_y.size(0)).item()


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_omniglot_loop_runs_unchanged(steps: int, divide: bool, first_order: bool) -> None:
    maml = learner(first_order=first_order)
    optimizer = torch.optim.Adam(maml.parameters(), 0.01)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        total = 0.0
        for seed in (30, 70):
            error, _ = fast_adapt(maml.clone(), seed, steps, divide)
            error.backward()
            total += error.item()
            fast_adapt(maml.clone(), seed + 1, steps, divide)  # validation, gradients left on
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / 2)
        optimizer.step()
        history.append(total)
    assert history[-1] < history[0]


# learn2learn's own tests ------------------------------------------------------------------------


def test_l2l_clone_module() -> None:
    for first_order in (False, True):
        maml, x = learner(first_order=first_order), rand(7, 4, seed=1)
        reference = maml.module(x)
        for clone in (maml.clone(), maml.clone()):
            assert (reference - clone(x)).norm(p=2).item() <= 1e-8


def test_l2l_graph_connection() -> None:
    maml, x = learner(), rand(7, 4, seed=1)
    maml(x)
    maml.clone()(x).norm(p=2).backward()
    assert all(float(p.grad.norm(p=2)) > 0 for p in maml.module.parameters())


def test_l2l_adaptation() -> None:
    maml, x = learner(), rand(7, 4, seed=1)
    clone = maml.clone()
    loss = clone(x).norm(p=2)
    clone.adapt(loss)
    new_loss = clone(x).norm(p=2)
    assert loss.item() >= new_loss.item()
    new_loss.backward()
    assert all(float(p.grad.norm(p=2)) > 0 for p in maml.module.parameters())


def test_l2l_allow_nograd() -> None:
    model, (x, y, query, query_y) = Toy(), task(30)
    model.head.bias.requires_grad_(False)
    maml = learner(model=model, adapt=("context", "head.bias"))
    clone = maml.clone()
    with pytest.raises(ValueError, match=r"head\.bias, which requires no gradient"):
        clone.adapt(cross_entropy(clone(x), y))
    clone.adapt(cross_entropy(clone(x), y), allow_nograd=True)
    cross_entropy(clone(query), query_y).backward()
    assert model.head.bias.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = model.head.bias.clone()
    clone = learner(model=model, adapt=("context", "head.bias"), allow_nograd=True).clone()
    clone.adapt(cross_entropy(clone(x), y))
    assert torch.equal(before, clone.head.bias)


def test_l2l_module_shared_params() -> None:
    class Shared(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.ModuleList([self.equilibrium, self.film])
            self.same_context = self.context

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.same_context.sum()

    maml, (x, y, query, query_y) = learner(model=Shared()), task(30)
    clone = maml.clone()
    clone.adapt(cross_entropy(clone(x), y))
    assert clone.same_context is clone.module.context
    cross_entropy(clone(query), query_y).backward()
    assert all(p.grad is not None for p in maml.parameters())


def test_l2l_utilities_take_it() -> None:
    l2l.utils.clone_module(learner())
    l2l.utils.detach_module(copy.deepcopy(learner()))


# Memory -----------------------------------------------------------------------------------------


def graph_bytes(iters: int) -> tuple[int, int]:
    """Bytes saved for backward: the most at one time, and the most ever put in at one time."""
    live, peak = 0, 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, peak
            # detached: an output that its own node saves would keep both alive
            self.tensor, self.size = tensor.detach(), tensor.nbytes
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    clone, (x, y, query, query_y) = learner(iters=iters, tol=0.0).clone(), task(30)
    loss = cross_entropy(clone(x), y)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        clone.adapt(loss)
        after = live
        cross_entropy(clone(query), query_y).backward()
    return peak, after


@pytest.mark.filterwarnings("ignore:the joint solution has a relative residual")
def test_memory_does_not_depend_on_the_iterations() -> None:
    peak, after = graph_bytes(20)
    assert peak > after > 0
    assert graph_bytes(200) == (peak, after)


# Bad input --------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(1, 4, dtype=torch.float64))
        self.head = linear(4, 3, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.context)


def test_bad_settings() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        JIIOLearner(len, 1.0)
    with pytest.raises(ValueError, match=r"\['contxt'\] given, there are context, film\.weight"):
        JIIOLearner(Toy(), 1.0, adapt=["contxt"])
    with pytest.raises(ValueError, match="an empty list given"):
        JIIOLearner(Toy(), 1.0, adapt=[])
    with pytest.raises(TypeError, match="must be a list of names, got the string 'context'"):
        JIIOLearner(Toy(), 1.0, adapt="context")
    with pytest.raises(ValueError, match="has no parameter called 'context'"):
        JIIOLearner(linear(3, 3, seed=1), 1.0)
    for name, value in (("lr", -1.0), ("lr", float("nan")), ("reg", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must be finite and at least"):
            JIIOLearner(Toy(), **{"lr": 1.0, name: value})
    for iters in (0, 2.5, True):
        with pytest.raises(ValueError, match="iters must be an integer and at least 1, got"):
            JIIOLearner(Toy(), 1.0, iters=iters)


def test_no_adaptation_has_no_implicit_gradient() -> None:
    clone, x = JIIOLearner(Toy(), 0.0).clone(), task(30)[0]
    with pytest.raises(ValueError, match=r"lr must be above 0: .* first_order=True"):
        clone.adapt(clone(x).square().mean())
    clone.adapt(clone(x).square().mean(), first_order=True)


def test_a_module_without_an_equilibrium_layer() -> None:
    clone, (x, y, _, _) = JIIOLearner(Plain(), 1.0).clone(), task(30)
    with pytest.raises(ValueError, match="no equilibrium layer"):
        clone(x)
    with pytest.raises(ValueError, match="no equilibrium layer"):
        clone.adapt(lambda: cross_entropy(clone(x), y))


def test_names_that_do_not_influence_the_loss() -> None:
    model, (x, y, query, query_y) = Toy(), task(30)
    model.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    maml = learner(model=model, adapt=("context", "idle"))
    clone = maml.clone()
    with pytest.raises(ValueError, match="idle, which does not influence the loss"):
        clone.adapt(cross_entropy(clone(x), y))
    clone.adapt(cross_entropy(clone(x), y), allow_unused=True)
    assert torch.equal(clone.idle, model.idle)
    cross_entropy(clone(query), query_y).backward()
    assert model.context.grad is not None
    clone = learner(model=model, adapt=("idle",)).clone()
    with pytest.raises(ValueError, match="none of the parameters"):
        clone.adapt(cross_entropy(clone(x), y), allow_unused=True)


def test_losses_that_cannot_be_used() -> None:
    maml, (x, y, _, _) = learner(), task(30)
    clone, other = maml.clone(), maml.clone()
    with pytest.raises(ValueError, match="not computed from one output of this learner"):
        clone.adapt(cross_entropy(maml(x), y))
    with pytest.raises(ValueError, match="not computed from one output of this learner"):
        clone.adapt(cross_entropy(clone(x), y) + cross_entropy(clone(x), y))
    with pytest.raises(ValueError, match="from the output of another learner"):
        clone.adapt(cross_entropy(other(x), y))
    with pytest.raises(ValueError, match=r"one number, got shape \(5,\)"):
        clone.adapt(cross_entropy(clone(x), y, reduction="none"))
    with pytest.raises(ValueError, match="the loss is nan"):
        clone.adapt(cross_entropy(clone(x), y) * torch.nan)
    with pytest.raises(ValueError, match="the loss has no gradient"):
        clone.adapt(cross_entropy(clone(x).detach(), y))
    with pytest.raises(TypeError, match="must be a tensor or a function"):
        clone.adapt(1.0)
    with pytest.raises(ValueError, match="again gives another value"):
        clone.adapt(cross_entropy(torch.dropout(clone(x), 0.5, train=True), y))
    stale = cross_entropy(clone(x), y)
    clone.adapt(cross_entropy(clone(x), y))
    with pytest.raises(ValueError, match="from before the last adapt"):
        clone.adapt(stale)


def test_a_recorded_constant_that_depends_on_v() -> None:
    maml, (x, y, _, _) = learner(), task(30)
    clone = maml.clone()
    with pytest.raises(ValueError, match="computed from the adapted context"):
        clone.adapt(cross_entropy(clone(x), y) + clone.context.square().sum())
    # the meta-parameter itself is a constant of the task
    clone.adapt(cross_entropy(clone(x), y) + maml.context.square().sum())


def test_a_support_set_that_changes() -> None:
    clone, (x, y, other, other_y) = learner().clone(), task(30)
    clone.adapt(cross_entropy(clone(x), y))
    clone.adapt(cross_entropy(clone(x.clone()), y))
    with pytest.raises(ValueError, match="the support set has changed"):
        clone.adapt(cross_entropy(clone(other), other_y))


def test_adapt_needs_gradients_and_a_clone() -> None:
    maml, (x, y, _, _) = learner(), task(30)
    clone = maml.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        clone.adapt(cross_entropy(clone(x), y))
    with pytest.raises(RuntimeError, match="adapt a clone"):
        maml.adapt(cross_entropy(maml(x), y))


def test_second_derivatives_raise() -> None:
    maml, (x, y, _, _) = learner(), task(30)
    clone = maml.clone()
    clone.adapt(cross_entropy(clone(x), y))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(clone.context.sum(), maml.context, create_graph=True)


class Noisy(TanhCell):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(6, 0.5, 4)
        self.part = part

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.part(z) + u)


def test_dropout_and_batch_norm_in_the_cell() -> None:
    x, y, _, _ = task(30)
    model = Toy()
    model.equilibrium = Equilibrium(Noisy(nn.Dropout(0.5)), solver=TIGHT)
    clone = learner(model=model).clone()
    with pytest.raises(ValueError, match=r"active dropout \(part\)"):
        clone.adapt(cross_entropy(clone(x), y))
    model.eval()
    clone = learner(model=model).clone()
    clone.adapt(cross_entropy(clone(x), y))
    model.equilibrium = Equilibrium(
        Noisy(nn.BatchNorm1d(6, affine=False, dtype=torch.float64)), solver=TIGHT
    )
    clone = learner(model=model, tol=1e-6).clone()
    clone.train()
    loss = cross_entropy(clone(x), y)
    before = model.equilibrium.cell.part.running_mean.clone()
    with pytest.warns(UserWarning, match=r"BatchNorm in train mode \(part\)"):
        clone.adapt(loss, first_order=True)
    assert torch.equal(before, model.equilibrium.cell.part.running_mean)


@pytest.mark.parametrize("adapt", [("context",), HEAD])
def test_batch_norm_before_the_layer_has_its_meta_gradient(adapt: tuple[str, ...]) -> None:
    """And its running statistics move with the calls that the user makes, no others."""
    model, (x, y, query, query_y) = Toy(), task(30)
    norm = nn.BatchNorm1d(6, dtype=torch.float64)
    model.encoder = nn.Sequential(model.encoder, norm)
    maml = learner(model=model, adapt=adapt, tol=1e-11)

    def meta_loss() -> Tensor:
        clone = maml.clone()
        clone.adapt(cross_entropy(clone(x), y))
        return cross_entropy(clone(query), query_y)

    meta_loss().backward()
    assert int(norm.num_batches_tracked) == 2
    gradient, step = norm.weight.grad.clone(), 1e-5
    for k in (0, 3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                norm.weight[k] += sign * step
            values.append(float(meta_loss().detach()))
            with torch.no_grad():
                norm.weight[k] -= sign * step
        assert float(gradient[k]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_dropout_outside_the_cell_keeps_one_mask() -> None:
    model, (x, y, _, _) = Toy(), task(30)
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    clone = learner(model=model).clone()
    torch.manual_seed(0)
    loss = cross_entropy(clone(x), y)
    state = torch.get_rng_state()
    clone.adapt(loss)
    assert torch.equal(state, torch.get_rng_state())
    assert float(clone.residuals.joint) < 1e-6


def test_a_loose_solution_warns() -> None:
    clone, (x, y, _, _) = learner(iters=2).clone(), task(30)
    with pytest.warns(UserWarning, match="the joint solution has a relative residual"):
        clone.adapt(cross_entropy(clone(x), y))
