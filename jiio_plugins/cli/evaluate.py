"""``jiio evaluate``: model, images and radii from the command line; JSON, a plot and a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jiio_plugins import plots
from jiio_plugins.cli.commands import Evaluate, default_eps
from jiio_plugins.cli.task import Task, load_task
from jiio_plugins.evaluation import default_suite, quick_suite, robust_accuracy
from jiio_plugins.utils.files import keep_results, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.evaluation import Attack, RobustnessReport

FILES = ("robustness.json", "robustness.png")


def run_evaluation(settings: Evaluate) -> dict[str, Any]:
    """Judge at each radius, print the tables, write ``robustness.json`` and ``robustness.png``."""
    keep_results(settings.out, FILES, settings.overwrite)
    plots.need_matplotlib()  # rather now than after the last attack
    task = load_task(settings)
    default = default_eps(task.dataset, settings.norm)
    reports: list[RobustnessReport] = []
    record: dict[str, Any] = {}
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
        record = _write(settings, task, reports)  # a radius that is done outlives a stop
    print(f"numbers and plot: {', '.join(map(str, record['files']))}")
    return record


def _suite(settings: Evaluate, eps: float) -> tuple[Attack, ...]:
    norm = float(settings.norm)
    if settings.suite == "quick":
        return quick_suite(eps=eps, norm=norm)
    steps, queries, seed = settings.steps, settings.queries, settings.seed
    return default_suite(eps=eps, norm=norm, steps=steps, queries=queries, seed=seed)


def _write(settings: Evaluate, task: Task, reports: Sequence[RobustnessReport]) -> dict[str, Any]:
    names = ("model", "normalize", "suite", "steps", "queries", "batch_size", "seed")
    record = {
        **{name: getattr(settings, name) for name in names},
        "weights": task.weights,
        "dataset": task.dataset,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "reports": [r.to_dict() for r in reports],
    }
    numbers, plot = (settings.out / name for name in FILES)
    write_json(numbers, record, indent=2)
    title = f"{task.name}, {reports[0].images} images of {task.dataset}"
    plot_accuracy(plot, reports, title)
    return {**record, "files": [numbers, plot]}


def plot_accuracy(path: Path, reports: Sequence[RobustnessReport], title: str) -> None:
    """Accuracy against ε with its 95 % interval, and that of either answer alone."""
    clean = reports[0].clean
    eps = [0.0, *(r.eps for r in reports)]
    lines, styles = {}, {}
    for label, name, style in (
        ("robust accuracy, 95 % interval", "accuracy", "o-"),
        ("by the model's own answers alone", "model_accuracy", "x--"),
        ("by converged solves alone", "converged_accuracy", "+:"),
    ):
        values = [clean.value, *(getattr(r, name).value for r in reports)]
        lines[label], styles[label] = (eps, [100 * v for v in values]), style
    warnings = sum(len(r.warnings) for r in reports)
    figure = plots.curves(
        lines,
        styles=styles,
        xlabel=f"ε (L{reports[0].norm:g})".replace("inf", "∞"),
        ylabel="accuracy in %",
        title=f"{title}, {warnings or 'no'} warning{'s' * (warnings != 1)}",
    )
    axes, shares = figure.axes[0], [clean, *(r.accuracy for r in reports)]
    axes.fill_between(
        eps, [100 * s.low for s in shares], [100 * s.high for s in shares], alpha=0.2, linewidth=0
    )
    axes.set(ylim=(-2, 102), xlim=(0, None))
    plots.save(path, figure)
