"""``jiio bench``: what JIIO costs on a model, beside the nested loop at its strongest settings.

:mod:`jiio_plugins.evaluation.against_nested` says what is run, and
:mod:`jiio_plugins.evaluation.comparison` how it is judged and counted.
"""

from __future__ import annotations

import importlib

import torch

from jiio_plugins.cli.commands import Bench, default_eps
from jiio_plugins.cli.evaluate import load_task
from jiio_plugins.evaluation import Comparison, compare_with_nested
from jiio_plugins.models.pretrained import CLASSIFIERS


def run_bench(settings: Bench) -> None:
    """Measure, print the table and the verdict, write ``results.json`` and ``curve.png``."""
    if settings.images < 1 or settings.repeats < 1:
        raise ValueError(
            f"images and repeats must be at least 1, got {settings.images} and {settings.repeats}"
        )
    importlib.import_module("matplotlib")  # rather now than after the last measurement
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, dataset, x, y = load_task(settings)
    eps = default_eps(dataset, settings.norm) if settings.eps is None else settings.eps
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    comparison = Comparison(model, x, y, norm=float(settings.norm), eps=eps)
    verdict = compare_with_nested(comparison, sweep=settings.sweep, repeats=settings.repeats)
    own = settings.model is not None and settings.weights in CLASSIFIERS
    about = {
        "weights": None if own else settings.weights,  # the default is not for --model
        "model": settings.model,
        "dataset": dataset,
        "verdict": verdict,
    }
    name = settings.model or settings.weights
    comparison.save(settings.out, f"{name}, L{settings.norm} ε = {eps:g}, pixel box", about)
