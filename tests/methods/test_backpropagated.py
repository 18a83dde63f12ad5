"""Projected gradient steps through other views of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Implicit,
    Nested,
    Unrolled,
    attack,
    attack_objective,
    count_evaluations,
)
from jiio_plugins.evaluation import Backpropagated, through_intermediate
from tests.helpers import TIGHT, Net, rand


def run(net: nn.Module, method: object) -> object:
    x, y = rand(4, 5, seed=2), torch.tensor([0, 1, 2, 0])
    return attack(net, x, y, norm=2, eps=0.3, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "views", [(None,), (Implicit(),), (Unrolled(steps=150),), (None, Unrolled(steps=150))]
)
def test_exact_gradients_take_the_steps_of_the_nested_loop(views: tuple[object, ...]) -> None:
    net = Net(rate=0.6)
    ours = run(net, Backpropagated(views=views, max_iter=6))  # type: ignore[arg-type]
    nested = run(net, Nested(solver=TIGHT, max_iter=6))
    torch.testing.assert_close(ours.x, nested.x, rtol=0, atol=1e-8)
    assert bool(ours.converged.all())


def test_intermediate_states_are_those_of_the_iteration() -> None:
    net, x, y = Net(rate=0.9), rand(4, 5, seed=2), torch.tensor([0, 1, 2, 0])
    leaf = x.clone().requires_grad_()
    u, losses = net.encoder(leaf), []
    z, objective = torch.zeros(4, 8, dtype=torch.float64), attack_objective("cross-entropy", y)
    for k in range(1, 5):
        z = net.equilibrium.cell(z, u)
        if k in (1, 2, 4):
            losses.append(objective(net.head(z)))
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(0).sum(), leaf)
    seen = []
    attack(
        net,
        x,
        y,
        norm=2,
        eps=0.3,
        method=through_intermediate((1, 2, 4), max_iter=1),
        callback=lambda progress: seen.append(progress.gradient),
    )
    torch.testing.assert_close(seen[0].reshape(x.shape), gradient)


def test_costs_are_what_autograd_did() -> None:
    net = Net()
    method = Backpropagated(views=(Unrolled(steps=7), Unrolled(steps=3)), max_iter=5)
    with count_evaluations() as counter:
        solution = run(net, method)
    assert counter.vjps == pytest.approx(4 * 5 * (7 + 3))
    # the start is judged too, since no residual says how far its running loss may be trusted
    assert 4 * 50 < counter.f_evals <= 4 * 50 + 4 * 2 * 400
    assert float(solution.stats.vjps.sum()) == counter.vjps


def test_never_worse_than_the_start_where_gradients_mislead() -> None:
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return -g

    class Misleading(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Reversed.apply(x))

    net, x, y = Misleading(), rand(4, 5, seed=2), torch.tensor([0, 1, 2, 0])
    solution = run(net, Backpropagated(max_iter=4))
    start = attack_objective("cross-entropy", y)(net(x))
    assert bool((solution.value <= start + 1e-9).all())


def test_bad_views() -> None:
    with pytest.raises(ValueError, match="views must hold"):
        Backpropagated(views=())
    with pytest.raises(ValueError, match="views must hold"):
        Backpropagated(views=(Anderson(),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no equilibrium layer"):
        run(nn.Linear(5, 3, dtype=torch.float64), Backpropagated())
