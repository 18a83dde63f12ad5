"""One optimum by many ways, and the head alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_plugins import Anderson, JacobianFree, count_evaluations
from tests.adapters.learn2learn.toys import HEAD, Toy, learner, task
from tests.helpers import linear

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


# The head alone ---------------------------------------------------------------------------------


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
