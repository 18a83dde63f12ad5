"""Taking back iterates that make the objective worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import full_precision, surely_none
from jiio_plugins.methods.mixing import REGROW, Blocks, Mixing

if TYPE_CHECKING:
    from jiio_plugins.joint.variables import Groups

Iterate = tuple[Tensor, Tensor, Tensor, Tensor]  # blocks and their residuals
Flat = tuple[Tensor, Tensor, Tensor]  # z and J_zᵀμ ``(rows, n)``, v ``(problems, d)``

_FORGIVE = 1.05  # how fast the step may grow back over where z could not follow v
_NOISE = 2.0  # times the product of the residuals: how wrong the merit may be
_SURE = 0.1  # of the gain: an error below it does not put the gain in question


class Safeguard:
    """A :class:`Mixing` that rejects every iterate whose objective got worse.

    The objective at v is ``φ(v) = ℓ(z*(v))``. At a state that is not yet z* the loss may rise while
    φ falls, so the merit is an estimate of φ, ``ℓ(f) + μᵀJ_z (f(z, v) − z)``. It is free, and exact
    up to products of the residuals of z and μ. A problem whose merit has risen beyond those goes
    back to its last accepted v with half the plain step and no history. It moves z and J_zᵀμ there
    once, and goes on.

    Where v outran z, a merit can be far too low, and the v that it spoke for be accepted. Coming
    back to such a v shows it. The problem then returns to the one accepted before, and from there,
    if need be, to the incumbent: the last whose gain was beyond doubt. It returns to that one at
    once from an iterate that is worse than it beyond doubt.

    Args:
        mixing: what proposes iterates.
        groups: which problem each row belongs to.

    Attributes:
        rejected: problems whose last iterate was, so that the accepted one is evaluated once more,
            bool ``(problems,)``.
        incumbent_limit: a bound on the incumbent's objective, ``(problems,)``.

    Source: a non-monotone watchdog as in Chamberlain, Powell, Lemarechal and Pedersen (1982).
    """

    def __init__(self, mixing: Mixing, groups: Groups) -> None:
        self.mixing, self.groups = mixing, groups
        self.first = True

    def unless_rejected(self, before: Tensor, now: Tensor) -> Tensor:
        """What is now, but what was before in rows whose iterate the last call rejected.

        Args:
            before: ``(rows, ...)``.
            now: ``(rows, ...)``.
        """
        if surely_none(self.rejected):
            return now
        return torch.where(self.groups.spread(self.rejected)[:, None], before, now)

    def below(self, tol: float) -> Tensor:
        """Problems whose last accepted iterate has a residual below ``tol``, ``(problems,)``."""
        assert self.mixing.size is not None
        return self.mixing.size < tol

    def __call__(self, iterate: Flat, residuals: Flat, merit: Tensor, merit_error: Tensor) -> Flat:
        """The next iterate.

        Args:
            iterate: (z, J_zᵀμ, v), the first two ``(rows, n)``, v ``(problems, d)``.
            residuals: of each, in the same shapes. That of v is its plain step.
            merit: estimate of φ, ``(problems,)``.
            merit_error: by how much it may be wrong, ``(problems,)``.
        """
        now = (*self._join(iterate), *self._join(residuals))
        if self.first:
            self._accepted = self._previous = self._incumbent = now
            self._limit = self.incumbent_limit = torch.full_like(merit, torch.inf)
            self.rejected = torch.ones_like(merit, dtype=torch.bool)
            # whether the accepted iterate, or the one before it, is the incumbent
            self._is_incumbent = self._previous_is = self.rejected
            self._step = self._max_step = torch.ones_like(iterate[2][:, :1, None])
            self.first = False
        rounding = 10 * torch.finfo(merit.dtype).eps
        error = torch.add(_NOISE * merit_error, merit.abs(), alpha=rounding)
        low, high = merit - error, merit + error
        sure = error <= _SURE * (self.incumbent_limit - merit)
        step, accepted, was_incumbent = self._step, self._accepted, self._is_incumbent
        self._max_step = (self._max_step * _FORGIVE).clamp(max=1.0)
        self._step = torch.minimum(step * REGROW, self._max_step)
        fine = low <= torch.minimum(self._limit, self.incumbent_limit)
        if surely_none(~fine | self.rejected):
            # no problem is in question, as nearly always: what the other branch comes to then
            self._limit, self._accepted, self._is_incumbent = high, now, sure
            self._previous, self._previous_is = accepted, was_incumbent
        else:
            sure = self._decide(now, low, high, sure, step / 2)
        self.incumbent_limit = torch.where(sure, high, self.incumbent_limit)
        self._incumbent = _where(sure, now, self._incumbent)
        with full_precision(merit.device.type):  # products of iterates, not of layers
            point, residual = self._accepted[:2], self._accepted[2:]
            return self._part(self.mixing(point, residual, self._step, self.rejected))

    def _decide(
        self, now: Iterate, low: Tensor, high: Tensor, sure: Tensor, halved: Tensor
    ) -> Tensor:
        """Accept or reject by problem, and tell whether what is accepted now is beyond doubt."""
        accepted, was_incumbent = self._accepted, self._is_incumbent
        worse = ~(low <= self._limit) & ~self.rejected
        below_incumbent = ~(low <= self.incumbent_limit)
        misjudged = below_incumbent & self.rejected & ~self._is_incumbent
        lost = below_incumbent & ~self.rejected & ~worse
        undone = misjudged | lost  # of an iterate that had been accepted
        back, new = worse | undone, ~worse & ~lost & ~self.rejected
        sure = ~back & (sure | (self.rejected & self._is_incumbent))
        self._limit = torch.where(back, self._limit, high)
        self._accepted = _where(misjudged, self._previous, _where(worse, accepted, now))
        self._accepted = _where(lost, self._incumbent, self._accepted)
        self._is_incumbent = torch.where(new, sure, was_incumbent | sure)
        self._is_incumbent = torch.where(misjudged, self._previous_is, self._is_incumbent) | lost
        self._previous = _where(undone, self._incumbent, _where(new, accepted, self._previous))
        self._previous_is = torch.where(new, was_incumbent, self._previous_is) | undone
        self._max_step = torch.where(undone[:, None, None], halved, self._max_step)
        self._step = torch.where(back[:, None, None], halved, self._step)
        self.rejected = back
        return sure

    @property
    def accepted(self) -> Flat:
        """The last accepted iterate (z, J_zᵀμ, v)."""
        return self._part(self._accepted[:2])

    @property
    def incumbent_v(self) -> Tensor:
        """The last v whose gain was beyond doubt, ``(problems, d)``."""
        return self._incumbent[1][:, 0]

    def _join(self, t: Flat) -> Blocks:
        return self.groups.join(t[0], t[1]), t[2][:, None]

    def _part(self, blocks: Blocks) -> Flat:
        return (*self.groups.part(blocks[0]), blocks[1][:, 0])


def _where(condition: Tensor, first: Iterate, second: Iterate) -> Iterate:
    """By problem."""
    if surely_none(condition):
        return second
    if surely_none(~condition):
        return first
    chosen = condition[:, None, None]
    return tuple(torch.where(chosen, a, b) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]
