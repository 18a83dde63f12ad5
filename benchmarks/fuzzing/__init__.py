"""Random calls of the engine and its adapters on random tiny models, and what must hold of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from . import checks
from .bad import spoil
from .calls import build

if TYPE_CHECKING:
    from .calls import Call

__all__ = ["checks", "drawn"]


def drawn(seed: int, number: int, *, hosts: bool = True) -> Call:
    """The call of this number. One in ten has a bad input."""
    call, rng = build(seed, number, hosts), random.Random(f"bad {seed}/{number}")
    if len(call.x) > 1 and rng.random() < 0.1:
        spoil(call, rng.choice)
    return call
