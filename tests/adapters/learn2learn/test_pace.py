"""How far an adaptation is from its optimum, whatever its lr was, and where lr is to go."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from jiio_learn2learn import JIIOLearner
from jiio_plugins.models import SinusoidDEQ
from jiio_plugins.solution import ConvergenceWarning
from tests.adapters.learn2learn.toys import learner, task

REG = 0.1


def sinusoid() -> tuple[SinusoidDEQ, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = SinusoidDEQ(), torch.rand(10, 1)
    return model, x, x.sin()


def optimum() -> Tensor:
    """The context by L-BFGS through whole solves, which shares nothing with the learner."""
    model, x, y = (part.double() for part in sinusoid())
    v0 = model.context.detach().clone()
    descent = torch.optim.LBFGS([model.context], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        loss = mse_loss(model(x), y) + REG / 2 * (model.context - v0).square().sum()
        loss.backward()
        return loss

    descent.step(closure)
    return model.context.detach()


def adapted(lr: float, calls: int = 1) -> tuple[JIIOLearner, list[str]]:
    """A clone, and what it was warned of."""
    model, x, y = sinusoid()
    clone = JIIOLearner(model, lr=lr, reg=REG).clone()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(calls):
            clone.adapt(mse_loss(clone(x), y))
    return clone, [str(w.message) for w in told if w.category is ConvergenceWarning]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("lr", [1e-7, 1e-4, 1e-2, 0.5, 5.0])
def test_the_residual_is_the_distance_from_the_optimum_whatever_lr(lr: float, calls: int) -> None:
    clone, told = adapted(lr, calls)
    exact = optimum()
    error = float((clone.context.detach() - exact).norm() / exact.norm())
    assert error / 10 < float(clone.residuals.joint) < 10 * error
    assert bool(told) is (lr < 0.5)


def wanted(message: str) -> float:
    """The lr that a warning asks for."""
    found = re.search(r"to about ([^ ,]+)", message)
    assert found is not None, message
    return float(found[1])


def test_a_small_lr_is_to_be_raised_until_it_fits() -> None:
    lr, seen = 1e-5, 0
    for _ in range(8):
        _, told = adapted(lr)
        if not told:
            break
        assert f"raise lr, which is {lr:g}, to about" in told[-1]
        lr, seen = wanted(told[-1]), seen + 1
    assert seen
    assert not told
    assert 0.1 < lr < 50


def test_a_large_lr_is_to_be_lowered() -> None:
    clone, (x, y, _, _) = learner(lr=20.0, iters=12).clone(), task(30)
    with pytest.warns(ConvergenceWarning, match="lower lr, which is 20, to about") as told:
        clone.adapt(cross_entropy(clone(x), y))
    lr = wanted(str(told[0].message))
    assert 0.5 < lr < 10
    clone = learner(lr=lr, iters=12).clone()
    clone.adapt(cross_entropy(clone(x), y))  # warnings are errors


@pytest.mark.parametrize("names", [("head.weight", "head.bias"), ("context",)])
def test_an_lr_that_fits_asks_for_more_of_the_rest(names: Any) -> None:
    clone, (x, y, _, _) = learner(lr=2.0, iters=4, adapt=names).clone(), task(30)
    with pytest.warns(ConvergenceWarning, match="more iters, lower tol, or raise reg: lr=2 fits"):
        clone.adapt(cross_entropy(clone(x), y))


def test_nothing_to_adapt_is_no_small_lr() -> None:
    """A loss that is at its optimum from the start."""
    model, x, _ = sinusoid()
    clone = JIIOLearner(model, lr=0.5, reg=REG).clone()
    clone.adapt(mse_loss(clone(x), model(x).detach()))  # warnings are errors
    assert float(clone.residuals.joint) < 1e-3
