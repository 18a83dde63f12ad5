"""``(I − J)⁻¹`` as far as the last secant pairs of each row tell."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers import mixing_weights
from jiio_plugins.equilibrium.state import products, row_norm

_RIDGE = 1e-3  # of the least squares, relative to their unit diagonal
# Roundings of what has moved below which the change of a residual is noise. No more than that: in a
# cell that contracts slowly all residuals are small, and so are the changes that tell about it.
_NOISE = 10
_STRETCH = 10.0  # σ at most


class SecantInverse:
    """An approximation B of ``(I − J)⁻¹``, from pairs of moves and of what they did to a residual.

    With moves D and changes ``Y = (J − I) D``, it is B Y = −D. What the pairs do not span, B
    stretches by σ, as far as it stretches the least of them::

        B r = σ (r − Y γ) − D γ,   γ = argmin ‖r − Y γ‖²,   σ = min ‖d‖/‖y‖, from 1 to 10

    In a damped cell ``z + a (f − z)`` it is σ ≈ 1/a, without which all but a few directions would
    creep. With the pairs of one fixed-point iteration ``z + B r`` is Anderson's step of mixing σ.
    Each row has its own pairs, weights and σ.

    Args:
        like: a state, ``(rows, n)``, for shape, dtype and device.
        memory: pairs kept. Each takes the memory of two states.
        precision: dtype in which residuals are computed. None: that of the state.

    Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.2.
    """

    def __init__(self, like: Tensor, memory: int, precision: torch.dtype | None = None) -> None:
        rows, n = like.shape
        self.noise = _NOISE * torch.finfo(precision or like.dtype).eps
        self.memory = min(memory, n)
        self.count = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.y = like.new_zeros(rows, self.memory, n)
        self.d = like.new_zeros(rows, self.memory, n)
        self.stretch = like.new_full((rows, self.memory), torch.inf)  # ‖d‖/‖y‖

    def learn(self, d: Tensor, y: Tensor, size: Tensor, rows: Tensor) -> None:
        """Take in a pair, in the place of the row's oldest.

        Args:
            d: the move, ``(rows, n)``.
            y: how the residual changed by it, ``(rows, n)``.
            size: norm of what has moved, ``(rows,)``. A change by less than ten of its roundings
                is not taken in.
            rows: which rows have moved, bool ``(rows,)``. The others keep their pairs.
        """
        if not self.memory:
            return
        move, change = row_norm(d), row_norm(y)
        usable = rows & torch.isfinite(move) & torch.isfinite(change)
        usable = usable & (change > self.noise * size)
        slot = (self.count % self.memory)[:, None, None]
        pairs = (self.y, y), (self.d, d), (self.stretch[..., None], (move / change)[:, None])
        for kept, new in pairs:
            where = slot.expand(-1, 1, kept.shape[2])
            oldest = kept.gather(1, where)
            kept.scatter_(1, where, torch.where(usable[:, None, None], new[:, None], oldest))
        self.count = self.count + usable

    def restrict(self, rows: Tensor) -> SecantInverse:
        """That of the rows of these indices. −1 is a row without pairs."""
        some, none = copy.copy(self), rows < 0
        some.count, some.y, some.d = (t[rows] for t in (self.count, self.y, self.d))
        for t in (some.count, some.y, some.d):
            t[none] = 0
        some.stretch = self.stretch[rows]
        some.stretch[none] = torch.inf
        return some

    def __call__(self, r: Tensor) -> Tensor:
        """``B r``, ``(rows, n)``. Where the least squares fail it is σ r, without a pair r."""
        if not self.memory:
            return r
        gram = torch.bmm(self.y, self.y.mT).double()
        along = products(self.y, r).double()[:, :, None]
        gamma = mixing_weights(gram, along, _RIDGE).to(r.dtype).squeeze(2)
        least = self.stretch.amin(1, keepdim=True)
        sigma = torch.where(least < torch.inf, least, 1.0).clamp(1.0, _STRETCH)
        return sigma * (r - products(self.y.mT, gamma)) - products(self.d.mT, gamma)
