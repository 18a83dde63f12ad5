"""Taking back iterates that make the objective worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import full_precision, surely_none
from jiio_plugins.methods.mixing import _REGROW, Blocks, Mixing

if TYPE_CHECKING:
    from jiio_plugins.joint.variables import Groups


Iterate = tuple[Tensor, Tensor, Tensor, Tensor]  # blocks and their residuals


ZWV = tuple[Tensor, Tensor, Tensor]  # z and w ``(rows, n)``, v ``(problems, d)``


_FORGIVE = 1.05  # how fast the step may grow back over where z could not follow v


_NOISE = 2.0  # times the product of the residuals: how wrong the estimate of the objective may be


_SURE = 0.1  # of the gain: a doubt below it does not put the gain in question


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

    def __init__(self, mix: Mixing, groups: Groups) -> None:
        self.mix, self.groups = mix, groups
        self.first = True

    def unless_worse(self, before: Tensor, now: Tensor) -> Tensor:
        """``now``, but ``before`` in rows whose iterate was taken back at the last call."""
        if surely_none(self.again):
            return now
        return torch.where(self.groups.spread(self.again)[:, None], before, now)

    def below(self, tol: float) -> Tensor:
        """Problems whose last accepted iterate has a residual below ``tol``, ``(problems,)``."""
        assert self.mix.size is not None
        return self.mix.size < tol

    def __call__(self, t: ZWV, r: ZWV, value: Tensor, doubt: Tensor) -> ZWV:
        """The next iterate.

        Args:
            t: iterate (z, w, v), z and w ``(rows, n)``, v ``(problems, d)``.
            r: its residuals, that of v being its plain step.
            value: estimate of φ, ``(problems,)``.
            doubt: by how much it may be wrong, ``(problems,)``.
        """
        now = (*self._join(t), *self._join(r))
        if self.first:
            self.anchor = self.before = self.safe = now
            self.limit = self.safe_limit = torch.full_like(value, torch.inf)
            # whether the anchor is evaluated once more; whether it, or the one before, is the safe
            self.again = self.home = self.before_home = torch.ones_like(value, dtype=torch.bool)
            self.step = self.ceiling = torch.ones_like(t[2][:, :1, None])
            self.first = False
        doubt = torch.add(_NOISE * doubt, value.abs(), alpha=10 * torch.finfo(value.dtype).eps)
        low, high = value - doubt, value + doubt
        sure = doubt <= _SURE * (self.safe_limit - value)
        before, before_home, before_step = self.anchor, self.home, self.step
        self.ceiling = (self.ceiling * _FORGIVE).clamp(max=1.0)
        self.step = torch.minimum(self.step * _REGROW, self.ceiling)
        if surely_none(~(low <= torch.minimum(self.limit, self.safe_limit)) | self.again):
            # no problem is in question, as nearly always: what the other branch comes to then
            self.limit, self.anchor, self.home = high, now, sure
            self.before, self.before_home = before, before_home
        else:
            worse = ~(low <= self.limit) & ~self.again
            betrayed = ~(low <= self.safe_limit) & self.again & ~self.home
            lost = ~(low <= self.safe_limit) & ~self.again & ~worse
            undone = betrayed | lost  # of an anchor that was there before
            back, new = worse | undone, ~worse & ~lost & ~self.again
            sure = ~back & (sure | (self.again & self.home))
            self.limit = torch.where(back, self.limit, high)
            self.anchor = _where(betrayed, self.before, _where(worse, self.anchor, now))
            self.anchor = _where(lost, self.safe, self.anchor)
            self.home = torch.where(new, sure, self.home | sure)
            self.home = torch.where(betrayed, self.before_home, self.home) | lost
            self.before = _where(undone, self.safe, _where(new, before, self.before))
            self.before_home = torch.where(new, before_home, self.before_home) | undone
            halved = before_step / 2
            self.ceiling = torch.where(undone[:, None, None], halved, self.ceiling)
            self.step = torch.where(back[:, None, None], halved, self.step)
            self.again = back
        self.safe_limit = torch.where(sure, high, self.safe_limit)
        self.safe = _where(sure, now, self.safe)
        with full_precision(value.device.type):  # products of iterates, not of layers
            return self._part(self.mix(self.anchor[:2], self.anchor[2:], self.step, self.again))

    @property
    def accepted(self) -> ZWV:
        """The last accepted iterate (z, w, v)."""
        return self._part(self.anchor[:2])

    @property
    def safe_v(self) -> Tensor:
        """The last v whose gain was beyond doubt, ``(problems, d)``."""
        return self.safe[1][:, 0]

    def _join(self, t: ZWV) -> Blocks:
        return self.groups.join(t[0], t[1]), t[2][:, None]

    def _part(self, blocks: Blocks) -> ZWV:
        return (*self.groups.part(blocks[0]), blocks[1][:, 0])


def _where(condition: Tensor, first: Iterate, second: Iterate) -> Iterate:
    """By problem."""
    if surely_none(condition):
        return second
    if surely_none(~condition):
        return first
    chosen = condition[:, None, None]
    return tuple(torch.where(chosen, a, b) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]
