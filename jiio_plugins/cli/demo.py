"""``jiio demo``: JIIO and ART's PGD on the same DEQ, images and ball, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jiio_plugins import plots
from jiio_plugins.cli.commands import Demo, default_eps
from jiio_plugins.cli.task import Task, load_task
from jiio_plugins.evaluation import Comparison, Row
from jiio_plugins.hosts import load_adapter
from jiio_plugins.utils.console import progress_bar
from jiio_plugins.utils.files import keep_results

if TYPE_CHECKING:
    from pathlib import Path

    from jiio_plugins.evaluation.attack import Run

PGD, JIIO = "ART PGD", "JIIO in ART"
STEPS = {PGD: (2, 5, 10, 20), JIIO: (4, 8, 12, 16, 24)}


def run_demo(settings: Demo) -> dict[str, Any]:
    """Run both attacks, print the table, write ``results.json``, ``curve.png``, ``images.png``."""
    images = settings.out / "images.png"
    keep_results(settings.out, (*Comparison.FILES, images.name), settings.overwrite)
    plots.need_matplotlib()  # rather now than after the last attack
    load_adapter("art")  # says what to install before anything is run
    task = load_task(settings)
    model, classifier, x, y = task.model, _classifier(task), task.x, task.y
    eps = default_eps(task.dataset, settings.norm) if settings.eps is None else settings.eps
    comparison = Comparison(model, x, y, norm=float(settings.norm), eps=eps)
    found = _measure(comparison, classifier)
    print(comparison)
    comparison.against([r for r in comparison.rows if r.family == PGD][-1])
    about = {"weights": task.weights, "model": settings.model, "dataset": task.dataset}
    title = "Strength of the attack against its cost"
    record = comparison.save(settings.out, title, about, curves=("clean", PGD, JIIO))
    _plot_images(images, model, x, found, y)
    print(f"pictures: {images}")
    return {**record, "files": [*record["files"], images]}


def _measure(comparison: Comparison, classifier: Any) -> Tensor:
    """Fill the comparison, and return the images that JIIO's longest run found."""
    jobs = [(family, steps) for family in STEPS for steps in STEPS[family]]
    with progress_bar(jobs, desc="attacks") as bar:
        for family, steps in bar:
            row = Row(f"{family}, {steps} steps", family, setting={"steps": steps})
            bar.set_postfix_str(row.method)
            found = comparison.measure(row, _attack(family, classifier, comparison, steps))
    return found


def _classifier(task: Task) -> Any:
    from art.estimators.classification import PyTorchClassifier

    device = task.x.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} cannot be used: ART knows cpu and cuda")
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device if on_gpu else -1):  # of the GPUs ART takes the current one
        return PyTorchClassifier(
            model=task.model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(task.x.shape[1:]),
            nb_classes=task.classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if on_gpu else "cpu",
        )


def _attack(family: str, classifier: Any, comparison: Comparison, steps: int) -> Run:
    from art.attacks.evasion import ProjectedGradientDescent

    kind: Any = load_adapter("art").JIIOAttack
    settings: dict[str, Any] = {"norm": comparison.norm, "eps": comparison.eps, "max_iter": steps}
    if family == PGD:
        kind, settings["eps_step"] = ProjectedGradientDescent, 2.5 * comparison.eps / steps
    attack = kind(classifier, **settings, batch_size=1024, verbose=False)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = attack.generate(x=x.numpy(force=True), y=y.numpy(force=True))
        return torch.from_numpy(np.asarray(found, dtype=np.float32))

    return run


@torch.no_grad()
def _plot_images(path: Path, model: nn.Module, x: Tensor, found: Tensor, y: Tensor) -> None:
    before, after = model(x).argmax(1), model(found).argmax(1)
    turned = ((before == y) & (after != y)).nonzero().squeeze(1)
    shown = (turned if len(turned) else torch.arange(len(x)))[:8]
    rows = {"clean": x, "perturbation": found - x, "adversarial": found}
    titles = {
        name: [f"says {k}" for k in classes[shown].tolist()]
        for name, classes in (("clean", before), ("adversarial", after))
    }
    figure = plots.images(
        {name: row[shown] for name, row in rows.items()}, titles=titles, signed=["perturbation"]
    )
    plots.save(path, figure)
