"""A threat model: how far an adversary may change an image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from jiio_plugins.constraints import Box, Constraint, Intersection, L1Ball, L2Ball, LinfBall

if TYPE_CHECKING:
    from collections.abc import Callable

BALLS: dict[float, Callable[..., Constraint]] = {1.0: L1Ball, 2.0: L2Ball, math.inf: LinfBall}


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """``{x′ : ‖x′ − x‖_p ≤ ε, lower ≤ x′ ≤ upper, x′ = x off the mask}`` around an image x.

    Args:
        norm: p, which is 1, 2 or inf. "inf", as hosts write it, is accepted too.
        eps: ε in the units of x, a number or one per sample, ``(rows,)``.
        lower: a number or broadcastable to x. None: no bound.
        upper: likewise.
        mask: broadcastable to x. Entries where it is 0 or False keep their value. None: all may
            change.

    Raises:
        ValueError: another norm.
    """

    norm: float
    eps: float | Tensor
    lower: float | Tensor | None = None
    upper: float | Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        try:
            norm = float(self.norm)
        except (TypeError, ValueError):
            norm = math.nan
        if norm not in BALLS:
            raise ValueError(f"norm must be 1, 2 or inf, got {self.norm!r}")
        object.__setattr__(self, "norm", norm)

    @property
    def span(self) -> float:
        """Width of the box where it is widest, in the units of x. Inf without one."""
        if self.lower is None or self.upper is None:
            return math.inf
        return float((torch.as_tensor(self.upper) - torch.as_tensor(self.lower)).max())

    @property
    def box(self) -> Box | None:
        """The box alone. None without bounds."""
        if self.lower is None and self.upper is None:
            return None
        low = -math.inf if self.lower is None else self.lower
        return Box(low, math.inf if self.upper is None else self.upper)

    def within(self, eps: float | Tensor, norm: float | None = None) -> Self:
        """The threat model with another ball.

        Args:
            eps: ε in the units of x, a number or one per sample, ``(rows,)``.
            norm: p. None: as it is.
        """
        return replace(self, eps=eps, norm=self.norm if norm is None else norm)

    def around(self, x: Tensor) -> Intersection:
        """The set around images x ``(rows, ...)``.

        Raises:
            ValueError: x lies outside of the box.
        """
        ball = BALLS[self.norm](self.eps, x.detach(), mask=self.mask)
        self.check_clean(x)
        return Intersection(ball) if self.box is None else Intersection(ball, self.box)

    def check_clean(self, x: Tensor) -> None:
        """Raise unless ``lower ≤ x ≤ upper``.

        Raises:
            ValueError: it is not.
        """
        if self.box is None:
            return
        low, high = (torch.as_tensor(b).to(x) for b in (self.box.lower, self.box.upper))
        if bool(((x < low) | (x > high)).any()):
            raise ValueError(
                f"x must lie within the box [{self.box.lower}, {self.box.upper}], got values from "
                f"{float(x.min()):g} to {float(x.max()):g}: scale or clip the images first"
            )

    def check(self, name: str, found: Any, x: Tensor) -> Tensor:
        """What an attack returned, if it is images of the same shape within ball and box.

        The only slack is rounding: 1e-5 ε, and four units in the last place of every pixel. The
        mask is not looked at.

        Args:
            name: of the attack, for the messages.
            found: what it returned.
            x: what it was given, ``(rows, ...)``.

        Returns:
            The images, clipped to the box.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape, NaN or Inf, outside the ball or the box.
        """
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"the attack {name!r} must return a floating-point tensor, got {got}")
        if found.shape != x.shape:
            raise ValueError(
                f"the attack {name!r} must return images of the shape it was given, "
                f"{tuple(x.shape)}, got {tuple(found.shape)}"
            )
        images: Tensor = found.detach().to(x.device, x.dtype)
        if not bool(torch.isfinite(images).all()):
            raise ValueError(f"the attack {name!r} returned NaN or Inf")
        # in float64, as the difference of two float32 images rounds once more
        moved, eps = (images.double() - x.double()).flatten(1), torch.as_tensor(self.eps).to(x)
        size = torch.linalg.vector_norm(moved, ord=self.norm, dim=1)
        rounding = 4 * torch.finfo(x.dtype).eps * (float(x.abs().max()) + eps)
        excess = size - eps * (1 + 1e-5) - rounding * x[0].numel() ** (1 / self.norm)
        if bool((excess > 0).any()):
            worst = int(excess.argmax())
            raise ValueError(
                f"the attack {name!r} left the ball: ‖x_adv − x‖ = {float(size[worst]):.6g} in the "
                f"L{self.norm:g} norm (image {worst} of its batch), allowed is "
                f"{float(eps.expand(len(x))[worst]):g}. Is it set to the same norm and radius?"
            )
        if self.box is None:
            return images
        clipped = self.box.bind(images).clip(images.flatten(1)).reshape(images.shape)
        if bool(((clipped - images).abs() > rounding.max()).any()):
            raise ValueError(
                f"the attack {name!r} left the box [{self.box.lower}, {self.box.upper}]: its "
                f"images have values from {float(images.min()):g} to {float(images.max()):g}. "
                "Give it the same bounds"
            )
        return clipped
