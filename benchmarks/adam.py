"""Adam in the place of gradient descent in the nested loop, as latents are usually fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jiio_plugins import Nested

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins.constraints import FeasibleSet


class Adam:
    """Directions, so that a step of length α is Adam's at rate α."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.k = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, gradient: Tensor, v: Tensor) -> Tensor:
        """``−m̂ / (√ŝ + 1e-8)``."""
        self.k += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        m, s = self.first / (1 - 0.9**self.k), self.second / (1 - 0.999**self.k)
        return -m / (s.sqrt() + 1e-8)


@dataclass(frozen=True)
class NestedAdam(Nested):
    """The nested loop with Adam's steps; ``step_size`` is the rate."""

    def directions(self, feasible: FeasibleSet) -> Adam:
        """See :class:`jiio_plugins.methods.Method`."""
        return Adam(feasible.center)
