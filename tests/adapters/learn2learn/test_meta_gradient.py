"""The meta-gradient against finite differences of the nested argmin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jiio_learn2learn import JIIOLearner
from tests.adapters.learn2learn.toys import Reference, Toy, exact, task
from tests.helpers import rand

STEP = 2e-4


def finite_differences(references: list[Reference]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each parameter a direction, and the derivative of the summed query losses along it."""
    out = {}
    for k, (name, value) in enumerate(references[0].model.named_parameters()):
        direction = rand(value.numel(), seed=50 + k).reshape(value.shape)
        totals = [
            sum(reference({name: value.detach() + step * direction}) for reference in references)
            for step in (STEP, -STEP, 2 * STEP, -2 * STEP)
        ]
        slope = 8 * (totals[0] - totals[1]) - (totals[2] - totals[3])  # fourth order
        out[name] = direction, torch.tensor(slope / (12 * STEP)).double()
    return out


@pytest.mark.parametrize("reg", [0.3, 0.0])
@pytest.mark.parametrize("pair", [False, True], ids=["tensor", "tuple"])
def test_meta_gradient_of_interleaved_tasks(pair: bool, reg: float) -> None:
    model = Toy(pair=pair)
    maml = JIIOLearner(model, lr=1.0, reg=reg, iters=400, tol=1e-12)
    tasks = [task(seed=30, queries=9), task(seed=70, queries=4)]
    learners = [maml.clone() for _ in tasks]
    losses = [
        cross_entropy(learner(x), y) for learner, (x, y, _, _) in zip(learners, tasks, strict=True)
    ]
    for learner, loss in zip(learners, losses, strict=True):
        learner.adapt(loss)
    for learner, (_, _, x, y) in zip(learners, tasks, strict=True):
        cross_entropy(learner(x), y).backward()
        assert float(learner.residuals.joint) < 1e-11
        assert float(learner.residuals.adjoint) < 1e-9

    exact(model)
    expected = finite_differences(
        [
            Reference(model, data, reg, learner.context.detach())
            for data, learner in zip(tasks, learners, strict=True)
        ]
    )
    for name, parameter in model.named_parameters():
        direction, derivative = expected[name]
        assert parameter.grad is not None, name
        got = (parameter.grad * direction).sum()
        if name == "context" and reg == 0:
            assert not parameter.grad.any()
            assert abs(float(derivative)) < 1e-8
        else:
            torch.testing.assert_close(got, derivative, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pair", [False, True], ids=["tensor", "tuple"])
def test_meta_gradient_of_a_head_alone(pair: bool) -> None:
    """The fixed point does not depend on v; its own gradient rule takes λ on to the weights."""
    model, data, name = Toy(pair=pair), task(seed=30), "head.weight"
    maml = JIIOLearner(model, lr=1.0, adapt=[name], reg=0.3, iters=400, tol=1e-12)
    clone = maml.clone()
    x, y, query, query_y = data
    clone.adapt(cross_entropy(clone(x), y))
    cross_entropy(clone(query), query_y).backward()
    assert float(clone.residuals.adjoint) < 1e-9
    reference = Reference(exact(model), data, 0.3, clone.module.head.weight.detach(), name)
    expected = finite_differences([reference])
    for key, parameter in model.named_parameters():
        direction, derivative = expected[key]
        torch.testing.assert_close(
            (parameter.grad * direction).sum(), derivative, rtol=1e-6, atol=0
        )
