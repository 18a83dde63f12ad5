"""The penalty on the Jacobian of a cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import jacobian_penalty
from tests.helpers import PairCell, TanhCell, plain_solve, rand


def exact_frobenius(cell: nn.Module, z: Tensor, u: Tensor) -> Tensor:
    """``‖J_z‖²_F / n``, averaged over rows."""
    total = z.new_zeros(())
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(
            lambda state, i=i: cell(state[None], u[i : i + 1])[0], z[i], create_graph=True
        )
        total = total + jacobian.square().sum()
    return total / z.numel()


def test_jacobian_penalty_estimates_the_frobenius_norm() -> None:
    cell, u = TanhCell(6, 0.8, seed=1), rand(5, 6, seed=2)
    z = plain_solve(cell, u).detach()
    generator = torch.Generator().manual_seed(0)
    estimate = jacobian_penalty(cell, z, u, probes=4000, generator=generator)
    exact = exact_frobenius(cell, z, u)
    # the standard error of 4000 probes over 5 rows is below 1 %
    torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0)
    (slope,) = torch.autograd.grad(estimate, cell.weight)
    (exact_slope,) = torch.autograd.grad(exact, cell.weight)
    assert float((slope - exact_slope).norm() / exact_slope.norm()) < 0.05


def test_jacobian_penalty_on_tuples_and_its_randomness() -> None:
    cell, u = PairCell(seed=1), rand(3, 7, seed=2)
    z = tuple(t.detach() for t in plain_solve(cell, u))
    first = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(1))
    second = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(1))
    other = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(2))
    assert first.item() == second.item() != other.item()
    with torch.no_grad():
        quiet = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(1))
    assert quiet.item() == first.item()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        jacobian_penalty(cell, z, u, probes=0)
