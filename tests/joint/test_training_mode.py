"""Training mode: what a network draws is the same in every pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Joint, L2Ball, Nested, optimize_input
from tests.cases import every_method, squared
from tests.helpers import Net, rand


class Noisy(nn.Module):
    """:class:`Net` with dropout before it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.dropout = Net(seed=1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))


@pytest.mark.parametrize("step", [1.0, 30.0])
@every_method
def test_training_mode_keeps_one_dropout_mask(method: Any, step: float) -> None:
    """The verified value is that of the mask that the generator's present state draws."""
    model, x = Noisy().train(), rand(8, 5, seed=1)
    method = replace(method, step_size=step)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    solution = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), training_mode=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(squared(model(solution.x)), solution.value, rtol=1e-6, atol=1e-8)
    torch.set_rng_state(state)
    start = squared(model(x))
    assert bool((solution.value <= start + 1e-8).all())
    torch.set_rng_state(state)
    again = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), training_mode=True
    )
    assert torch.equal(again.x, solution.x)
    torch.manual_seed(8)
    other = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), training_mode=True
    )
    assert not torch.equal(other.x, solution.x)


@pytest.mark.parametrize(
    "method", [Joint(max_iter=30), Nested(max_iter=15, warm_start=True)], ids=["joint", "warm"]
)
def test_random_numbers_in_a_cell_and_after_it_are_the_same_in_every_pass(method: Any) -> None:
    model = Net(seed=1)
    cell, drawn = model.equilibrium.cell, []

    class Scaled(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return cell(z, u) * (0.8 + 0.4 * torch.rand_like(z))

    def draw(*_: object) -> None:
        drawn.append(float(torch.rand(())))

    model.equilibrium.cell = Scaled()
    model.head.register_forward_pre_hook(draw)
    residuals: list[float] = []
    optimize_input(
        model,
        rand(8, 5, seed=1),
        squared,
        method=method,
        constraint=L2Ball(0.5),
        training_mode=True,
        callback=lambda progress: residuals.append(float(progress.z_residual.median())),
    )
    assert residuals[-1] < 1e-2
    loop = drawn[1 : len(residuals) + 1]
    assert len(set(loop)) == 1
