"""Constraint sets on the optimised variable: balls, boxes, masks, and their intersection.

Every set is given in the units of x. It is bound to a starting point when an optimisation begins.
All of them become one :class:`FeasibleSet`,
``{v : lower ≤ v ≤ upper, ‖v − c‖_p ≤ ε, v = c off the mask}``.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from jiio_plugins.utils.nearest import nearest_l1, nearest_l2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Number = float | Tensor


class Constraint(abc.ABC):
    """A convex set for ``optimize_input(constraint=...)``."""

    @abc.abstractmethod
    def bind(self, start: Tensor) -> FeasibleSet:
        """The set around ``start`` ``(problems, ...)``, flat.

        Raises:
            TypeError: no number and no tensor, or complex ones.
            ValueError: a number or shape that does not fit ``start``.
        """


@dataclass
class FeasibleSet(Constraint):
    """A box and at most one ball around ``center``: ``{v : lower ≤ v ≤ upper, ‖v − c‖_p ≤ ε}``.

    Attributes:
        center: c, ``(problems, d)``.
        lower: least v, ``(problems, d)``, or None. An L∞ ball is a box too.
        upper: the box's other bound, likewise.
        norm: p of the ball (1, 2 or inf), None without one. It sets the steepest direction.
        radius: ε, ``(problems, 1)``, None without a ball.
        mask: entries that may change, bool ``(problems, d)``. None: all. The others stay at c.
    """

    center: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None
    norm: float | None = None
    radius: Tensor | None = None
    mask: Tensor | None = None

    def bind(self, start: Tensor) -> FeasibleSet:
        """The set itself: it is bound already."""
        return self

    def restrict(self, rows: Tensor) -> FeasibleSet:
        """The set for the problems of these indices."""
        return self._each(lambda t: t[rows])

    def detach(self) -> FeasibleSet:
        """The set without the graph of what it was made of."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> FeasibleSet:
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items()}
        return replace(self, **changed)

    def clip(self, v: Tensor) -> Tensor:
        """Projection of v ``(problems, d)`` on the box and the mask."""
        if self.lower is not None or self.upper is not None:
            v = torch.clamp(v, self.lower, self.upper)
        return v if self.mask is None else torch.where(self.mask, v, self.center)

    def project(self, v: Tensor) -> Tensor:
        """Euclidean projection of every row of v ``(problems, d)`` on the whole set.

        It is exact, and the host does not wait for an accelerator.
        """
        if self.radius is None or self.norm not in (1, 2):
            return self.clip(v)
        d = v - self.center
        nearest = nearest_l2 if self.norm == 2 else nearest_l1
        room = torch.where(d > 0, *self._rooms)
        found = nearest(d.double().abs(), room, self.radius.double())
        return self.clip(self.center + torch.copysign(found.to(v.dtype), d))

    def project_smoothly(self, v: Tensor) -> Tensor:
        """:meth:`project` with the derivative of its active piece, in v and in the set's own data.

        :meth:`project` itself is no function to differentiate: it searches for what is active.
        """
        with torch.no_grad():
            p = self.project(v)
            free = torch.ones_like(p, dtype=torch.bool) if self.mask is None else self.mask
            low = torch.zeros_like(free) if self.lower is None else free & (p <= self.lower)
            high = torch.zeros_like(free) if self.upper is None else free & (p >= self.upper)
            free = free & ~low & ~high
        at_bound = self.center
        if self.lower is not None:
            at_bound = torch.where(low, self.lower, at_bound)
        if self.upper is not None:
            at_bound = torch.where(high, self.upper, at_bound)
        if self.radius is None or self.norm not in (1, 2):
            return torch.where(free, v, at_bound)
        d = torch.where(free, v - self.center, 0)
        fixed = torch.where(free, 0, at_bound - self.center)
        with torch.no_grad():
            outside = torch.linalg.vector_norm(d + fixed, ord=self.norm, dim=1, keepdim=True)
            curved = (outside > self.radius) & free.any(1, keepdim=True)
        if self.norm == 2:
            size = torch.where(curved, d.square().sum(1, keepdim=True), 1).sqrt()
            room = self.radius.square() - fixed.square().sum(1, keepdim=True)
            on_ball = d / size * torch.where(curved, room, 1).sqrt()
        else:  # the entries that the threshold leaves share what it takes
            with torch.no_grad():
                kept = free & (p != self.center)
            room = self.radius - fixed.abs().sum(1, keepdim=True)
            over = (torch.where(kept, d.abs(), 0).sum(1, keepdim=True) - room) / kept.sum(
                1, keepdim=True
            ).clamp(min=1)
            on_ball = torch.where(kept, d - d.sign() * over, 0)
        return torch.where(free, self.center + torch.where(curved, on_ball, d), at_bound)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A random point, ``(problems, d)``.

        It is uniform in the ball (or box), then projected on the whole set. A row's depends on the
        generator and on which row it is, not on how many there are.

        Raises:
            ValueError: neither a ball nor a bounded box.
        """
        c = self.center
        uniform = _uniform_rows(c, generator)
        entries, length = uniform[:, 1:], uniform[:, :1]
        if self.radius is None or self.norm == math.inf:
            low, high = self.lower, self.upper
            if low is None or high is None or not bool(torch.isfinite(high - low).all()):
                raise ValueError("a random start needs a ball or a bounded box")
            return self.clip(low + (high - low) * entries.to(c))
        tiny = torch.finfo(c.dtype).tiny
        if self.norm == 2:
            d = torch.special.ndtri(entries)
        else:  # exponentials divided by their sum are uniform on the simplex
            signed = 2 * entries - 1
            d = -signed.sign() * torch.log1p(-signed.abs())
        d = d.to(c)
        free = torch.full_like(c[:, :1], c.shape[1])
        if self.mask is not None:  # the ball of the entries that may change
            d = torch.where(self.mask, d, 0)
            free = self.mask.sum(1, keepdim=True).clamp(min=1).to(c.dtype)
        size = torch.linalg.vector_norm(d, ord=self.norm, dim=1, keepdim=True)
        d = d / size.clamp(min=tiny)
        return self.project(c + self.radius * length.to(c) ** (1 / free) * d)

    @cached_property
    def _rooms(self) -> tuple[Tensor, Tensor]:
        """How far each entry may go up and down from c, by ε at most. In float64."""
        assert self.radius is not None
        ends = self.center + self.radius, self.center - self.radius
        up, down = ((self.clip(end) - self.center).abs().double() for end in ends)
        return up, down

    def descent_direction(self, g: Tensor, v: Tensor) -> Tensor:
        """Steepest descent of length one in the ball's norm. Without a ball it is −g.

        Entries that sit at a bound and would be pushed through it are left out first. They take no
        part of the step's length.

        Args:
            g: gradient, ``(problems, d)``.
            v: where it was taken, ``(problems, d)``.
        """
        if self.mask is not None:
            g = torch.where(self.mask, g, 0)
        if self.lower is not None and self.upper is not None and self.norm in (1, 2):
            # a projected entry may miss its bound by a rounding: without slack that would decide
            slack = 0.0 if self.radius is None else 1e-6 * self.radius
            ahead = (v - torch.where(g > 0, self.lower, self.upper)).abs()
            g = g.masked_fill(ahead <= slack, 0)
        tiny = torch.finfo(g.dtype).tiny
        if self.norm == 2:
            size: Tensor = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            return -g / size.clamp(min=tiny)
        if self.norm == math.inf:
            return -g.sign()
        if self.norm == 1:
            # L1's steepest direction is one entry; a twentieth of them is as sparse as pays
            k = max(1, g.shape[1] // 20)
            level = g.abs().topk(k, dim=1).values[:, -1:]
            s = -torch.where(g.abs() >= level, g.sign(), 0)
            return s / s.abs().sum(1, keepdim=True).clamp(min=1)
        return -g


def _uniform_rows(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in (0, 1), one more in each row than ``like`` ``(rows, d)`` has."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = like.device if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    of_row = torch.Generator(like.device)
    drawn = like.new_empty(len(like), like.shape[1] + 1, dtype=dtype)
    for k, row in enumerate(drawn):
        row.uniform_(generator=of_row.manual_seed(seed + k))
    margin = torch.finfo(dtype).eps / 2
    return drawn.clamp(margin, 1 - margin)


def _as_tensor(name: str, value: Number, start: Tensor, dtype: torch.dtype) -> Tensor:
    kind = str(getattr(value, "dtype", ""))
    if "complex" in kind:  # torch would take the real part
        raise TypeError(f"{name} must be real, got {kind}")
    try:
        return torch.as_tensor(value, dtype=dtype, device=start.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}") from None


def _per_problem(name: str, value: Number, start: Tensor) -> Tensor:
    tensor = _as_tensor(name, value, start, start.dtype)
    if tensor.ndim > 1 or (tensor.ndim == 1 and len(tensor) != len(start)):
        raise ValueError(
            f"{name} must be a number or one value per sample, shape ({len(start)},), "
            f"got shape {tuple(tensor.shape)}"
        )
    if not bool(((tensor >= 0) & torch.isfinite(tensor)).all()):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return tensor.expand(len(start)).unsqueeze(1)


def _like(name: str, value: Number, start: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = _as_tensor(name, value, start, dtype)
    try:
        return tensor.expand(start.shape).flatten(1)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to the shape of x, "
            f"{tuple(start.shape)}"
        ) from None


@dataclass(frozen=True, eq=False)
class _Ball(Constraint):
    radius: Number
    center: Tensor | None = None
    mask: Tensor | None = field(default=None, kw_only=True)
    norm: ClassVar[float]

    def bind(self, start: Tensor) -> FeasibleSet:
        """See :class:`Constraint`."""
        center = _like("center", start if self.center is None else self.center, start, start.dtype)
        if not bool(torch.isfinite(center).all()):
            raise ValueError("center holds NaN or Inf")
        radius = _per_problem("radius", self.radius, start)
        mask = None if self.mask is None else _like("mask", self.mask, start, torch.bool)
        if isinstance(self.mask, Tensor) and bool(self.mask.isnan().any()):
            raise ValueError("mask holds NaN: give 1 or True where x may change")
        ball = FeasibleSet(center.clone(), norm=self.norm, radius=radius, mask=mask)
        if self.norm == math.inf:  # which is a box
            ball.lower, ball.upper = center - radius, center + radius
        return ball


@dataclass(frozen=True, eq=False)
class L2Ball(_Ball):
    """``‖x − center‖₂ ≤ radius``.

    Args:
        radius: ε in the units of x, a number or one per problem ``(problems,)``.
        center: shape of x. None: the starting point.
        mask: keyword only, broadcastable to x. Entries where it is False or 0 stay at the center.
    """

    norm = 2.0


@dataclass(frozen=True, eq=False)
class L1Ball(_Ball):
    """``‖x − center‖₁ ≤ radius``.

    Args:
        radius: ε in the units of x, a number or one per problem ``(problems,)``.
        center: shape of x. None: the starting point.
        mask: keyword only, broadcastable to x. Entries where it is False or 0 stay at the center.
    """

    norm = 1.0


@dataclass(frozen=True, eq=False)
class LinfBall(_Ball):
    """``max |x − center| ≤ radius``.

    Args:
        radius: ε in the units of x, a number or one per problem ``(problems,)``.
        center: shape of x. None: the starting point.
        mask: keyword only, broadcastable to x. Entries where it is False or 0 stay at the center.
    """

    norm = math.inf


@dataclass(frozen=True, eq=False)
class Box(Constraint):
    """``lower ≤ x ≤ upper``.

    Args:
        lower: least value, a number or a tensor that broadcasts to x. −inf: no bound.
        upper: largest value, likewise.
    """

    lower: Number
    upper: Number

    def bind(self, start: Tensor) -> FeasibleSet:
        """See :class:`Constraint`."""
        lower = _like("lower", self.lower, start, start.dtype)
        upper = _like("upper", self.upper, start, start.dtype)
        if not bool((lower <= upper).all()):
            raise ValueError(f"Box needs lower <= upper, got {self.lower} and {self.upper}")
        return FeasibleSet(start.flatten(1).clone(), lower, upper)


def _check_curved(balls: int) -> None:
    if balls > 1:
        raise ValueError(
            "Intersection projects exactly on at most one L1Ball or L2Ball with boxes and "
            f"LinfBalls, got {balls} curved balls"
        )


class Intersection(Constraint):
    """Points in all of the given sets: any boxes, any L∞ balls, and at most one L1 or L2 ball.

    The projection is exact. The ball's centre must lie in the box.

    Args:
        *sets: constraint sets, or iterables of them.

    Raises:
        TypeError: something else was given.
        ValueError: two curved balls. When bound: bounds that cross, or a centre outside the box.
    """

    def __init__(self, *sets: Constraint | Iterable[Constraint]) -> None:
        flat: list[Constraint] = []
        for item in sets:
            flat.extend([item] if isinstance(item, Constraint) else item)
        if not flat or not all(isinstance(item, Constraint) for item in flat):
            raise TypeError(f"Intersection takes constraint sets, got {sets!r}")
        self.sets = tuple(flat)
        _check_curved(sum(isinstance(s, (L1Ball, L2Ball)) for s in flat))

    def bind(self, start: Tensor) -> FeasibleSet:
        """See :class:`Constraint`."""
        bound = [s.bind(start) for s in self.sets]
        balls = [b for b in bound if b.norm is not None]
        _check_curved(sum(b.norm in (1, 2) for b in balls))  # an intersection may hold others
        balls.sort(key=lambda b: b.norm == math.inf)  # an L1 or L2 ball leads
        lead = balls[0] if balls else bound[0]
        lowers = [b.lower for b in bound if b.lower is not None]
        uppers = [b.upper for b in bound if b.upper is not None]
        masks = [b.mask for b in bound if b.mask is not None]
        result = FeasibleSet(lead.center, norm=lead.norm, radius=lead.radius)
        result.lower = torch.stack(lowers).amax(0) if lowers else None
        result.upper = torch.stack(uppers).amin(0) if uppers else None
        result.mask = torch.stack(masks).all(0) if masks else None
        lower, upper = result.lower, result.upper
        if lower is not None and upper is not None and not bool((lower <= upper).all()):
            raise ValueError("the sets have no point in common: their bounds cross")
        if any(b.mask is not None and not torch.equal(b.center, lead.center) for b in balls):
            raise ValueError("a ball with a mask must have the centre of the other ball")
        open_ = replace(result, mask=None)  # what the mask holds must lie in the box too
        if lead.norm is not None and not torch.equal(open_.clip(lead.center), lead.center):
            raise ValueError(
                "the centre of the ball lies outside the box: clip x (or center) into the box first"
            )
        return result


def check_constraint(constraint: Constraint | None) -> Constraint | None:
    """The constraint as it is, or None.

    Raises:
        TypeError: anything else was given.
    """
    if constraint is not None and not isinstance(constraint, Constraint):
        raise TypeError(
            "constraint must be an L2Ball, LinfBall, L1Ball, Box or Intersection, "
            f"got {type(constraint).__name__}"
        )
    return constraint
