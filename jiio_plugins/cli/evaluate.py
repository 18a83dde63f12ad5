"""``jiio evaluate``: model, images and radii from the command line; JSON, a plot and a table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jiio_plugins.cli.commands import Bench, Evaluate, default_eps
from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.evaluation import default_suite, quick_suite, robust_accuracy
from jiio_plugins.models import load_pretrained
from jiio_plugins.models.pretrained import CLASSIFIERS
from jiio_plugins.utils.factory import build_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.evaluation import Attack, RobustnessReport


def run_evaluation(settings: Evaluate) -> None:
    """Judge at each radius, print the tables, write ``robustness.json`` and ``robustness.png``."""
    if settings.images < 1:
        raise ValueError(f"images must be at least 1, got {settings.images}")
    importlib.import_module("matplotlib")  # rather now than after the last attack
    model, dataset, x, y = load_task(settings)
    default = default_eps(dataset, settings.norm)
    reports: list[RobustnessReport] = []
    for eps in sorted(settings.eps) or [default / 2, default]:
        report = robust_accuracy(
            model,
            x,
            y,
            _suite(settings, eps),
            eps=eps,
            norm=float(settings.norm),
            batch_size=settings.batch_size,
            known=reports[-1].worst if reports else None,  # a smaller ball lies in this one
            audit=0 if reports else settings.audit,
        )
        print(f"\n{report}\n", flush=True)
        reports.append(report)
    _write(settings, dataset, reports)


def _suite(settings: Evaluate, eps: float) -> tuple[Attack, ...]:
    norm = float(settings.norm)
    if settings.suite == "quick":
        return quick_suite(eps=eps, norm=norm)
    steps, queries, seed = settings.steps, settings.queries, settings.seed
    return default_suite(eps=eps, norm=norm, steps=steps, queries=queries, seed=seed)


def _write(settings: Evaluate, dataset: str, reports: Sequence[RobustnessReport]) -> None:
    names = ("weights", "model", "suite", "steps", "queries", "batch_size", "seed")
    record = {
        **{name: getattr(settings, name) for name in names},
        "dataset": dataset,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "reports": [r.to_dict() for r in reports],
    }
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "robustness.json").write_text(json.dumps(record, indent=2) + "\n")
    name = settings.model or settings.weights
    plot_accuracy(out / "robustness.png", reports, f"{name}, {reports[0].images} {dataset} images")
    print(f"numbers and plot: {out}/robustness.json, {out}/robustness.png")


def load_task(settings: Evaluate | Bench) -> tuple[nn.Module, str, Tensor, Tensor]:
    """The model, the name of the data set, and its first test images and labels.

    Raises:
        ValueError: it is not known, and not said, what the model is for. See :func:`load_model`.
    """
    model, trained_on = load_model(settings.weights, settings.model)
    dataset = settings.dataset or trained_on
    if dataset is None:
        raise ValueError("say what to attack the model on: --dataset digits or fashion-mnist")
    x, y = (t[: settings.images].to(settings.device) for t in load_test_set(dataset, settings.data))
    return model.to(settings.device), dataset, x, y


def load_test_set(dataset: str, data: Path) -> tuple[Tensor, Tensor]:
    """Images and labels. ``data`` is the folder of Fashion-MNIST."""
    return load_digits("test") if dataset == "digits" else load_fashion_mnist(data, "test")


def load_model(weights: str, factory: str | None) -> tuple[nn.Module, str | None]:
    """The model, and the data set its architecture is made for, if that is known.

    Raises:
        ValueError: an unknown name, a factory that makes no module, weights of another model.
        FileNotFoundError: no such file.
        ImportError: the factory's module cannot be imported.
    """
    if factory is not None:
        network = build_network(factory, "--model")
        if weights in CLASSIFIERS:  # the default, which is not meant for this model
            return network, None
        _load_into(network, _read(weights), weights, factory)
        return network, None
    if weights in CLASSIFIERS:
        return load_pretrained(weights), weights
    tensors = _read(weights)
    for name, build in CLASSIFIERS.items():
        network = build()
        own = network.state_dict()
        if {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in tensors.items()}:
            network.load_state_dict(tensors)
            return network, name
    raise ValueError(
        f"{weights} holds the weights of none of the shipped architectures "
        f"({', '.join(CLASSIFIERS)}): say how to build the model with --model module:function"
    )


def _read(weights: str) -> dict[str, Tensor]:
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"--weights must be {', '.join(CLASSIFIERS)} or a .safetensors file, got {weights!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises a class of its own, not exported to Python
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _load_into(network: nn.Module, tensors: dict[str, Tensor], weights: str, factory: str) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit the model of {factory}: {error}") from error


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
    figure.savefig(path, dpi=150)
