"""Adam in the place of gradient descent in the nested loop, as latents are usually fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jiio_plugins import Nested
from jiio_plugins.constraints import FeasibleSet

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Path


class AdamDirections(FeasibleSet):
    """No constraint; directions are Adam's, so that a step of length α is Adam's at rate α."""

    def __init__(self, center: Tensor) -> None:
        super().__init__(center)
        self.first, self.second, self.k = torch.zeros_like(center), torch.zeros_like(center), 0

    def descent_direction(self, gradient: Tensor, v: Tensor) -> Tensor:
        """``−m̂ / (√ŝ + 1e-8)``."""
        self.k += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        m, s = self.first / (1 - 0.9**self.k), self.second / (1 - 0.999**self.k)
        return -m / (s.sqrt() + 1e-8)


@dataclass(frozen=True)
class NestedAdam(Nested):
    """The nested loop with Adam's steps; ``step_size`` is the rate."""

    def run(self, problem: Problem, feasible: FeasibleSet, *args: Any, **kwargs: Any) -> Path:
        """See :class:`jiio_plugins.Nested`."""
        return super().run(problem, AdamDirections(feasible.center), *args, **kwargs)
