"""``jiio evaluate``: model, images and radii from the command line; JSON, a plot and a table."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jiio_plugins.cli.commands import Evaluate, default_eps
from jiio_plugins.cli.task import Task, load_task
from jiio_plugins.evaluation import default_suite, quick_suite, robust_accuracy
from jiio_plugins.utils.files import write_figure, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.evaluation import Attack, RobustnessReport


def run_evaluation(settings: Evaluate) -> None:
    """Judge at each radius, print the tables, write ``robustness.json`` and ``robustness.png``."""
    importlib.import_module("matplotlib")  # rather now than after the last attack
    task = load_task(settings, settings.device)
    default = default_eps(task.dataset, settings.norm)
    reports: list[RobustnessReport] = []
    for eps in sorted(settings.eps) or [default / 2, default]:
        report = robust_accuracy(
            task.model,
            task.x,
            task.y,
            _suite(settings, eps),
            eps=eps,
            norm=float(settings.norm),
            batch_size=settings.batch_size,
            known=reports[-1].worst if reports else None,  # a smaller ball lies in this one
            audit=0 if reports else settings.audit,
        )
        print(f"\n{report}\n", flush=True)
        reports.append(report)
    _write(settings, task, reports)


def _suite(settings: Evaluate, eps: float) -> tuple[Attack, ...]:
    norm = float(settings.norm)
    if settings.suite == "quick":
        return quick_suite(eps=eps, norm=norm)
    steps, queries, seed = settings.steps, settings.queries, settings.seed
    return default_suite(eps=eps, norm=norm, steps=steps, queries=queries, seed=seed)


def _write(settings: Evaluate, task: Task, reports: Sequence[RobustnessReport]) -> None:
    names = ("model", "normalize", "suite", "steps", "queries", "batch_size", "seed")
    record = {
        **{name: getattr(settings, name) for name in names},
        "weights": task.weights,
        "dataset": task.dataset,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "reports": [r.to_dict() for r in reports],
    }
    out = settings.out
    write_json(out / "robustness.json", record, indent=2)
    title = f"{task.name}, {reports[0].images} images of {task.dataset}"
    plot_accuracy(out / "robustness.png", reports, title)
    print(f"numbers and plot: {out}/robustness.json, {out}/robustness.png")


def plot_accuracy(path: Path, reports: Sequence[RobustnessReport], title: str) -> None:
    """Accuracy against ε with its 95 % interval, and that of either answer alone."""
    from matplotlib.figure import Figure

    clean = reports[0].clean
    eps = [0.0, *(r.eps for r in reports)]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares = [clean, *(r.accuracy for r in reports)]
    axes.fill_between(
        eps, [100 * s.low for s in shares], [100 * s.high for s in shares], alpha=0.2, linewidth=0
    )
    for label, name, style in (
        ("robust accuracy, 95 % interval", "accuracy", "o-"),
        ("by the model's own answers alone", "model_accuracy", "x--"),
        ("by converged solves alone", "converged_accuracy", "+:"),
    ):
        values = [clean.value, *(getattr(r, name).value for r in reports)]
        axes.plot(eps, [100 * v for v in values], style, label=label)
    warnings = sum(len(r.warnings) for r in reports)
    axes.set(
        xlabel=f"ε (L{reports[0].norm:g})".replace("inf", "∞"),
        ylabel="accuracy in %",
        ylim=(-2, 102),
        xlim=(0, None),
        title=f"{title}, {warnings or 'no'} warning{'s' * (warnings != 1)}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)
