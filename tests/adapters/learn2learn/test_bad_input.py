"""What cannot be adapted, and the errors that say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_learn2learn import JIIOLearner
from tests.adapters.learn2learn.toys import Toy, learner, task
from tests.helpers import linear


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
    with pytest.raises(TypeError, match=r"list of names, got True: .* first_order=True"):
        JIIOLearner(Toy(), 1.0, True)  # as of MAML
    with pytest.raises(ValueError, match="has no parameter called 'context'"):
        JIIOLearner(linear(3, 3, seed=1), 1.0)
    for name, value in (("lr", -1.0), ("lr", float("nan")), ("reg", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must be finite and at least"):
            JIIOLearner(Toy(), **{"lr": 1.0, name: value})
    for iters in (0, 2.5, True):
        with pytest.raises(ValueError, match="iters must be an integer and at least 1, got"):
            JIIOLearner(Toy(), 1.0, iters=iters)


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")
@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace, torch.compile])
def test_generated_modules_cannot_be_cloned(make: Any) -> None:
    model = Toy()
    model.head = make(model.head)
    with pytest.raises(TypeError, match=r"compiled \(head\): give the module"):
        JIIOLearner(model, 1.0)


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


def test_a_loose_solution_warns() -> None:
    clone, (x, y, _, _) = learner(iters=2).clone(), task(30)
    with pytest.warns(UserWarning, match="the joint solution has a relative residual"):
        clone.adapt(cross_entropy(clone(x), y))
