"""A single-scale convolutional DEQ: the smallest image classifier with an equilibrium."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.layer import Equilibrium

if TYPE_CHECKING:
    from jiio_plugins.equilibrium.adjoints import Adjoint
    from jiio_plugins.equilibrium.solvers import Solver


class ConvCell(nn.Module):
    """``f(z, u) = GN(relu(z + GN(u + conv(relu(GN(conv z))))))``, GN a GroupNorm.

    Args:
        channels: channels of state and injection.
        groups: groups of every GroupNorm, a divisor of ``channels``.
    """

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """One evaluation of f.

        Args:
            z: state, ``(rows, channels, h, w)``.
            u: injection, of the same shape.

        Returns:
            ``f(z, u)``, of the same shape.
        """
        out = self.conv2(torch.relu(self.norm1(self.conv1(z))))
        mixed: Tensor = self.norm3(torch.relu(z + self.norm2(u + out)))
        return mixed


class ConvDEQClassifier(nn.Module):
    """Strided stem → :class:`ConvCell` equilibrium → pooled linear head. It returns logits.

    Args:
        in_channels: image channels.
        classes: number of classes.
        channels: channels of the state.
        stride: of the stem. The state has about ``h / stride × w / stride`` sites.
        groups: of :class:`ConvCell`.
        solver: of the :class:`Equilibrium` layer ``self.equilibrium``. None: its default.
        adjoint: likewise.

    Shape:
        images ``(rows, in_channels, h, w)`` in [0, 1] → logits ``(rows, classes)``.

    Source: Kolter, Duvenaud and Johnson, "Deep Implicit Layers" (NeurIPS 2020 tutorial), chapter 4.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        classes: int = 10,
        channels: int = 24,
        stride: int = 2,
        groups: int = 4,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.equilibrium = Equilibrium(ConvCell(channels, groups), solver=solver, adjoint=adjoint)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(rows, classes)``."""
        logits: Tensor = self.head(self.equilibrium(self.encoder(x)))
        return logits
