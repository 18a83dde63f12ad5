"""A generator whose latents are images, for problems where an encoder has a first guess."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from jiio_plugins.equilibrium.layer import Equilibrium
from jiio_plugins.models.mdeq import MDEQCell, check_sizes, make_contractive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.adjoints import Adjoint
    from jiio_plugins.equilibrium.solvers import Solver


class MDEQRefiner(nn.Module):
    """Generator ``w → w + h(z*)`` with ``z* = f(z*, inject(w))``: w is an image, z* corrects it.

    The last layer of h is zero at first, so a new one is the identity. Put behind a trained encoder
    it starts where that is, and it learns how images differ from guesses. The cell of a new one
    contracts, on images between 0 and 1.

    Args:
        image_shape: ``(channels, height, width)`` in pixels, of latents and images.
        channels: channels of each scale of the :class:`MDEQCell`, the finest first.
        stride: the finest scale has ``height / stride`` pixels.
        expansion: of :class:`MDEQCell`.
        groups: likewise.
        solver: of the :class:`Equilibrium` layer ``self.equilibrium``. None: its default.
        adjoint: likewise.

    Attributes:
        latent_shape: ``image_shape``.

    Shape:
        ``(rows, *image_shape)`` → the same, not bounded.

    Raises:
        ValueError: sizes that do not divide, or latents of another shape.

    Source: the cell is that of Bai, Koltun and Kolter (NeurIPS 2020).
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        *,
        channels: Sequence[int] = (16,),
        stride: int = 2,
        expansion: int = 2,
        groups: int = 4,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = self.latent_shape = tuple(image_shape)
        colours, height, width = self.image_shape
        check_sizes(height, width, len(channels), stride)
        finest, wide = channels[0], max(8, channels[0] // stride)
        self.embed = nn.Sequential(
            nn.PixelUnshuffle(stride), nn.Conv2d(colours * stride**2, finest, 3, padding=1)
        )
        self.inject = nn.ModuleList(nn.Conv2d(finest, c, 1) for c in channels)
        with torch.no_grad():  # the small numbers of an image are to outweigh the state
            for conv in self.inject:
                for p in conv.parameters():
                    p.mul_(10)
        cell = MDEQCell(channels, expansion, groups)
        make_contractive(cell, state=0.2)
        self.equilibrium = Equilibrium(cell, solver=solver, adjoint=adjoint)
        last = nn.Conv2d(wide, colours, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.head = nn.Sequential(
            nn.Conv2d(finest, wide * stride**2, 3, padding=1),
            nn.PixelShuffle(stride),
            nn.ReLU(),
            last,
        )

    def injection(self, w: Tensor) -> tuple[Tensor, ...]:
        """What the cell sees of the latents at each scale, ``(rows, channels[s], h_s, w_s)``."""
        embedded = self.embed(w)
        return tuple(avg_pool2d(conv(embedded), 2**s) for s, conv in enumerate(self.inject))

    def forward(self, w: Tensor) -> Tensor:
        """Images of the latents' shape."""
        if tuple(w.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"latents must have shape (rows, {', '.join(map(str, self.latent_shape))}), got "
                f"{tuple(w.shape)}"
            )
        corrected: Tensor = w + self.head(self.equilibrium(*self.injection(w))[0])
        return corrected
