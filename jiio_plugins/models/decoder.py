"""A generator with an equilibrium: latent → multiscale injection → equilibrium → image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from jiio_plugins.equilibrium.layer import Equilibrium
from jiio_plugins.models.mdeq import MDEQCell, Padding, make_contractive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.adjoints import Adjoint
    from jiio_plugins.equilibrium.solvers import Solver


class _Bilinear(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        if self.times == 1:
            return x
        return interpolate(x, scale_factor=self.times, mode="bilinear", align_corners=False)


class MDEQDecoder(nn.Module):
    """Generator ``w → h(z*)`` with ``z* = f(z*, inject(w))``. Its images lie in [0, 1].

    The latent becomes a map first. A vector goes through a linear layer, at the coarsest scale. A
    spatial latent goes through a 3×3 convolution and a pixel shuffle, at the finest scale: an
    upsampling that treats all places alike could not draw anything smaller than a site of the
    latent. A 1×1 convolution and bilinear resizing bring the map to every scale of the
    :class:`MDEQCell`, so coarse and fine states both see it. The image is read off the finest
    scale.

    Args:
        latent_shape: ``d`` for a vector, or ``(c, h, w)`` for a spatial latent.
        image_shape: ``(channels, height, width)``, in pixels.
        channels: channels of each scale, the finest first. The paper's generator is
            ``(32, 64, 128, 256)`` with ``latent_shape=128``, ``image_shape=(3, 64, 64)`` and
            ``stride=1``.
        stride: the finest scale has ``height / stride × width / stride`` sites. The
            head makes pixels of them. An image whose sides are no multiple of that, or of what
            all scales need, is cut out of the middle of a larger one.
        upsampling: "shuffle", where a pixel shuffle in the head makes pixels of sites, or
            "bilinear", which leaves no grid.
        expansion: of :class:`MDEQCell`.
        groups: likewise.
        padding: likewise, and of the head.
        solver: of the :class:`Equilibrium` layer ``self.equilibrium``. None: its default.
        adjoint: likewise.

    Attributes:
        latent_shape: shape of one latent, a tuple.
        image_shape: shape of one image, a tuple.

    Shape:
        latents ``(rows, *latent_shape)`` → images ``(rows, *image_shape)`` in [0, 1].

    Raises:
        ValueError: shapes of other lengths, or latents of another shape.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.1. The cell is that of
    Bai, Koltun and Kolter (NeurIPS 2020).
    """

    def __init__(
        self,
        *,
        latent_shape: int | Sequence[int] = 64,
        image_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (16, 32),
        stride: int = 2,
        expansion: int = 2,
        groups: int = 4,
        padding: Padding = "zeros",
        upsampling: Literal["shuffle", "bilinear"] = "shuffle",
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        self.latent_shape = (
            (latent_shape,) if isinstance(latent_shape, int) else tuple(latent_shape)
        )
        self.image_shape = tuple(image_shape)
        if len(self.latent_shape) not in (1, 3) or len(self.image_shape) != 3:
            raise ValueError(
                "latent_shape must be d or (c, h, w) and image_shape (channels, height, width), "
                f"got {self.latent_shape} and {self.image_shape}"
            )
        colours, height, width = self.image_shape
        coarsest = stride * 2 ** (len(channels) - 1)  # pixels of a site of the coarsest scale
        rows, columns = -(-height // coarsest), -(-width // coarsest)
        self.sizes = [(rows * 2**s, columns * 2**s) for s in reversed(range(len(channels)))]
        self.margin = (rows * coarsest - height) // 2, (columns * coarsest - width) // 2
        if len(self.latent_shape) == 1:
            width, size = channels[-1], self.sizes[-1]
            self.embed = nn.Sequential(
                nn.Linear(self.latent_shape[0], width * size[0] * size[1]),
                nn.Unflatten(1, (width, *size)),
            )
        else:
            width = channels[0]
            pairs = zip(self.sizes[0], self.latent_shape[1:], strict=True)
            times = max(1, min(fine // own for fine, own in pairs))
            self.embed = nn.Sequential(
                nn.Conv2d(
                    self.latent_shape[0], width * times**2, 3, padding=1, padding_mode=padding
                ),
                nn.PixelShuffle(times),
            )
        self.inject = nn.ModuleList(nn.Conv2d(width, c, 1) for c in channels)
        cell = MDEQCell(channels, expansion, groups, padding=padding)
        make_contractive(cell)
        self.equilibrium = Equilibrium(cell, solver=solver, adjoint=adjoint)
        wide = max(8, channels[0] // stride)
        first = wide * stride**2 if upsampling == "shuffle" else wide
        finer = nn.PixelShuffle(stride) if upsampling == "shuffle" else _Bilinear(stride)
        self.head = nn.Sequential(
            nn.Conv2d(channels[0], first, 3, padding=1, padding_mode=padding),
            finer,
            nn.ReLU(),
            nn.Conv2d(wide, colours, 3, padding=1, padding_mode=padding),
            nn.Sigmoid(),
        )

    def injection(self, w: Tensor) -> tuple[Tensor, ...]:
        """What the cell sees of the latents ``(rows, *latent_shape)``.

        Returns:
            One tensor a scale, ``(rows, channels[s], h_s, w_s)``.

        Raises:
            ValueError: latents of another shape.
        """
        if w.shape[1:] != self.latent_shape:
            raise ValueError(
                f"latents must have shape (rows, {', '.join(map(str, self.latent_shape))}), "
                f"got {tuple(w.shape)}"
            )
        embedded = self.embed(w)
        return tuple(
            interpolate(conv(embedded), size, mode="bilinear", align_corners=False)
            for conv, size in zip(self.inject, self.sizes, strict=True)
        )

    def decode(self, z: tuple[Tensor, ...]) -> Tensor:
        """The head h: images ``(rows, *image_shape)`` of a state, read off its finest scale."""
        image: Tensor = self.head(z[0])
        (top, left), (_, height, width) = self.margin, self.image_shape
        return image[..., top : top + height, left : left + width]

    def forward(self, w: Tensor) -> Tensor:
        """Images ``(rows, *image_shape)`` in [0, 1]."""
        return self.decode(self.equilibrium(*self.injection(w)))

    def zeros(self, rows: int) -> Tensor:
        """``rows`` latents at zero, on the model's device and in its dtype: where a fit starts."""
        p = next(self.parameters())
        return torch.zeros(rows, *self.latent_shape, device=p.device, dtype=p.dtype)
