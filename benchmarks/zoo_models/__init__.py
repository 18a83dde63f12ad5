"""Deep equilibrium models as public code builds and trains them, on data that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .case import Case, Training
from .classifiers import damped, graph, monotone, multiscale, transformer, tutorial
from .inverse import gradient_descent, representation, unfolded
from .judge import Judge, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["KINDS", "Case", "Judge", "Training", "Verdict", "load"]

KINDS: dict[str, Callable[[int, Training], Case]] = {
    "tutorial": tutorial,
    "mdeq": multiscale("mdeq", weight_norm=False, dropout=0.0),
    "mdeq-dropout": multiscale("mdeq-dropout", weight_norm=True, dropout=0.2),
    **{
        f"mondeq-{splitting}": monotone(splitting)
        for splitting in ("plain", "forward-backward", "peaceman-rachford")
    },
    "unfolded-pgd": unfolded,
    "gradient-descent": gradient_descent,
    "transformer": transformer,
    "graph": graph,
    "inr": representation,
    **{
        f"damped-{which}-{a:g}": damped(which, a)
        for which in ("easy", "hard")
        for a in (0.1, 0.15, 0.3, 0.5, 1.0, 1.5, 2.0, 2.2)
    },
}


def load(kind: str, samples: int = 64, cache: Path | None = None, steps: int | None = None) -> Case:
    """A trained model of this kind, and an attack on it. The global random state is as before.

    Args:
        kind: one of :data:`KINDS`.
        samples: rows of the attack, at most 500.
        cache: folder of trained weights. What it lacks is trained and put there. None: always
            train, and keep nothing.
        steps: of the training, instead of the kind's own. None: its own.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = KINDS[kind](samples, Training(cache, steps))
    case.model.requires_grad_(False)
    return case
