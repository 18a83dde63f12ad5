"""Equilibrium models with a task context: what a few-shot learner adapts instead of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.utils.parametrize import is_parametrized

from jiio_plugins.equilibrium.layer import Equilibrium
from jiio_plugins.models.mdeq import MDEQCell, ResidualBlock, _norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.adjoints import Adjoint
    from jiio_plugins.equilibrium.solvers import Solver

_SKIP = 0.3  # weight of the state in a block, against the injection
_FEATURES = 4.0  # about the length of a feature vector
_BOUND = 0.5  # of the modulation
_INJECTION = 3.0  # and how much larger than usual the injection starts


class FiLM(nn.Module):
    """``v -> (γ_1, β_1, …, γ_S, β_S)``: each scale's part of the context, through a linear map.

    There is no bias, so v = 0 modulates nothing. The result is bounded, so no v takes the cell far
    from a contraction: fitting a support set drives v to where f is hardest to solve.

    Args:
        channels: channels of each scale.
        context: entries of v, split over the scales in proportion to their channels.

    Shape:
        ``(rows, context) -> (rows, 2 Σ channels)``.

    Raises:
        ValueError: fewer entries than scales.

    Source: Perez et al., "FiLM" (AAAI 2018), and Zintgraf et al., "CAVIA" (ICML 2019), section 3.
    """

    def __init__(self, channels: Sequence[int], context: int) -> None:
        super().__init__()
        if context < len(channels):
            raise ValueError(
                f"context {context} is too small to be split over {len(channels)} scales"
            )
        ends = [round(context * sum(channels[:s]) / sum(channels)) for s in range(len(channels))]
        self.sizes = [b - a for a, b in zip(ends, [*ends[1:], context], strict=True)]
        self.maps = nn.ModuleList(
            nn.Linear(size, 2 * c, bias=False) for size, c in zip(self.sizes, channels, strict=True)
        )

    def forward(self, v: Tensor) -> Tensor:
        """All scales' γ and β side by side, ``(rows, 2 Σ channels)``."""
        parts = v.split(self.sizes, dim=1)
        film = torch.cat([to(part) for to, part in zip(self.maps, parts, strict=True)], dim=1)
        return _BOUND * torch.tanh(film / _BOUND)


class FiLMCell(MDEQCell):
    """:class:`MDEQCell` with modulated blocks: ``(1 + γ_s) · block_s(0.3 z_s, u_s) + β_s``.

    There is an injection u_s for every scale. The weights start where f is a contraction: small
    residual and cross-scale convolutions, identities after the fusion, a weak skip around a block.
    The non-linearity is smooth, since a meta-gradient differentiates f twice.

    Args:
        channels: channels of each scale, the finest first.
        expansion: widening inside a residual block.
        groups: groups of every GroupNorm.
    """

    def __init__(self, channels: Sequence[int], expansion: int = 1, groups: int = 1) -> None:
        super().__init__(channels, expansion, groups, nn.SiLU)
        with torch.no_grad():
            for block in self.blocks:
                _rescale(cast("ResidualBlock", block).conv2, 0.1)
            for conv in self.fuse.modules():
                _rescale(conv, 0.3)
            for post in self.post:
                conv = cast("nn.Sequential", post)[1]
                # assigning to a parametrised weight sets the parameters behind it
                conv.weight = nn.init.dirac_(torch.empty_like(cast("Tensor", conv.weight)))

    def initial_state(self, film: Tensor, *u: Tensor) -> tuple[Tensor, ...]:
        """Zeros at every scale.

        Args:
            film: not used.
            *u: one injection a scale. The first, ``(rows, channels[0], h, w)``, gives rows and
                size.
        """
        return super().initial_state(u[0])

    def forward(self, z: tuple[Tensor, ...], *injection: Tensor) -> tuple[Tensor, ...]:
        """One evaluation of f.

        Args:
            z: one state a scale, ``(rows, channels[s], h / 2ˢ, w / 2ˢ)``.
            *injection: γ and β, ``(rows, 2 Σ channels)``, then one u a scale, shaped like z.

        Returns:
            A state shaped like z.
        """
        film, *u = injection
        parts = film[:, :, None, None].split([k for c in self.channels for k in (c, c)], dim=1)
        out = []
        for s, block in enumerate(self.blocks):
            plain = block(_SKIP * z[s], u[s])
            out.append(torch.addcmul(plain + parts[2 * s + 1], parts[2 * s], plain))
        return self.fusion(out)


def _rescale(conv: nn.Module, factor: float) -> None:
    """Shrink the magnitude of a weight-normalised convolution."""
    if is_parametrized(conv, "weight"):
        conv.parametrizations.weight.original0.mul_(factor)  # type: ignore[union-attr, operator]


class TaskLinear(nn.Module):
    """A linear map whose weights broadcast over rows, so that each task can have its own.

    They are ``weight (1, outputs, inputs)`` and ``bias (1, outputs)``, or ``rows`` in place of 1.
    Both start at zero.

    Args:
        inputs: entries of a row that comes in.
        outputs: entries of a row that goes out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, inputs) -> (rows, outputs)``."""
        if len(self.weight) == 1:
            return linear(x, self.weight[0]) + self.bias
        return torch.baddbmm(self.bias[:, None], x[:, None], self.weight.mT).squeeze(1)


