"""What knows of an image before JIIO looks: a guess, and how far off it may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from jiio_deepinv._checks import shapes

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics

LEAST = 1e-3  # of the largest std; a half precision's sigmoid ends at zero
FIRST = 1 / (1 + math.exp(3))  # std of a new one, or half of the largest


class GaussianEncoder(nn.Module):
    """``w ~ N(m, diag s²)``: m is a guess from y, s how far off it may be.

    ``m = guess(y, physics)``, ``s = largest · sigmoid(spread([m, e]) + offset)``.

    e is what of y the guess leaves over, ``Aᵀ(y − A(m))`` or ``A⁺(y − A(m))``. As ``encoder`` of a
    :class:`JIIOReconstructor` whose latents are images, it says where the measurements may still
    change a guess: at edges more than in an empty background. With ``latent_penalty=1`` and a
    likelihood as data term the reconstruction is the mode under the prior N(m, diag s²), which the
    networks predict from y.

    s is learned end to end, from the reconstruction's own loss. The offset lets a new one's be
    around 0.05, or half of ``largest`` if that is less. It does not fall below 0.001 of it.

    Args:
        guess: any deepinv network that is called with y and physics: an ``ArtifactRemoval``, an
            unfolded algorithm.
        spread: an image network of twice the channels to the channels of an image, such as
            ``dinv.models.UNet(2, 1, residual=False, batch_norm=False)``.
        mode: "adjoint" or "pinv": how e comes back from the measurements.
        largest: in units of the image. A few times the error of the guess is enough. The
            iterations take longer the larger s is against the noise. Where they end early, and with
            them a loose gradient, s can come to stay large.

    Shape:
        y as the physics makes it → two of ``(rows, c, h, w)``, real.

    Raises:
        ValueError: another mode, or a largest that is not positive. When called, what does not fit.

    Not for: complex images (MRI in deepinv has two real channels), physics without an adjoint.

    Source: mean and standard deviation from a network as in Kingma and Welling (ICLR 2014).
    """

    def __init__(
        self,
        guess: nn.Module,
        spread: nn.Module,
        *,
        mode: Literal["adjoint", "pinv"] = "adjoint",
        largest: float = 1.0,
    ) -> None:
        super().__init__()
        if mode not in ("adjoint", "pinv"):
            raise ValueError(f'mode must be "adjoint" or "pinv", got {mode!r}')
        if not 0 < largest < float("inf"):
            raise ValueError(f"largest must be a positive number, got {largest}")
        self.guess, self.spread = guess, spread
        self.mode, self.largest = mode, largest
        first = min(FIRST / largest, 0.5)
        self._offset = math.log(first / (1 - first))

    def forward(self, y: Any, physics: LinearPhysics) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each ``(rows, c, h, w)``.

        Args:
            y: measurements, as the physics makes them.
            physics: the forward model A, which has an adjoint.

        Raises:
            ValueError: physics without an adjoint, a guess that does not fit y, complex images.
        """
        if not hasattr(physics, "A_adjoint"):
            raise ValueError(
                f"GaussianEncoder needs a physics with an adjoint, {type(physics).__name__} has "
                "none: write an encoder that returns (mean, std)"
            )
        mean = self.guess(y, physics)
        seen = physics.A(mean)
        if shapes(seen) != shapes(y):
            raise ValueError(
                f"the guess does not fit y: A(guess) has shape {shapes(seen)}, y has {shapes(y)}"
            )
        left = y - seen
        back = physics.A_dagger(left) if self.mode == "pinv" else physics.A_adjoint(left)
        if mean.is_complex() or back.is_complex():
            raise ValueError(
                "GaussianEncoder is for real images: let the guess, and the physics' adjoint, have "
                "real and imaginary parts as channels"
            )
        share = torch.sigmoid(self.spread(torch.cat([mean, back], dim=1)) + self._offset)
        return mean, self.largest * (LEAST + (1 - LEAST) * share)
