"""``attack`` against closed forms, and its objectives by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from jiio_plugins import Joint, Nested, attack, attack_objective
from tests.cases import every_loss, every_norm
from tests.helpers import LinearNet, independent_output, rand

# Against the closed form ------------------------------------------------------------------------


DUAL = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}


@pytest.mark.parametrize("method", [Joint(), Nested(max_iter=20)], ids=["joint", "nested"])
@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@every_norm
def test_the_worst_case_of_a_linear_equilibrium(norm: float, loss: Any, method: Any) -> None:
    """``z = A z + B x``, ``y = C z``: the margin is linear, its least value ``m − ε‖w‖_*``."""
    for seed in range(3):
        model, x = LinearNet(seed=10 * seed), rand(6, 20, seed=seed)
        w = model.matrix()
        y = independent_output(model, x).argmax(1)
        slope = w[y] - w[1 - y]
        logits = independent_output(model, x)
        margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
        eps = 0.8
        best = margin - eps * torch.linalg.vector_norm(slope, ord=DUAL[norm], dim=1)
        solution = attack(model, x, y, norm=norm, eps=eps, loss=loss, method=method)
        out = independent_output(model, solution.x)
        reached = out.gather(1, y[:, None])[:, 0] - out.gather(1, 1 - y[:, None])[:, 0]
        assert bool((reached >= best - 1e-7).all())  # nobody beats the optimum
        assert bool((margin - reached >= 0.99 * (margin - best)).all())
        if loss == "margin":
            torch.testing.assert_close(solution.value, reached, rtol=1e-6, atol=1e-7)
        else:
            torch.testing.assert_close(
                solution.value, -nn.functional.softplus(-reached), rtol=1e-6, atol=1e-7
            )


@every_norm
def test_the_worst_case_in_a_box(norm: float) -> None:
    """A linear function over ball and box; for L1 and L2 by its one multiplier, found by search."""
    model = LinearNet(seed=5)
    x = torch.rand(5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = model.matrix()
    y = independent_output(model, x).argmax(1)
    slope, eps = w[y] - w[1 - y], {1.0: 2.0, 2.0: 1.0, math.inf: 0.3}[norm]
    room = torch.where(slope > 0, x, 1 - x)  # the way down
    if norm == math.inf:
        delta = room.clamp(max=eps)
    elif norm == 1:  # spend ε on the steepest entries first
        order = slope.abs().argsort(1, descending=True)
        sorted_room = room.gather(1, order)
        left = (eps - (sorted_room.cumsum(1) - sorted_room)).clamp(min=0)
        delta = torch.zeros_like(room).scatter(1, order, torch.minimum(sorted_room, left))
    else:
        low, high = torch.zeros(5, 1).double(), torch.full((5, 1), 1e6).double()
        for _ in range(200):
            middle = (low + high) / 2
            fits = torch.minimum(middle * slope.abs(), room).norm(dim=1, keepdim=True) <= eps
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        delta = torch.minimum(low * slope.abs(), room)
    best = (slope.abs() * delta).sum(1)  # how far the margin can fall
    solution = attack(
        model,
        x,
        y,
        norm=norm,
        eps=eps,
        loss="margin",
        lower=0.0,
        upper=1.0,
        method=Joint(max_iter=60),
    )
    fell = (slope * (x - solution.x)).sum(1)
    assert bool((fell <= best * (1 + 1e-6) + 1e-9).all())
    assert bool((fell >= 0.99 * best).all()), fell / best


# Objectives -------------------------------------------------------------------------------------


def by_hand(logits: list[float], label: int, loss: str, targeted: bool) -> float:
    """What ``attack_objective`` gives for one sample, in plain Python."""
    others = [v for i, v in enumerate(logits) if i != label]
    order = sorted(logits, reverse=True)
    sign = -1.0 if targeted else 1.0
    if loss == "cross-entropy":
        top = max(logits)
        return sign * (logits[label] - top - math.log(sum(math.exp(v - top) for v in logits)))
    margin = sign * (logits[label] - max(others))
    if loss == "margin":
        return margin
    if targeted:
        return margin / (order[0] - (order[2] + order[3]) / 2)
    return margin / (order[0] - order[2])


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("targeted", [False, True])
@every_loss
def test_objectives_by_hand(loss: Any, targeted: bool, classes: int) -> None:
    """With a slope at every sample that has not succeeded, or an error that says so."""
    logits = (3 * rand(12, classes, seed=1)).requires_grad_()
    labels = torch.arange(12) % classes
    objective = attack_objective(loss, labels, targeted)
    if classes < 2 or (loss == "dlr" and classes < 3 + targeted):
        with pytest.raises(ValueError, match=rf"\b[234] classes or more.* {classes}\b"):
            objective(logits)
        return
    got = objective(logits)
    (slope,) = torch.autograd.grad(got.sum(), logits)
    succeeded = (logits.argmax(1) == labels) == targeted
    assert bool(((slope.norm(dim=1) > 1e-4) | succeeded).all())
    want = [
        by_hand(row.tolist(), int(k), loss, targeted) for row, k in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(got.detach(), torch.tensor(want).double(), rtol=1e-6, atol=1e-9)
