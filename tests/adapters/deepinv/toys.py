"""Small generators for any image, a reconstructor of them, and measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepinv.physics import Denoising, GaussianNoise, Physics
from torch import Tensor, nn

from jiio_deepinv import JIIOReconstructor
from jiio_plugins import Equilibrium
from tests.helpers import TIGHT, TanhCell, linear, rand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins import Solver

SHAPE = (1, 4, 4)


class Generator(nn.Module):
    """``w -> σ(W z* + b)`` with ``z* = tanh(V z* + E w)``; with a complex dtype ``σ(...)`` twice.

    In float64 and solved tightly, whatever the images' dtype.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 4, 4),
        *,
        latent_shape: Sequence[int] = (3,),
        dtype: torch.dtype = torch.float64,
        n: int = 8,
        seed: int = 0,
        solver: Solver = TIGHT,
    ) -> None:
        super().__init__()
        self.latent_shape, self.image_shape = tuple(latent_shape), tuple(image_shape)
        self.dtype = dtype
        pixels = torch.Size(image_shape).numel() * (1 + dtype.is_complex)
        self.embed = linear(torch.Size(latent_shape).numel(), n, seed + 1)
        self.equilibrium = Equilibrium(TanhCell(n, 0.5, seed + 2), solver=solver)
        self.head = linear(n, pixels, seed + 3)

    def forward(self, w: Tensor) -> Tensor:
        flat = torch.sigmoid(self.head(self.equilibrium(self.embed(w.flatten(1)))))
        if self.dtype.is_complex:
            images = torch.view_as_complex(flat.reshape(len(w), *self.image_shape, 2))
        else:
            images = flat.reshape(len(w), *self.image_shape)
        return images.to(self.dtype)


class Encoder(nn.Module):
    """A linear guess of the latents from y as an image."""

    def __init__(self, image_shape: Sequence[int] = (1, 4, 4), latent: int = 3) -> None:
        super().__init__()
        self.linear = linear(torch.Size(image_shape).numel(), latent, 11)

    def forward(self, y: Tensor, physics: Physics) -> Tensor:
        guess: Tensor = self.linear(physics.A_adjoint(y).flatten(1))
        return guess


class Spread(Encoder):
    """A linear guess, and how far off it may be, different in each latent."""

    def __init__(self, image_shape: Sequence[int] = (1, 4, 4), latent: int = 3) -> None:
        super().__init__(image_shape, latent)
        self.log_std = nn.Parameter(torch.linspace(-1, 1, latent, dtype=torch.float64))

    def forward(self, y: Tensor, physics: Physics) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean = super().forward(y, physics)
        return mean, self.log_std.exp() * (1 + mean.square())


def reconstructor(image_shape: Sequence[int] = (1, 4, 4), **kwargs: Any) -> JIIOReconstructor:
    """Of a float64 toy generator, unless ``generator=`` is given."""
    generator = kwargs.pop("generator", None)
    return JIIOReconstructor(generator or Generator(image_shape), **kwargs)


def measured(physics: Physics | None = None, batch: int = 2) -> tuple[Tensor, Tensor, Physics]:
    """True images in the generator's range, their measurements and the physics."""
    physics = physics or Denoising(GaussianNoise(0.1, rng=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        x = Generator(SHAPE)(rand(batch, 3, seed=7))
        return x, physics(x), physics
