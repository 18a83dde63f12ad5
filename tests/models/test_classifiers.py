"""Classifiers with one scale and with several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jiio_plugins import Anderson, Equilibrium, JacobianFree
from jiio_plugins.models import ConvDEQClassifier, MDEQCell, MDEQClassifier

SMALL: dict[str, Any] = {
    "conv": lambda **kw: ConvDEQClassifier(channels=8, classes=7, **kw),
    "two scales": lambda **kw: MDEQClassifier(channels=(8, 12), classes=7, **kw),
    "three scales": lambda **kw: MDEQClassifier(channels=(8, 8, 4), classes=7, **kw),
    "one scale": lambda **kw: MDEQClassifier(channels=(8,), classes=7, stride=2, **kw),
}


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = SMALL[name](in_channels=3, adjoint=JacobianFree())
    logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert bool(torch.isfinite(p.grad).all()), parameter_name


def test_states_of_the_multiscale_cell() -> None:
    torch.manual_seed(0)
    cell = MDEQCell((8, 12, 4))
    u = torch.rand(2, 8, 16, 16)
    z = cell.initial_state(u)
    assert [tuple(t.shape) for t in z] == [(2, 8, 16, 16), (2, 12, 8, 8), (2, 4, 4, 4)]
    assert [t.shape for t in cell(z, u)] == [t.shape for t in z]
    with torch.no_grad():
        out = Equilibrium(cell)(u)
    assert [t.shape for t in out] == [t.shape for t in z]
    with pytest.raises(ValueError, match=r"3 scales need .* divisible by 4, got 6×8"):
        cell.initial_state(torch.rand(1, 8, 6, 8))
    with pytest.raises(ValueError, match="channels 6 must be divisible by groups 4"):
        MDEQCell((6,))


def test_every_scale_acts_on_every_other() -> None:
    torch.manual_seed(0)
    cell = MDEQCell((4, 4, 4)).double()
    u = torch.rand(1, 4, 8, 8).double()
    z = tuple(torch.rand_like(t).requires_grad_() for t in cell.initial_state(u))
    for target in cell(z, u):
        grads = torch.autograd.grad(target.square().sum(), z, retain_graph=True)
        assert all(float(g.abs().max()) > 0 for g in grads)


def test_solver_and_gradient_are_settings() -> None:
    model = SMALL["conv"](solver=Anderson(tol=1e-2), adjoint=JacobianFree())
    assert model.equilibrium.solver == Anderson(tol=1e-2)
    assert model.equilibrium.adjoint == JacobianFree()
