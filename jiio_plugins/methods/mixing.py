"""Mixing of the whole joint iterate over its history, for smooth problems where v settles."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import products, row_norm, surely_finite, surely_none

if TYPE_CHECKING:
    from collections.abc import Sequence

# z and J_zᵀμ, ``(problems, 2, N)``, in code ``zj``; and v, ``(problems, 1, d)``
Blocks = tuple[Tensor, Tensor]
_RIDGE = 1e-3  # of the least squares, relative to their diagonal
_CURVED = 0.1  # least cosine between a step of v and the change of its gradient
REGROW = 1.2  # of the step, each time an iterate is accepted
_LEAST = 1e-300  # of a square that something is divided by


class Secants:
    """The last ``memory`` differences Y of the blocks, and D of what goes with them.

    ``γ = argmin Σ ‖t − Yγ‖² / ‖t‖²``, summed over z, J_zᵀμ and v: one set of weights per problem.
    Each of the three counts relative to its own target: otherwise the largest decides alone.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self.count = memory, 0
        self._y: list[Tensor] = []
        self._d: list[Tensor] = []
        self._gram = torch.empty(0)

    @property
    def y(self) -> list[Tensor]:
        """Of z, J_zᵀμ by turns, ``(2 · problems, differences, N)``; of v, ``(problems, …, d)``."""
        return [past[:, : self.count] for past in self._y]

    @property
    def d(self) -> list[Tensor]:
        """Of each block, flat: ``(problems, differences, 2 N or d)``."""
        return [past[:, : self.count] for past in self._d]

    def weights(
        self,
        y: Blocks,
        d: Sequence[Tensor],
        t: Blocks,
        squares: Tensor,
        forget: Tensor | None = None,
    ) -> Tensor:
        """Take in a difference, in the place of the oldest, and return γ.

        Args:
            y: difference of the blocks.
            d: what goes with it, for as many blocks as are to be mixed.
            t: target of the least squares.
            squares: ‖t‖² of z, J_zᵀμ and v, ``(problems, 3)`` in float64.
            forget: problems whose whole history is dropped, ``(problems,)``.

        Returns:
            γ, ``(problems, 1, differences)``, as many as there are by now.
        """
        problems = len(squares)
        new = [*(x.flatten(0, 1) for x in y), *(x.flatten(1) for x in d)]
        if not self.count:
            kept = [x.new_empty(len(x), self.memory, x.shape[1]) for x in new]
            self._y, self._d = kept[: len(y)], kept[len(y) :]
            self._gram = squares.new_zeros(problems, 3, self.memory, self.memory)
        slot = self.count % self.memory
        self.count += 1
        for past, now in zip([*self._y, *self._d], new, strict=True):
            past[:, slot] = now
        products = [
            torch.bmm(torch.stack((own, target), dim=2).flatten(0, 1), past.mT)
            for past, own, target in zip(self.y, y, t, strict=True)
        ]
        products = [x.reshape(problems, -1, *x.shape[1:]) for x in products]
        with_y, with_t = torch.cat(products, dim=1).double().unbind(2)
        self._gram[:, :, slot, : self.count] = with_y
        self._gram[:, :, : self.count, slot] = with_y
        if forget is not None and not surely_none(forget):
            for past in (*self._y, *self._d, self._gram):
                past.view(problems, -1).masked_fill_(forget[:, None], 0)
            with_t = with_t.masked_fill(forget[:, None, None], 0)
        share = squares.clamp(min=_LEAST).reciprocal()[:, :, None]
        gram = (self._gram[:, :, : self.count, : self.count] * share[..., None]).sum(1)
        gram.diagonal(dim1=1, dim2=2).mul_(1 + _RIDGE).add_(_LEAST)  # a forgotten one is 0: γ = 0
        factor, info = torch.linalg.cholesky_ex(gram)
        gamma = torch.cholesky_solve((with_t * share).sum(1)[:, :, None], factor).mT
        if surely_none(info) and surely_finite(gamma):
            return gamma
        return torch.where((info == 0)[:, None, None] & _finite(gamma), gamma, 0.0)


