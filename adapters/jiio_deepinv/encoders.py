"""What knows of an image before JIIO looks: a guess, and how far off it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics


class GaussianEncoder(nn.Module):
    """``u ~ N(m, diag s²)``, ``m = guess(y, physics)``, ``s = σ_max sigmoid(spread([m, r]) − 3)``.

    r is what of y the guess leaves over, ``Aᵀ(y − A(m))`` or ``A⁺(y − A(m))``. As ``encoder`` of a
    :class:`JIIOReconstructor` whose latents are images, it says where the measurements may still
    change a guess: at edges more than in an empty background. With ``latent_penalty=1`` and a
    likelihood as data term the reconstruction is then the mode of u given y. A new one's s is about
    ``0.05 σ_max`` everywhere; s is learned end to end, from the reconstruction's own loss.

    Args:
        guess: any deepinv network that is called with y and physics: an ``ArtifactRemoval``, an
            unfolded algorithm.
        spread: an image network of twice the channels to the channels of an image, such as
            ``dinv.models.UNet(2, 1, residual=False)``.
        mode: "adjoint" or "pinv": how r comes back from the measurements.
        largest: σ_max, in units of the image.

    Shape:
        y as the physics makes it → two of ``(B, C, H, W)``, real.

    Raises:
        ValueError: another mode, a σ_max that is not positive.

    Source: the learned prior of a linear Gaussian model; the whole is trained as a variational
        encoder's mean and standard deviation are (Kingma and Welling, ICLR 2014, appendix C).
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

    def forward(self, y: Any, physics: LinearPhysics) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        mean = self.guess(y, physics)
        left = y - physics.A(mean)
        back = physics.A_dagger(left) if self.mode == "pinv" else physics.A_adjoint(left)
        std = torch.sigmoid(self.spread(torch.cat([mean, back], dim=1)) - 3)
        return mean, self.largest * std
