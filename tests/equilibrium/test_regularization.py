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


def test_power_steps_turn_probes_to_where_the_cell_contracts_least() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            basis, _ = torch.linalg.qr(rand(6, 6, seed=3))
            scales = torch.tensor([0.9, -0.4, 0.3, 0.2, 0.1, 0.0], dtype=basis.dtype)
            self.weight = nn.Parameter(basis * scales @ basis.T)
            self.slowest = basis[:, 0]

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return z @ self.weight.T + u

    cell, z = Linear(), rand(3, 6, seed=2)
    value = jacobian_penalty(cell, z, z, power=40, generator=torch.Generator().manual_seed(0))
    assert float(value.detach()) == pytest.approx(0.81, rel=1e-9)  # ρ²
    (slope,) = torch.autograd.grad(value, cell.weight)
    exact = 2 * 0.9 * torch.outer(cell.slowest, cell.slowest)
    torch.testing.assert_close(slope, exact, rtol=1e-8, atol=1e-10)
    one = jacobian_penalty(cell, z, z, power=1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 6, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    turned = noise @ cell.weight
    expected = ((turned @ cell.weight).norm(dim=1) / turned.norm(dim=1)).square().mean()
    torch.testing.assert_close(one, expected)


def test_a_cell_without_a_jacobian_has_no_penalty() -> None:
    z = rand(3, 6, seed=2)
    assert float(jacobian_penalty(lambda z, u: 0 * z + u, z, z, power=2)) == 0.0


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
    with pytest.raises(ValueError, match="power must not be negative, got -1"):
        jacobian_penalty(cell, z, u, power=-1)
