"""Penalties that keep a cell easy to solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.state import Layout

if TYPE_CHECKING:
    from collections.abc import Callable


def jacobian_penalty(
    cell: Callable[..., Any],
    z: Any,
    *injection: Any,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hutchinson estimate of ``‖J_z‖²_F / n`` per row, averaged over rows: a differentiable scalar.

    ``‖J_z‖²_F = E‖J_zᵀη‖²`` for η with unit covariance. z is held constant.

    Args:
        cell: the cell of an :class:`jiio_plugins.Equilibrium`.
        z: state, tensor or tuple, batch first. Usually it is the equilibrium.
        *injection: what the layer was called with.
        probes: number of Gaussian η. Each costs one VJP.
        generator: source of the probes. None: the global one.

    Returns:
        A scalar with a graph, to add to a training loss.

    Raises:
        ValueError: no probes.

    Source: Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization"
    (ICML 2021), eq. 8.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    layout = Layout.of(z)
    with torch.enable_grad(), uncompiled():
        flat = layout.pack(z).detach().requires_grad_()
        f = layout.pack(cell(layout.unpack(flat), *injection))
        total = f.new_zeros(())
        for _ in range(probes):
            noise = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
            (product,) = torch.autograd.grad(f, flat, noise, create_graph=True)
            total = total + product.square().sum() / flat.numel()
    return total / probes