class MDEQFewShot(nn.Module):
    """Stem → multiscale equilibrium modulated by a task context → head. It returns logits.

    ``z* = f(z*, encoder(x), FiLM(v))``, ``logits = h(z*)``: v is the parameter ``context`` of shape
    ``(1, context)``, broadcast over the rows of a batch. A copy per row, ``(rows, context)``,
    serves several tasks at once. It starts at zero, where nothing is modulated.

    The defaults are a small size for a CPU. :meth:`paper` has the published one.

    Args:
        ways: classes of a task.
        in_channels: image channels.
        channels: channels of each scale, the finest first.
        context: entries of v (the paper: 400).
        stride: of the stem, 1, 2 or 4. The first scale has ``size / stride`` pixels a side. Images
            are padded with zeros until the last scale comes out even (28 to 32).
        expansion: of :class:`MDEQCell`.
        groups: likewise.
        solver: of the :class:`Equilibrium` layer ``self.equilibrium``. None: its default.
        adjoint: likewise.

    Shape:
        images ``(rows, in_channels, h, w)`` in [0, 1] → logits ``(rows, ways)``.

    Raises:
        ValueError: another stride, or a context smaller than the number of scales.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.4.
    """

    def __init__(
        self,
        *,
        ways: int = 5,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 16),
        context: int = 64,
        stride: int = 4,
        expansion: int = 1,
        groups: int = 1,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stride must be 1, 2 or 4, got {stride}")
        first = channels[0]
        self.multiple = stride * 2 ** (len(channels) - 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, first, 5, stride=2 if stride > 1 else 1, padding=2, bias=False),
            _norm(first, groups),
            nn.SiLU(),
            nn.Conv2d(first, first, 3, stride=max(1, stride // 2), padding=1, bias=False),
        )
        with torch.no_grad():
            cast("Tensor", self.encoder[-1].weight).mul_(_INJECTION)
        self.inject = nn.ModuleList(
            nn.Sequential(nn.AvgPool2d(2**s), nn.Conv2d(first, c, 1, bias=False))
            for s, c in enumerate(channels)
            if s
        )
        for to in self.inject.modules():
            if isinstance(to, nn.Conv2d):  # as strong an injection as at the first scale
                nn.init.orthogonal_(to.weight)
        self.context = nn.Parameter(torch.zeros(1, context))
        self.film = FiLM(channels, context)
        cell = FiLMCell(channels, expansion, groups)
        self.equilibrium = Equilibrium(cell, solver=solver, adjoint=adjoint)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = TaskLinear(4 * sum(channels), ways)

    @classmethod
    def paper(cls, **settings: Any) -> MDEQFewShot:
        """The published size: context 400, two scales of 24 channels, expansion 5, 28 × 28.

        Args:
            **settings: arguments of the class, in place of the published ones.
        """
        return cls(
            **{"channels": (24, 24), "context": 400, "stride": 1, "expansion": 5, **settings}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(rows, ways)``."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """What the head is linear in, ``(rows, 4 Σ channels)``.

        It is the equilibrium, averaged to 2 × 2 at each scale.
        """
        bottom, right = (-n % self.multiple for n in x.shape[2:])
        top, left = bottom // 2, right // 2
        u = self.encoder(pad(x, (left, right - left, top, bottom - top)))
        film = self.film(self.context).expand(len(u), -1)
        z = self.equilibrium(film, u, *(to(u) for to in self.inject))
        pooled = torch.cat([self.pool(part).flatten(1) for part in z], dim=1)
        scale: float = _FEATURES / pooled.shape[1] ** 0.5
        return pooled * scale


class SinusoidCell(nn.Module):
    """``f(z, u, v) = tanh(W z + u + C v)`` with ``‖W‖ ≤ contraction``.

    Args:
        width: entries of the state.
        context: entries of v.
        contraction: bound on the Frobenius norm of W. Below 1, f contracts.
    """

    def __init__(self, width: int, context: int, contraction: float = 0.9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.modulate = nn.Linear(context, width, bias=False)
        self.contraction = contraction

    def forward(self, z: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """One evaluation of f.

        Args:
            z: state, ``(rows, width)``.
            u: injection, ``(rows, width)``.
            v: context, ``(rows, context)``.
        """
        # the Frobenius norm bounds the spectral one
        weight = self.weight * (self.contraction / self.weight.norm().clamp(min=self.contraction))
        return torch.tanh(z @ weight.T + u + self.modulate(v))


class SinusoidDEQ(nn.Module):
    """Regression ``(rows, 1) -> (rows, 1)`` with a task context: the smallest few-shot model.

    Args:
        width: entries of the state.
        context: entries of v, the parameter ``context`` of shape ``(1, context)``.
        solver: of the :class:`Equilibrium` layer ``self.equilibrium``.
        adjoint: likewise.

    Source: the task is that of Finn, Abbeel and Levine, "MAML" (ICML 2017), section 5.1.
    """

    def __init__(
        self,
        *,
        width: int = 40,
        context: int = 8,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width))
        self.context = nn.Parameter(torch.zeros(1, context))
        self.equilibrium = Equilibrium(SinusoidCell(width, context), solver=solver, adjoint=adjoint)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions ``(rows, 1)``."""
        v = self.context.expand(len(x), -1)
        prediction: Tensor = self.head(self.equilibrium(self.encoder(x), v))
        return prediction
