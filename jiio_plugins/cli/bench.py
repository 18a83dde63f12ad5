"""``jiio bench``: what JIIO costs on a model, beside the nested loop at its strongest settings.

:mod:`jiio_plugins.evaluation.against_nested` says what is run, and
:mod:`jiio_plugins.evaluation.comparison` how it is judged and counted.
"""

from __future__ import annotations

from typing import Any

import torch

from jiio_plugins import plots
from jiio_plugins.cli.commands import Bench, default_eps
from jiio_plugins.cli.task import load_task
from jiio_plugins.evaluation import Comparison, compare_with_nested
from jiio_plugins.utils.files import keep_results


def run_bench(settings: Bench) -> dict[str, Any]:
    """Measure, print the table and the verdict, write ``results.json`` and ``curve.png``."""
    if settings.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {settings.repeats}")
    keep_results(settings.out, Comparison.FILES, settings.overwrite)
    plots.need_matplotlib()  # rather now than after the last measurement
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    task = load_task(settings)
    eps = default_eps(task.dataset, settings.norm) if settings.eps is None else settings.eps
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    comparison = Comparison(task.model, task.x, task.y, norm=float(settings.norm), eps=eps)
    verdict = compare_with_nested(comparison, sweep=settings.sweep, repeats=settings.repeats)
    about = {
        "weights": task.weights,
        "model": settings.model,
        "normalize": settings.normalize,
        "dataset": task.dataset,
        "verdict": verdict,
    }
    title = f"{task.name}, L{settings.norm} ε = {eps:g}, pixel box"
    return comparison.save(settings.out, title, about)
