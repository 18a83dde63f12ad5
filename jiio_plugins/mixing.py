"""Anderson mixing of the whole joint iterate, for smooth problems where v settles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins._state import row_norm

if TYPE_CHECKING:
    from jiio_plugins._problem import Groups

Blocks = tuple[Tensor, Tensor, Tensor]
Iterate = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # (z, w, v) and its residuals

_BY_ROW = (True, True, False)  # z and w are per row, v per problem
_REGROW = 1.2  # of the step, each time an iterate is accepted
_FORGIVE = 1.05  # how fast the step may grow back over where z could not follow v
_NOISE = 2.0  # times the product of the residuals: how wrong the estimate of the objective may be
_SURE = 0.1  # of the gain: a doubt below it does not put the gain in question


class BlockAnderson:
    """One set of weights per problem over the blocks (z, w, v), each residual block scaled.

    With Y the last ``memory`` differences of residuals and D those of images, it takes
    ``γ = argmin ‖r − Yγ‖²`` and ``t⁺ = t + r − Dγ``. Each block is divided by its own current norm
    before the least squares: otherwise the largest decides alone. The residual of v is its plain
    step; only ``step`` times that is taken, ``v⁺ = v + s r − (ΔV + s Y) γ``.

    A problem takes a plain step (γ = 0) where the mixed one would turn v against it: near a maximum
    or a saddle, which to a root finder are as good as a minimum. One whose summed relative residual
    grows tenfold over its best forgets its history.
    """

    def __init__(self, memory: int, groups: Groups, ridge: float = 1e-3) -> None:
        self.memory, self.groups, self.ridge = memory, groups, ridge
        self.count = 0
        self.size: Tensor | None = None
        self.last_t: Blocks | None = None
        self.last_r: Blocks | None = None

    def __call__(self, t: Blocks, r: Blocks, step: Tensor, restart: Tensor) -> Blocks:
        """The next iterate.

        Args:
            t: iterate (z, w, v).
            r: its residuals.
            step: s, ``(problems, 1)``.
            restart: problems that forget their history, ``(problems,)``.
        """
        norms = self._norms(r)
        tiny = torch.finfo(t[0].dtype).tiny
        ratios = [n / s.clamp(min=tiny) for n, s in zip(norms, self._norms(t), strict=True)]
        self.size = torch.stack(ratios).sum(0)
        if self.last_t is None or self.last_r is None:
            self.best = self.size
            # the last of y is the residual itself, so that one product yields YᵀY and Yᵀr
            self.y = [x.new_zeros(len(x), self.memory + 1, x.shape[1]) for x in r]
            self.d = [x.new_zeros(len(x), self.memory, x.shape[1]) for x in r]
        else:
            restart = restart | ~torch.isfinite(self.size) | (self.size > 10 * self.best)
            slot = (self.count - 1) % self.memory
            forget = not _none(restart)
            for i, by_row in enumerate(_BY_ROW):
                self.y[i][:, slot] = r[i] - self.last_r[i]
                self.d[i][:, slot] = self.y[i][:, slot] + t[i] - self.last_t[i]
                if forget:
                    drop = (self.groups.spread(restart) if by_row else restart)[:, None, None]
                    self.y[i].masked_fill_(drop, 0)
                    self.d[i].masked_fill_(drop, 0)
            self.best = torch.where(restart, self.size, torch.minimum(self.best, self.size))
        self.last_t, self.last_r = t, r
        self.count += 1
        z, w, v = t[0] + r[0], t[1] + r[1], t[2] + step * r[2]
        if self.count == 1:
            return z, w, v
        for y, residual in zip(self.y, r, strict=True):
            y[:, -1] = residual
        gamma = self._weights(norms)
        turn = _mixed(r[2], gamma, self.d[2]) * r[2]
        gamma = torch.where((turn.sum(1) > 0)[:, None, None], gamma, 0.0)
        per_row = self.groups.spread(gamma)
        d_v = self.d[2] - (1 - step).unsqueeze(2) * self.y[2][:, :-1]
        return _mixed(z, per_row, self.d[0]), _mixed(w, per_row, self.d[1]), _mixed(v, gamma, d_v)

    def below(self, tol: float) -> Tensor:
        """Problems whose residual was below ``tol`` at the last call, ``(problems,)``."""
        assert self.size is not None
        return self.size < tol

    def _norms(self, blocks: Blocks) -> list[Tensor]:
        sizes = [row_norm(x) for x in blocks]
        return [
            self.groups.sum(size.square()).sqrt() if by_row else size
            for size, by_row in zip(sizes, _BY_ROW, strict=True)
        ]

    def _weights(self, norms: list[Tensor]) -> Tensor:
        """γ, ``(problems, 1, memory)``."""
        products: Tensor | float = 0.0
        for y, norm, by_row in zip(self.y, norms, _BY_ROW, strict=True):
            weight = norm.double().clamp(min=1e-300).square().reciprocal()[:, None, None]
            part = torch.bmm(y, y.transpose(1, 2)).double()
            products = products + weight * (self.groups.sum(part) if by_row else part)
        assert isinstance(products, Tensor)
        gram, rhs = products[:, :-1, :-1], products[:, :-1, -1:]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        gram = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        gram.diagonal(dim1=1, dim2=2).fill_(1.0 + self.ridge)
        factor, info = torch.linalg.cholesky_ex(gram)
        gamma = torch.cholesky_solve(rhs * scale.unsqueeze(2), factor) * scale.unsqueeze(2)
        ok = (info == 0) & torch.isfinite(gamma).all(1).squeeze(1)
        return torch.where(ok[:, None, None], gamma, 0.0).transpose(1, 2)


def _none(mask: Tensor) -> bool:
    """Whether no entry is set; on an accelerator, where asking would make the host wait, False."""
    return mask.device.type == "cpu" and not bool(mask.any())


def _mixed(plain: Tensor, gamma: Tensor, d: Tensor) -> Tensor:
    return torch.baddbmm(plain.unsqueeze(1), gamma.to(plain.dtype), d, alpha=-1).squeeze(1)


class Descent:
    """:class:`BlockAnderson` that takes back every iterate whose objective got worse.

    The objective at v is ``φ(v) = ℓ(z*)``; at a state that is not yet z* the loss may rise while φ
    falls. Its estimate ``ℓ(z) + μᵀ(f(z, v) − z)`` is free, and exact up to products of the
    residuals of z and μ. A problem whose estimate has risen beyond those goes back to its last
    accepted v with half the plain step and no history, moves z and w there once, and goes on.

    Where v outran z, an estimate can be far too low, and the v that it spoke for be accepted.
    Coming back to such a v shows it: the problem then returns to the one accepted before, and from
    there, if need be, to the last whose gain was beyond doubt.
    """

    def __init__(self, memory: int, groups: Groups) -> None:
        self.groups, self.mix = groups, BlockAnderson(memory, groups)
        self.first = True

    @property
    def worse_rows(self) -> Tensor:
        """Rows of the problems whose iterate was taken back at the last call, ``(rows, 1)``."""
        return self.groups.spread(self.again)[:, None]

    def below(self, tol: float) -> Tensor:
        """Problems whose last accepted iterate has a residual below ``tol``, ``(problems,)``."""
        return self.mix.below(tol)

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
        back, new = worse | betrayed, ~worse & ~self.again
        sure = ~back & ((doubt <= _SURE * (self.safe_limit - value)) | (self.again & self.home))
        self.limit = torch.where(back, self.limit, value + doubt)
        self.safe_limit = torch.where(sure, value + doubt, self.safe_limit)
        before, before_home = self.anchor, self.home
        self.anchor = self._where(betrayed, self.before, self._where(worse, self.anchor, now))
        self.home = torch.where(new, sure, self.home | sure)
        self.home = torch.where(betrayed, self.before_home, self.home)
        self.before = self._where(betrayed, self.safe, self._where(new, before, self.before))
        self.before_home = torch.where(new, before_home, self.before_home) | betrayed
        self.safe = self._where(sure, now, self.safe)
        halved = self.step / 2
        self.ceiling = torch.where(
            betrayed[:, None], halved, (self.ceiling * _FORGIVE).clamp(max=1.0)
        )
        regrown = torch.minimum(self.step * _REGROW, self.ceiling)
        self.step = torch.where(back[:, None], halved, regrown)
        z, w, v = self.mix(self.anchor[:3], self.anchor[3:], self.step, back)
        self.again = back
        v = torch.where(back[:, None], self.anchor[2], v)
        return z, w, v

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
