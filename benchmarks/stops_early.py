"""A classifier whose layer stops long before it has converged, to try ``jiio evaluate`` on.

    jiio evaluate --model benchmarks.stops_early:classifier --dataset fashion-mnist --folder DIR

Attacks that follow its own answers meet another function than the converged one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jiio_plugins import Anderson
from jiio_plugins.models import load_pretrained

if TYPE_CHECKING:
    from torch import nn


def classifier() -> nn.Module:
    """The shipped classifier of Fashion-MNIST, after three evaluations of f."""
    model = load_pretrained("fashion-mnist")
    model.equilibrium.solver = Anderson(max_iter=3)
    return model