class Mixing(abc.ABC):
    """Proposes the next iterate from the history of (z, J_zᵀμ, v) and their residuals.

    Attributes:
        size: relative residuals of z, J_zᵀμ and v at the last call, summed, ``(problems,)``.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.secants = Secants(memory)
        self.last: tuple[Blocks, Blocks] | None = None
        self.size: Tensor | None = None

    def __call__(self, t: Blocks, r: Blocks, step: Tensor, rejected: Tensor) -> Blocks:
        """The next iterate.

        Args:
            t: iterate.
            r: its residuals, that of v being its plain step.
            step: share of the step on v that is taken, ``(problems, 1, 1)``.
            rejected: problems that have just been taken back to ``t``, ``(problems,)``. Their v
                stays where it is, for once.
        """
        squares, scale = _squares(*r, *t).split(3, dim=1)
        self.size = (squares / scale.clamp(min=_LEAST)).sqrt().sum(1)
        proposed = self._propose(t, r, squares, step, rejected)
        self.last = (t, r)
        return proposed

    @abc.abstractmethod
    def _propose(
        self, t: Blocks, r: Blocks, squares: Tensor, step: Tensor, rejected: Tensor
    ) -> Blocks:
        """See ``__call__``. ``squares`` are ‖r‖², ``self.last`` what the call before was given."""


class BlockAnderson(Mixing):
    """Anderson's method on (z, J_zᵀμ, v) as one: all three come from the same least squares.

    With Y the differences of residuals and ΔT those of iterates, ``γ`` cancels the residuals and
    ``t⁺ = t + r − (ΔT + Y) γ``. The residual of v is its plain step. Only ``step`` times that is
    taken, ``v⁺ = v + step (r − Yγ) − ΔV γ``.

    A problem takes a plain step (γ = 0) where the mixed one would turn v against it: near a maximum
    or a saddle, which to a root finder are as good as a minimum. One whose residual grows tenfold
    over its best forgets its history, as one does that is taken back.
    """

    def _propose(
        self, t: Blocks, r: Blocks, squares: Tensor, step: Tensor, rejected: Tensor
    ) -> Blocks:
        assert self.size is not None
        if self.last is None:
            self.best = self.size
            return t[0] + r[0], t[1] + step * r[1]
        forget = rejected | ~(self.size <= 10 * self.best)
        self.best = torch.where(forget, self.size, torch.minimum(self.best, self.size))
        before, moved = self.last
        y = r[0] - moved[0], r[1] - moved[1]
        d = y[0] + (t[0] - before[0]), t[1] - before[1]
        gamma = self.secants.weights(y, d, r, squares, forget)
        y_v, (d_zj, d_v) = self.secants.y[1], self.secants.d
        for_v = gamma.to(y_v.dtype)
        along_y, along_v = torch.bmm(for_v, y_v), torch.bmm(for_v, d_v)
        turned = ~(((r[1] - along_v - along_y) * r[1]).sum(2, keepdim=True) > 0)
        along = along_v + step * along_y
        if not surely_none(turned):
            gamma, along = (torch.where(turned, 0.0, x) for x in (gamma, along))
        v = t[1] + step * r[1] - along
        if not surely_none(rejected):
            v = torch.where(rejected[:, None, None], t[1], v)
        return _mixed(t[0] + r[0], gamma, d_zj), v


class QuasiNewton(Mixing):
    """L-BFGS for v. z and J_zᵀμ follow it along the secants of the history.

    ``v⁺ = v + step H r`` with H the L-BFGS inverse of the change of r along the last steps of v. A
    step whose gradient does not turn with it is left out of H: z lags behind, or the objective is
    not convex there. No step is longer than the plain one that the run began with. The limit grows
    while steps reach it. Then γ cancels the residuals of z and J_zᵀμ (subscript J) under the
    step Δv of v::

        γ = argmin ‖r_z − Y_z γ‖²/‖r_z‖² + ‖r_J − Y_J γ‖²/‖r_J‖² + ‖Δv + ΔV γ‖²/‖Δv‖²
        (z, J_zᵀμ)⁺ = (z, J_zᵀμ) + (r_z, r_J) − D γ

    which moves z and J_zᵀμ to where they would settle for the new v, as far as the history tells.

    Source: Nocedal, "Updating quasi-Newton matrices with limited storage" (1980), in the compact
    form of Byrd, Nocedal and Schnabel (1994).
    """

    def _propose(
        self, t: Blocks, r: Blocks, squares: Tensor, step: Tensor, rejected: Tensor
    ) -> Blocks:
        (zj, v), (r_zj, r_v), step = t, (r[0], r[1][:, 0]), step[:, 0]
        if self.last is None:
            shape = len(v), self.memory, v.shape[2]
            self.s = self.y = v.new_zeros(shape, dtype=torch.float64)
            self.scale = torch.ones_like(v[:, 0, :1])
            self.reach = row_norm(step * r_v)
            return zj + r_zj, v + (step * r_v)[:, None]
        # a run may begin where the gradient is 0 and go on where it is not
        self.reach = torch.where(self.reach > 0, self.reach, row_norm(step * r_v))
        before, moved = self.last
        y, change = (r_zj - moved[0], r[1] - moved[1]), (zj - before[0], v - before[1])
        self._learn(change[1][:, 0], -y[1][:, 0], rejected)
        dv = step * self._direction(r_v)
        length = row_norm(dv)
        share = (self.reach / length.clamp(min=torch.finfo(v.dtype).tiny)).clamp(max=1.0)
        dv = torch.where(rejected[:, None], 0.0, share[:, None] * dv)[:, None]
        self.reach = torch.where((share < 1) & ~rejected, REGROW * self.reach, self.reach)
        squares = torch.cat([squares[:, :2], _squares(dv)], dim=1)
        gamma = self.secants.weights((y[0], -change[1]), (y[0] + change[0],), (r_zj, dv), squares)
        return _mixed(zj + r_zj, gamma, self.secants.d[0]), v + dv

    def _learn(self, s: Tensor, y: Tensor, rejected: Tensor) -> None:
        """Take in a step of v and how its gradient changed. Those taken back start anew."""
        s_size, y_size = row_norm(s), row_norm(y).clamp(min=torch.finfo(y.dtype).tiny)
        cosine = (s * y).sum(1) / (s_size * y_size).clamp(min=torch.finfo(y.dtype).tiny)
        keep = cosine > _CURVED
        # between the short step of Barzilai and Borwein, ∝ cosine, and their long one, ∝ 1 / cosine
        scale = s_size / y_size * cosine.clamp(min=_CURVED).sqrt()
        self.scale = torch.where(keep, scale, self.scale[:, 0])[:, None]
        pairs = []
        for kept, new in ((self.s, s), (self.y, y)):
            longer = torch.cat([kept[:, 1:], new[:, None].double()], dim=1)
            kept = torch.where(keep[:, None, None], longer, kept)
            pairs.append(
                kept if surely_none(rejected) else kept.masked_fill(rejected[:, None, None], 0)
            )
        self.s, self.y = pairs

    def _direction(self, r: Tensor) -> Tensor:
        """``H r``, H made from ``scale · I``. A pair of zeros has no part in it."""
        s, y, r_wide, scale = self.s, self.y, r.double(), self.scale.double()
        upper = torch.bmm(s, y.mT).triu()
        curvature = upper.diagonal(dim1=1, dim2=2).unsqueeze(2).clone()
        upper.diagonal(dim1=1, dim2=2).copy_(torch.where(curvature > 0, curvature, 1.0).squeeze(2))
        along_s = torch.linalg.solve_triangular(upper, products(s, r_wide)[:, :, None], upper=True)
        along_y = products(y.mT, along_s.squeeze(2))
        rhs = curvature * along_s + (scale * products(y, along_y - r_wide))[:, :, None]
        a = torch.linalg.solve_triangular(upper.mT, rhs, upper=False).squeeze(2)
        direction = products(s.mT, a) + scale * (r_wide - along_y)
        return direction.to(r.dtype)


MIXINGS: dict[str, type[Mixing]] = {"quasi-newton": QuasiNewton, "anderson": BlockAnderson}


def _squares(*blocks: Tensor) -> Tensor:
    """‖z‖², ‖J_zᵀμ‖² and ‖v‖² of a triple, ``(problems, 3)``; more triples add columns."""
    norms = [torch.linalg.vector_norm(block, dim=2) for block in blocks]
    return torch.cat(norms, dim=1).double().square()


def _finite(x: Tensor) -> Tensor:
    """Whether all of a problem's entries are, ``(problems, 1, 1)``."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return norm < torch.inf


def _mixed(plain: Tensor, gamma: Tensor, d: Tensor) -> Tensor:
    """``plain − D γ``."""
    flat = plain.reshape(len(plain), 1, -1)
    return torch.baddbmm(flat, gamma.to(flat.dtype), d, alpha=-1).reshape(plain.shape)
