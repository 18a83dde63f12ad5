"""Shorter steps for a v that swings about where it will rest."""

from __future__ import annotations

import torch
from torch import Tensor

_PARALLEL = 0.9  # |cos| of two moves above which they tell a slope
_LARGEST = 2.0  # overshoot. It is that of a swing that neither grows nor shrinks


def overshoot(move: Tensor, last: Tensor, known: Tensor) -> Tensor:
    """By how much whole moves of v are too long, ``(problems, 1)``.

    A step in a ball takes v to T(v). Where the objective is curved and the step long, T goes too
    far, and v swings about its point of rest without coming nearer. If moves are a share 1/κ of
    whole ones, and two of them are parallel, the secant rule tells the κ that leads to that point::

        κ⁺ = κ (1 − sᵀs₋ / s₋ᵀs₋)        1 ≤ κ⁺ ≤ 2

    Args:
        move: s, the move that v makes, ``(problems, d)``.
        last: s₋, the one before it, likewise. 0 where there was none.
        known: κ of the moves, ``(problems, 1)``. It stays where they are not parallel.
    """
    along, size = (move * last).sum(1, keepdim=True), last.square().sum(1, keepdim=True)
    length = torch.linalg.vector_norm(move, dim=1, keepdim=True)
    # false where v stood still, and where there is NaN
    parallel = along.abs() > _PARALLEL * length * size.sqrt()
    return torch.where(parallel, (known * (1 - along / size)).clamp(1, _LARGEST), known)


def shortened(step: Tensor, radius: Tensor, known: Tensor) -> Tensor:
    """The step whose move is a share 1/κ of a whole one, ``(problems, 1)``.

    On a sphere a step of length αε turns v − c towards d by about α / (1 + α) of the angle between
    them. So the step is ``αε / (κ + (κ − 1) α)``.

    Args:
        step: αε, ``(1 or problems, 1)``.
        radius: ε, ``(problems, 1)``.
        known: κ, ``(problems, 1)``.
    """
    return step / (known + (known - 1) * (step / radius))
