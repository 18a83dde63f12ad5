"""Penalties that keep a cell easy to solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.state import Layout, row_norm

if TYPE_CHECKING:
    from collections.abc import Callable


def jacobian_penalty(
    cell: Callable[..., Any],
    z: Any,
    *injection: Any,
    probes: int = 1,
    power: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hutchinson estimate of ``‖J_z‖²_F / n`` per row, averaged over rows: a differentiable scalar.

    ``‖J_z‖²_F = E‖J_zᵀη‖²`` for η with unit covariance. z is held constant.

    That is a mean over all directions. Whether a solver converges is up to the few in which the
    cell contracts least. With ``power=k`` each probe is ``η = √n (J_zᵀ)ᵏ η₀ / ‖(J_zᵀ)ᵏ η₀‖`` for
    η₀ with unit covariance, held constant. The penalty is then near ``ρ²``, from one probe.

    Args:
        cell: the cell of an :class:`jiio_plugins.Equilibrium`.
        z: state, tensor or tuple, batch first. Usually it is the equilibrium.
        *injection: what the layer was called with.
        probes: number of Gaussian η or η₀. Each costs one VJP, and one for its gradient.
        power: k, steps of the power iteration on each. Each costs one VJP more.
        generator: source of the probes. None: the global one.

    Returns:
        A scalar with a graph, to add to a training loss.

    Raises:
        ValueError: no probes, or a negative power.

    Source: Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization"
    (ICML 2021), eq. 8.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if power < 0:
        raise ValueError(f"power must not be negative, got {power}")
    layout = Layout.of(z)
    with torch.enable_grad(), uncompiled():
        flat = layout.pack(z).detach().requires_grad_()
        f = layout.pack(cell(layout.unpack(flat), *injection))
        total = f.new_zeros(())
        for _ in range(probes):
            noise = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
            for _ in range(power):
                (noise,) = torch.autograd.grad(f, flat, noise, retain_graph=True)
                size = row_norm(noise)[:, None].clamp(min=torch.finfo(noise.dtype).tiny)
                noise = noise * (noise.shape[1] ** 0.5 / size)
            (product,) = torch.autograd.grad(f, flat, noise, create_graph=True)
            total = total + product.square().sum() / flat.numel()
    return total / probes
