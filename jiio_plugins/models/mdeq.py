"""Multiscale deep equilibrium model, after Bai, Koltun and Kolter (NeurIPS 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from jiio_plugins.equilibrium.layer import Equilibrium

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.equilibrium.adjoints import Adjoint
    from jiio_plugins.equilibrium.solvers import Solver

    Activation = Callable[[], nn.Module]

Padding = Literal["zeros", "replicate"]


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, padding: Padding = "zeros"
) -> nn.Module:
    conv = nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=kernel // 2,
        bias=False,
        padding_mode=padding,
    )
    nn.init.normal_(conv.weight, std=0.5 / (inputs * kernel * kernel) ** 0.5)
    wrapped: nn.Module = weight_norm(conv)
    return wrapped


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    if channels % groups:
        raise ValueError(f"channels {channels} must be divisible by groups {groups}")
    return nn.GroupNorm(groups, channels)


def check_sizes(height: int, width: int, scales: int, stride: int) -> None:
    """Raise unless every scale has whole pixels.

    Args:
        height: of the images, in pixels.
        width: likewise.
        scales: number of scales, each half as large as the one before.
        stride: pixels of an image for one of the finest scale, along a side.

    Raises:
        ValueError: says what height and width must be divisible by.
    """
    factor = stride * 2 ** (scales - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"{scales} scales at stride {stride} need a height and width divisible by "
            f"{factor}, got {height}×{width}"
        )


class ResidualBlock(nn.Module):
    """``GN(relu(z + GN(conv(relu(GN(conv z))) + u)))`` at one scale.

    Args:
        channels: channels of state and injection.
        expansion: the first convolution has ``expansion · channels`` outputs.
        groups: groups of every GroupNorm.
        activation: class of the non-linearity, in place of relu.
        padding: of the convolutions.
    """

    def __init__(
        self,
        channels: int,
        expansion: int,
        groups: int,
        activation: Activation = nn.ReLU,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        self.activation = activation()
        wide = channels * expansion
        self.conv1 = _conv(channels, wide, 3, padding=padding)
        self.norm1 = _norm(wide, groups)
        self.conv2 = _conv(wide, channels, 3, padding=padding)
        self.norm2 = _norm(channels, groups)
        self.norm3 = _norm(channels, groups)

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        """One evaluation of the block.

        Args:
            z: state of this scale, ``(rows, channels, h, w)``.
            u: what is injected there, of the same shape. None: nothing.
        """
        out = self.conv2(self.activation(self.norm1(self.conv1(z))))
        out = self.norm2(out if u is None else out + u)
        mixed: Tensor = self.norm3(self.activation(out + z))
        return mixed


class MDEQCell(nn.Module):
    """``f((z_1 … z_S), u_1, …)``: a residual block per scale, then cross-scale fusion.

    Scale s has half the resolution of scale s − 1. Fusion brings every scale to every other one
    (strided 3×3 convolutions down, a 1×1 convolution and nearest upsampling up) and adds them up.

    Args:
        channels: channels of each scale, the finest first.
        expansion: widening inside a residual block (the paper: 5).
        groups: groups of every GroupNorm, a divisor of all channels.
        activation: class of the non-linearity.
        padding: of the convolutions. With "replicate" a picture that is read off the state has no
            frame.

    Raises:
        ValueError: an expansion or groups below 1, or groups that do not divide the channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        expansion: int = 2,
        groups: int = 4,
        activation: Activation = nn.ReLU,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        if expansion < 1 or groups < 1:
            raise ValueError(f"expansion and groups must be at least 1, got {expansion}, {groups}")
        self.channels, self.activation, self.padding = tuple(channels), activation, padding
        self.blocks = nn.ModuleList(
            ResidualBlock(c, expansion, groups, activation, padding) for c in channels
        )
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._transfer(i, j) for i in range(len(channels)))
            for j in range(len(channels))
        )
        self.post = nn.ModuleList(
            nn.Sequential(activation(), _conv(c, c, 1), _norm(c, groups)) for c in channels
        )

    def _transfer(self, source: int, target: int) -> nn.Module:
        """From scale ``source`` to scale ``target``."""
        a, b = self.channels[source], self.channels[target]
        if source == target:
            return nn.Identity()
        if source > target:
            scale = 2 ** (source - target)
            return nn.Sequential(_conv(a, b, 1), nn.Upsample(scale_factor=scale, mode="nearest"))
        steps: list[nn.Module] = []
        for k in range(target - source):
            last = k + 1 == target - source
            steps.append(_conv(a, b if last else a, 3, 2, self.padding))
            if not last:
                steps.append(self.activation())
        return nn.Sequential(*steps)

    def initial_state(self, u: Tensor, *coarser: Tensor) -> tuple[Tensor, ...]:
        """Zeros at every scale, ``(rows, channels[s], h / 2ˢ, w / 2ˢ)``.

        Args:
            u: injection of the finest scale, ``(rows, channels[0], h, w)``.
            *coarser: those of the others, not used.

        Raises:
            ValueError: a height or width that cannot be halved for every scale.
        """
        rows, _, height, width = u.shape
        factor = 2 ** (len(self.channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"{len(self.channels)} scales need a height and width divisible by {factor}, "
                f"got {height}×{width}"
            )
        return tuple(
            u.new_zeros(rows, c, height // 2**s, width // 2**s) for s, c in enumerate(self.channels)
        )

    def forward(self, z: tuple[Tensor, ...], *u: Tensor) -> tuple[Tensor, ...]:
        """One evaluation of f.

        Args:
            z: one state a scale, ``(rows, channels[s], h / 2ˢ, w / 2ˢ)``.
            *u: injections of the first scales, shaped like their states. The other scales get none.

        Returns:
            A state shaped like z.
        """
        return self.fusion(
            [block(z[s], u[s] if s < len(u) else None) for s, block in enumerate(self.blocks)]
        )

    def fusion(self, out: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sum of all scales at every scale, each brought to its size."""
        fused = []
        for row, post in zip(self.fuse, self.post, strict=True):
            transfers = cast("nn.ModuleList", row)
            parts = [transfer(part) for transfer, part in zip(transfers, out, strict=True)]
            fused.append(post(sum(parts)))
        return tuple(fused)


@torch.no_grad()
def make_contractive(cell: MDEQCell, state: float = 0.4) -> None:
    """Shrink the residual branch, and the state to a root mean square of ``state``.

    A latent fit through a cell that does not contract learns nothing. A freshly made one does not
    contract: its ``‖J_z‖²_F / n`` is 1.1, and 0.3 after this.

    Args:
        cell: changed in place.
        state: root mean square of each entry of the state.
    """
    for block in cell.blocks:
        conv, gain = cast("ResidualBlock", block).conv2, 0.3
        # weight normalisation keeps the weight's magnitude in original0
        conv.parametrizations.weight.original0.mul_(gain)  # type: ignore[union-attr,operator]
    for post in cell.post:
        # what a GroupNorm puts out has the root mean square of its weight
        cast("nn.GroupNorm", cast("nn.Sequential", post)[2]).weight.fill_(state)


class MDEQClassifier(nn.Module):
    """Stem → multiscale equilibrium → head. It returns logits.

    Args:
        in_channels: image channels.
        classes: number of classes.
        channels: channels of each scale, the finest first.
        stride: of the stem. The first scale has ``size / stride`` pixels a side.
        expansion: of :class:`MDEQCell`.
        groups: likewise.
        solver: of the :class:`Equilibrium` layer ``self.equilibrium``. None: its default.
        adjoint: likewise.

    Shape:
        images ``(rows, in_channels, h, w)`` in [0, 1] → logits ``(rows, classes)``.

    Source: Bai, Koltun and Kolter, "Multiscale Deep Equilibrium Models" (NeurIPS 2020), figure 1.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        classes: int = 10,
        channels: Sequence[int] = (16, 16),
        stride: int = 1,
        expansion: int = 2,
        groups: int = 4,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        first = channels[0]
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, first, 3, stride=stride, padding=1, bias=False),
            _norm(first, groups),
            nn.ReLU(),
            nn.Conv2d(first, first, 3, padding=1, bias=False),
        )
        cell = MDEQCell(channels, expansion, groups)
        self.equilibrium = Equilibrium(cell, solver=solver, adjoint=adjoint)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 2 * c, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
            for c in channels
        )
        self.classifier = nn.Linear(8 * sum(channels), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(rows, classes)``."""
        return self.decode(self.equilibrium(self.encoder(x)))

    def decode(self, z: tuple[Tensor, ...]) -> Tensor:
        """Logits ``(rows, classes)`` of a state: the head h."""
        pooled = [head(part).flatten(1) for head, part in zip(self.heads, z, strict=True)]
        logits: Tensor = self.classifier(torch.cat(pooled, dim=1))
        return logits
