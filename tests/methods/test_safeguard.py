"""Smooth problems: no iterate is kept that makes a problem's objective worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Joint, optimize_input
from tests.cases import Wells, wells
from tests.helpers import rand


def hessian_at(model: nn.Module, x: Tensor) -> Tensor:
    def objective(v: Tensor) -> Tensor:
        u, z = model.encoder(v[None]), 0.0
        for _ in range(120):
            z = torch.tanh(z @ model.equilibrium.cell.weight.T + u if torch.is_tensor(z) else u)
        return wells(4 * model.head(z)).sum()

    return torch.autograd.functional.hessian(objective, x)


def test_a_minimum_is_found_where_a_root_finder_finds_saddles() -> None:
    model = Wells()
    x = 0.15 * rand(24, 3, seed=4)  # around the maximum
    solution = optimize_input(model, x, wells, method=Joint(max_iter=400, step_size=0.05, tol=1e-9))
    start = wells(model(x)).detach()
    assert bool((solution.value < start).all())
    for row in solution.x:
        assert float(torch.linalg.eigvalsh(hessian_at(model, row)).min()) > -1e-6


@pytest.mark.parametrize("step", [0.1, 0.4, 2.0])
@pytest.mark.parametrize("kind", ["quasi-newton", "anderson"])
def test_a_step_too_long_is_cut_until_the_state_can_follow(kind: Any, step: float) -> None:
    """The longest is ten times too long for plain descent: v outruns z, and its loss misleads."""
    model, x = Wells(), 0.3 * rand(16, 3, seed=5)
    start = wells(model(x)).detach()
    for iterations in (2, 4, 8, 16, 32, 64 if kind == "quasi-newton" else 200):
        method = Joint(max_iter=iterations, step_size=step, tol=0.0, mixing=kind)
        solution = optimize_input(model, x, wells, method=method)
        assert bool((solution.value <= start + 1e-12).all())
    assert bool((solution.value < start).all())
    # the minima are at -0.75
    if kind == "anderson":
        assert float(solution.value.mean()) < -0.65
    else:
        assert float(solution.value.max()) < -0.74
