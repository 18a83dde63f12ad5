"""The nearest point in a ball and a box, by sorting: the same operations whatever the numbers are.

Both functions work on distances from the centre, with the signs left out: they find the δ nearest
to ``size`` with ``0 ≤ δ ≤ room`` and ``‖δ‖ ≤ radius``. One multiplier per row decides δ. As it
changes, entries leave their room or reach zero one after another, so the norm of δ is known in
closed form at each of these points, by sums over their sorted order. The first point that is in the
ball and the last that is not enclose the multiplier, and between them it has a closed form too.

Nothing is searched for, so that an accelerator is not asked anything. A row that holds NaN or Inf
comes out with NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_l2(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """``min(t · size, room)`` with the largest t ≤ 1 whose L2 norm is ``radius`` at most.

    Args:
        size: not negative, float64 ``(rows, d)``.
        room: from 0 to ``radius``, float64 ``(rows, d)``.
        radius: float64 ``(rows, 1)``.
    """
    # the t at which an entry meets its room. Those of size 0 never do: Inf and NaN come first
    meets, order = (room / size).sort(1, descending=True)
    free, full = size.gather(1, order).square(), room.gather(1, order).square()
    budget, used = radius.square(), full.cumsum(1)
    # at that t the entry and those before it are free, and the others have met their room
    norm = torch.addcmul(used[:, -1:] - used, meets.square(), free.cumsum(1))
    met = norm <= budget
    open_ = ~met  # NaN too
    left = (budget - full.masked_fill(open_, 0).sum(1, keepdim=True)).clamp(min=0)
    square = left / free.masked_fill(met, 0).sum(1, keepdim=True)
    # what has met its room by a rounding leaves nothing for the others, but they are at its t
    least = meets.masked_fill(open_, 0).amax(1, keepdim=True)
    t = torch.maximum(square.sqrt().nan_to_num(1.0, posinf=1.0), least).clamp(max=1)
    return torch.minimum(size * t, room)


def nearest_l1(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """``min(max(size − level, 0), room)`` with the least level ≥ 0 whose sum is ``radius`` at most.

    Args:
        size: not negative, float64 ``(rows, d)``.
        room: from 0 to ``radius``, float64 ``(rows, d)``.
        radius: float64 ``(rows, 1)``.
    """
    # as the level falls, an entry begins to count at its size, and is full by its room below that
    levels, order = torch.cat((size, size - room), dim=1).sort(1, descending=True)
    turn = torch.ones_like(levels).masked_fill_(order >= size.shape[1], -1)
    counting = turn.cumsum(1)
    sums = torch.addcmul((turn * levels).cumsum(1), levels, counting, value=-1)
    last = ((sums <= radius).sum(1, keepdim=True) - 1).clamp(min=0)
    left = (radius - sums.gather(1, last)) / counting.gather(1, last).clamp(min=1)
    level = (levels.gather(1, last) - left).clamp(min=0)
    found = torch.minimum((size - level).clamp(min=0), room)
    # where sizes are much larger than the radius, their rounding is not small beside it
    total = found.sum(1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
    return found * (radius / total).clamp(max=1)
