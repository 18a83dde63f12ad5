"""Mixing of the whole joint iterate over its history, for smooth problems where v settles."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins._state import row_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins._problem import Groups

Blocks = tuple[Tensor, Tensor, Tensor]
Iterate = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # (z, w, v) and its residuals

_BY_ROW = (True, True, False)  # z and w are per row, v per problem
_RIDGE = 1e-3  # of the least squares, relative to their diagonal
_CURVED = 0.1  # least cosine between a step of v and the change of its gradient
_REGROW = 1.2  # of the step, each time an iterate is accepted
_FORGIVE = 1.05  # how fast the step may grow back over where z could not follow v
_NOISE = 2.0  # times the product of the residuals: how wrong the estimate of the objective may be
_SURE = 0.1  # of the gain: a doubt below it does not put the gain in question


class Secants:
    """The last ``memory`` differences Y of some blocks, and D of what goes with them.

    Until there are so many, ``y``, ``d`` and γ are as long as what there is.

    ``weights(t)`` are ``γ = argmin Σ_blocks ‖t − Yγ‖² / ‖t‖²``, one set per problem over all its
    rows. Each block counts relative to its own target: otherwise the largest decides alone.
    """

    def __init__(self, memory: int, groups: Groups) -> None:
        self.memory, self.groups, self.count = memory, groups, 0
        self._y: list[Tensor] = []
        self._d: list[Tensor] = []
        self._grams: list[Tensor] = []

    @property
    def y(self) -> list[Tensor]:
        """Of each block, ``(rows or problems, differences, n)``."""
        return [kept[:, : self.count] for kept in self._y]

    @property
    def d(self) -> list[Tensor]:
        """Likewise."""
        return [kept[:, : self.count] for kept in self._d]

    def add(self, y: Sequence[Tensor], d: Sequence[Tensor]) -> None:
        """Store one difference of each block, in the place of the oldest."""
        if not self.count:
            self._y, self._d = (
                [x.new_empty(len(x), self.memory, x.shape[1]) for x in blocks] for blocks in (y, d)
            )
            size = (self.groups.problems, self.memory, self.memory)
            self._grams = [x.new_zeros(size, dtype=torch.float64) for x in y]
        slot = self.count % self.memory
        self.count += 1
        for kept, new in zip([*self._y, *self._d], [*y, *d], strict=True):
            kept[:, slot] = new
        for gram, kept, new, by_row in zip(self._grams, self.y, y, _BY_ROW, strict=True):
            products = self._products(kept, new, by_row)
            gram[:, slot, : self.count] = products
            gram[:, : self.count, slot] = products

    def forget(self, problems: Tensor) -> None:
        """Drop the history of these."""
        if self.count and not _none(problems):
            for kept, by_row in zip([*self.y, *self.d], (*_BY_ROW, *_BY_ROW), strict=False):
                drop = self.groups.spread(problems) if by_row else problems
                kept.masked_fill_(drop[:, None, None], 0)
            for gram in self._grams:
                gram.masked_fill_(problems[:, None, None], 0)

    def weights(self, targets: Sequence[Tensor]) -> Tensor:
        """γ, ``(problems, 1, differences)``."""
        grams = [gram[:, : self.count, : self.count] for gram in self._grams]
        gram = torch.zeros_like(grams[0])
        rhs = gram[:, :, :1]
        for own, y, target, by_row in zip(grams, self.y, targets, _BY_ROW, strict=True):
            size = row_norm(target).square().double()
            size = (self.groups.sum(size) if by_row else size).clamp(min=1e-300)[:, None, None]
            gram = gram + own / size
            rhs = rhs + self._products(y, target, by_row).unsqueeze(2) / size
        diagonal = gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        gram = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        gram.diagonal(dim1=1, dim2=2).fill_(1.0 + _RIDGE)
        factor, info = torch.linalg.cholesky_ex(gram)
        gamma = torch.cholesky_solve(rhs * scale.unsqueeze(2), factor) * scale.unsqueeze(2)
        ok = (info == 0) & torch.isfinite(gamma).all(1).squeeze(1)
        return torch.where(ok[:, None, None], gamma, 0.0).transpose(1, 2)

    def _products(self, y: Tensor, x: Tensor, by_row: bool) -> Tensor:
        """``Yᵀ x``, ``(problems, memory)``."""
        products = torch.bmm(x.unsqueeze(1), y.transpose(1, 2)).squeeze(1).double()
        return self.groups.sum(products) if by_row else products


class Mixing(abc.ABC):
    """Proposes the next iterate from the history of (z, w, v) and their residuals.

    Attributes:
        size: relative residuals of the three blocks at the last call, summed, ``(problems,)``.
    """

    def __init__(self, memory: int, groups: Groups) -> None:
        self.memory, self.groups = memory, groups
        self.secants = Secants(memory, groups)
        self.last: tuple[Blocks, Blocks] | None = None
        self.size: Tensor | None = None

    def __call__(self, t: Blocks, r: Blocks, step: Tensor, back: Tensor) -> Blocks:
        """The next iterate.

        Args:
            t: iterate (z, w, v).
            r: its residuals, that of v being its plain step.
            step: share of the step on v that is taken, ``(problems, 1)``.
            back: problems that have just been taken back to ``t``: their v stays where it is, for
                once, ``(problems,)``.
        """
        tiny = torch.finfo(t[0].dtype).tiny
        ratios = [
            n / s.clamp(min=tiny) for n, s in zip(self._norms(r), self._norms(t), strict=True)
        ]
        self.size = torch.stack(ratios).sum(0)
        proposed = self._propose(t, r, step, back)
        self.last = (t, r)
        return proposed

    @abc.abstractmethod
    def _propose(self, t: Blocks, r: Blocks, step: Tensor, back: Tensor) -> Blocks:
        """See ``__call__``; ``self.last`` is what the call before was given."""

    def _norms(self, blocks: Blocks) -> list[Tensor]:
        sizes = [row_norm(x) for x in blocks]
        return [
            self.groups.sum(size.square()).sqrt() if by_row else size
            for size, by_row in zip(sizes, _BY_ROW, strict=True)
        ]


class BlockAnderson(Mixing):
    """Anderson's method on (z, w, v) as one: v comes from the same least squares as z and w.

    With Y the differences of residuals and D those of images, ``γ`` cancels the residuals and
    ``t⁺ = t + r − Dγ``. The residual of v is its plain step; only ``step`` times that is taken,
    ``v⁺ = v + s r − (ΔV + s Y) γ``.

    A problem takes a plain step (γ = 0) where the mixed one would turn v against it: near a maximum
    or a saddle, which to a root finder are as good as a minimum. One whose residual grows tenfold
    over its best forgets its history, as one does that is taken back.
    """

    def _propose(self, t: Blocks, r: Blocks, step: Tensor, back: Tensor) -> Blocks:
        assert self.size is not None
        if self.last is None:
            self.best = self.size
            return t[0] + r[0], t[1] + r[1], t[2] + step * r[2]
        forget = back | ~torch.isfinite(self.size) | (self.size > 10 * self.best)
        self.best = torch.where(forget, self.size, torch.minimum(self.best, self.size))
        before, moved = self.last
        y = [now - old for now, old in zip(r, moved, strict=True)]
        d = [dy + now - old for dy, now, old in zip(y, t, before, strict=True)]
        self.secants.add(y, d)
        self.secants.forget(forget)
        gamma = self.secants.weights(r)
        d_z, d_w, d_v = self.secants.d
        turn = _mixed(r[2], gamma, d_v) * r[2]
        gamma = torch.where((turn.sum(1) > 0)[:, None, None], gamma, 0.0)
        per_row = self.groups.spread(gamma)
        d_v = d_v - (1 - step).unsqueeze(2) * self.secants.y[2]
        v = torch.where(back[:, None], t[2], _mixed(t[2] + step * r[2], gamma, d_v))
        return _mixed(t[0] + r[0], per_row, d_z), _mixed(t[1] + r[1], per_row, d_w), v


class QuasiNewton(Mixing):
    """L-BFGS for v; z and w follow it along the secants of the history.

    ``v⁺ = v + s H r`` with H the L-BFGS inverse of the change of r along the last steps of v; a
    step whose gradient does not turn with it, because z lags behind or the objective is not convex
    there, is left out of H. No step is longer than the plain one that the run began with; the limit
    grows while steps reach it. Then γ cancels the residuals of z and w under the step Δv of v::

        γ = argmin ‖r_z − Y_z γ‖²/‖r_z‖² + ‖r_w − Y_w γ‖²/‖r_w‖² + ‖Δv + ΔV γ‖²/‖Δv‖²
        (z, w)⁺ = (z, w) + (r_z, r_w) − D γ

    which moves z and w to where they would settle for the new v, as far as the history tells.

    Source: Nocedal, "Updating quasi-Newton matrices with limited storage" (1980), in the compact
    form of Byrd, Nocedal and Schnabel (1994).
    """

    def _propose(self, t: Blocks, r: Blocks, step: Tensor, back: Tensor) -> Blocks:
        v = t[2]
        if self.last is None:
            shape = len(v), self.memory, v.shape[1]
            self.s = self.y = v.new_zeros(shape, dtype=torch.float64)
            self.gamma = torch.ones_like(v[:, :1])
            self.reach = row_norm(step * r[2])
            return t[0] + r[0], t[1] + r[1], v + step * r[2]
        # a run may begin where the gradient is 0 and go on where it is not
        self.reach = torch.where(self.reach > 0, self.reach, row_norm(step * r[2]))
        before, moved = self.last
        y = [now - old for now, old in zip(r, moved, strict=True)]
        change = [now - old for now, old in zip(t, before, strict=True)]
        d = [dy + dt for dy, dt in zip(y[:2], change[:2], strict=True)]
        self.secants.add([*y[:2], -change[2]], d)
        self._learn(change[2], -y[2], back)
        dv = step * self._direction(r[2])
        length = row_norm(dv)
        share = (self.reach / length.clamp(min=torch.finfo(v.dtype).tiny)).clamp(max=1.0)
        dv = torch.where(back[:, None], 0.0, share[:, None] * dv)
        self.reach = torch.where((share < 1) & ~back, _REGROW * self.reach, self.reach)
        per_row = self.groups.spread(self.secants.weights((r[0], r[1], dv)))
        d_z, d_w = self.secants.d
        return _mixed(t[0] + r[0], per_row, d_z), _mixed(t[1] + r[1], per_row, d_w), v + dv

    def _learn(self, s: Tensor, y: Tensor, back: Tensor) -> None:
        """Take in a step of v and how its gradient changed; those taken back start anew."""
        s_size, y_size = row_norm(s), row_norm(y).clamp(min=torch.finfo(y.dtype).tiny)
        cosine = (s * y).sum(1) / (s_size * y_size).clamp(min=torch.finfo(y.dtype).tiny)
        keep = cosine > _CURVED
        # between the short step of Barzilai and Borwein, ∝ cosine, and their long one, ∝ 1 / cosine
        gamma = s_size / y_size * cosine.clamp(min=_CURVED).sqrt()
        self.gamma = torch.where(keep, gamma, self.gamma[:, 0])[:, None]
        pairs = []
        for kept, new in ((self.s, s), (self.y, y)):
            longer = torch.cat([kept[:, 1:], new[:, None].double()], dim=1)
            kept = torch.where(keep[:, None, None], longer, kept)
            pairs.append(kept if _none(back) else kept.masked_fill(back[:, None, None], 0))
        self.s, self.y = pairs

    def _direction(self, r: Tensor) -> Tensor:
        """``H r``; a pair of zeros has no part in H."""
        s, y, g = self.s, self.y, r.double().unsqueeze(2)
        gamma = self.gamma.double().unsqueeze(2)
        upper = torch.bmm(s, y.transpose(1, 2)).triu()
        curvature = upper.diagonal(dim1=1, dim2=2).unsqueeze(2).clone()
        upper.diagonal(dim1=1, dim2=2).copy_(torch.where(curvature > 0, curvature, 1.0).squeeze(2))
        u = torch.linalg.solve_triangular(upper, torch.bmm(s, g), upper=True)
        along_y = torch.bmm(y.transpose(1, 2), u)
        rhs = curvature * u + gamma * torch.bmm(y, along_y - g)
        a = torch.linalg.solve_triangular(upper.transpose(1, 2), rhs, upper=False)
        direction = torch.bmm(s.transpose(1, 2), a) + gamma * (g - along_y)
        return direction.squeeze(2).to(r.dtype)


MIXINGS: dict[str, type[Mixing]] = {"quasi-newton": QuasiNewton, "anderson": BlockAnderson}


def _none(mask: Tensor) -> bool:
    """Whether no entry is set; on an accelerator, where asking would make the host wait, False."""
    return mask.device.type == "cpu" and not bool(mask.any())


def _mixed(plain: Tensor, gamma: Tensor, d: Tensor) -> Tensor:
    return torch.baddbmm(plain.unsqueeze(1), gamma.to(plain.dtype), d, alpha=-1).squeeze(1)


class Descent:
    """A :class:`Mixing` that takes back every iterate whose objective got worse.

    The objective at v is ``φ(v) = ℓ(z*)``; at a state that is not yet z* the loss may rise while φ
    falls. Its estimate ``ℓ(f) + μᵀ J_z (f(z, v) − z)`` is free, and exact up to products of the
    residuals of z and μ. A problem whose estimate has risen beyond those goes back to its last
    accepted v with half the plain step and no history, moves z and w there once, and goes on.

    Where v outran z, an estimate can be far too low, and the v that it spoke for be accepted.
    Coming back to such a v shows it: the problem then returns to the one accepted before, and from
    there, if need be, to the last whose gain was beyond doubt. It returns to that one at once from
    an iterate that is worse than it beyond doubt.
    """

    def __init__(self, mix: Mixing) -> None:
        self.groups, self.mix = mix.groups, mix
        self.first = True

    @property
    def worse_rows(self) -> Tensor:
        """Rows of the problems whose iterate was taken back at the last call, ``(rows, 1)``."""
        return self.groups.spread(self.again)[:, None]

    def below(self, tol: float) -> Tensor:
        """Problems whose last accepted iterate has a residual below ``tol``, ``(problems,)``."""
        assert self.mix.size is not None
        return self.mix.size < tol

    def __call__(self, t: Blocks, r: Blocks, value: Tensor, doubt: Tensor) -> Blocks:
        """The next iterate.

        Args:
            t: iterate (z, w, v).
            r: its residuals, that of v being its plain step.
            value: estimate of φ, ``(problems,)``.
            doubt: by how much it may be wrong, ``(problems,)``.
        """
        now = (*t, *r)
        if self.first:
            self.anchor = self.before = self.safe = now
            self.limit = self.safe_limit = torch.full_like(value, torch.inf)
            # whether the anchor is evaluated once more; whether it, or the one before, is the safe
            self.again = self.home = self.before_home = torch.ones_like(value, dtype=torch.bool)
            self.step = self.ceiling = torch.ones_like(t[2][:, :1])
            self.first = False
        doubt = _NOISE * doubt + 10 * torch.finfo(value.dtype).eps * value.abs()
        worse = ~(value - doubt <= self.limit) & ~self.again
        betrayed = ~(value - doubt <= self.safe_limit) & self.again & ~self.home
        lost = ~(value - doubt <= self.safe_limit) & ~self.again & ~worse
        undone = betrayed | lost  # of an anchor that was there before
        back, new = worse | undone, ~worse & ~lost & ~self.again
        sure = ~back & ((doubt <= _SURE * (self.safe_limit - value)) | (self.again & self.home))
        self.limit = torch.where(back, self.limit, value + doubt)
        self.safe_limit = torch.where(sure, value + doubt, self.safe_limit)
        before, before_home = self.anchor, self.home
        self.anchor = self._where(betrayed, self.before, self._where(worse, self.anchor, now))
        self.anchor = self._where(lost, self.safe, self.anchor)
        self.home = torch.where(new, sure, self.home | sure)
        self.home = torch.where(betrayed, self.before_home, self.home) | lost
        self.before = self._where(undone, self.safe, self._where(new, before, self.before))
        self.before_home = torch.where(new, before_home, self.before_home) | undone
        self.safe = self._where(sure, now, self.safe)
        halved = self.step / 2
        self.ceiling = torch.where(
            undone[:, None], halved, (self.ceiling * _FORGIVE).clamp(max=1.0)
        )
        regrown = torch.minimum(self.step * _REGROW, self.ceiling)
        self.step = torch.where(back[:, None], halved, regrown)
        self.again = back
        return self.mix(self.anchor[:3], self.anchor[3:], self.step, back)

    @property
    def accepted(self) -> Blocks:
        """The last accepted iterate (z, w, v)."""
        return self.anchor[:3]

    def _where(self, condition: Tensor, first: Iterate, second: Iterate) -> Iterate:
        if _none(condition):
            return second
        if _none(~condition):
            return first
        rows, problems = self.groups.spread(condition)[:, None], condition[:, None]
        return tuple(  # type: ignore[return-value]
            torch.where(rows if by_row else problems, a, b)
            for by_row, a, b in zip(_BY_ROW * 2, first, second, strict=True)
        )
