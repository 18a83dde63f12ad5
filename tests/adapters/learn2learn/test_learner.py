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

from jiio_learn2learn import JIIOLearner
from tests.adapters.learn2learn.toys import Toy, learner, task
from tests.helpers import rand

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
