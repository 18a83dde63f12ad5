"""deepinv's own deep equilibrium models, adapted in place."""

from __future__ import annotations

from typing import Any

import deepinv as dinv
import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import L2Ball, Nested, Status, adapt, optimize_input, unadapt


class Denoiser(nn.Module):
    """A mild one, so that the iteration contracts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, sigma: Any, **kwargs: Any) -> Tensor:
        return 0.6 * x + 0.1 * torch.tanh(self.conv(x))


class Seen(nn.Module):
    """Reconstructs what a mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.physics = dinv.physics.Inpainting(
            (1, 6, 6), mask=(torch.rand(1, 6, 6) > 0.3).double(), device="cpu"
        )
        self.model = dinv.optim.PGD(
            data_fidelity=dinv.optim.data_fidelity.L2(),
            prior=dinv.optim.prior.PnP(denoiser=Denoiser()),
            stepsize=0.5,
            sigma_denoiser=0.1,
            max_iter=60,
            unfold=True,
            DEQ=True,
        )

    def forward(self, y: Tensor) -> Tensor:
        return self.model(y, self.physics)


@pytest.mark.parametrize("kind", ["GD", "HQS", "MD", "PMD"])
def test_other_iterations(kind: str) -> None:
    model = Seen().eval().requires_grad_(False)
    model.model = getattr(dinv.optim, kind)(
        data_fidelity=dinv.optim.data_fidelity.L2(),
        prior=dinv.optim.prior.Tikhonov(),
        stepsize=0.5,
        lambda_reg=0.5,
        sigma_denoiser=0.1,
        max_iter=60,
        unfold=True,
        DEQ=True,
    )
    y = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    before = model(y)
    assert torch.equal(adapt(model)(y), before)
    found = optimize_input(
        model, y, lambda out: -out.square().flatten(1).sum(1), constraint=L2Ball(0.5)
    )
    assert bool((found.status == Status.CONVERGED).all())
    assert torch.allclose(found.output, model(found.x), atol=1e-4)


def test_a_model_with_deq_is_attacked_as_it_is() -> None:
    model = Seen().eval().requires_grad_(False)
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    y = model.physics(x)
    before, kind = model(y), type(model.model)
    assert torch.equal(adapt(model)(y), before)

    def far(out: Tensor) -> Tensor:
        return -(out - x).square().flatten(1).sum(1)

    found = optimize_input(model, y, far, constraint=L2Ball(0.5))
    nested = optimize_input(model, y, far, constraint=L2Ball(0.5), method=Nested())
    assert bool((found.status == Status.CONVERGED).all())
    assert float(found.value.mean()) <= 0.97 * float(nested.value.mean())
    assert float(found.value.mean()) < float(far(before).mean()) - 0.1
    assert torch.allclose(found.value, far(model(found.x)), rtol=1e-4)
    assert torch.equal(model(y), before)
    assert type(unadapt(model).model) is kind
    assert torch.equal(model(y), before)
