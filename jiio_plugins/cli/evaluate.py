"""``jiio evaluate``: model, images and radii from the command line; JSON, a plot and a table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jiio_plugins.cli.demo import EPS
from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.evaluation import default_suite, quick_suite, robust_accuracy
from jiio_plugins.models import load_pretrained
from jiio_plugins.models.pretrained import CLASSIFIERS
from jiio_plugins.utils.factory import build_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.evaluation import Attack, RobustnessReport


def run_evaluation(
    weights: str,
    model: str | None,
    dataset: str | None,
    data: Path,
    out: Path,
    images: int,
    norm: str,
    eps: Sequence[float],
    suite: str,
    steps: int,
    queries: int,
    batch_size: int,
    audit: int,
    seed: int,
    device: str,
) -> list[RobustnessReport]:
    """Judge at each radius, print the tables, write ``robustness.json`` and ``robustness.png``."""
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    importlib.import_module("matplotlib")  # rather now than after the last attack
    network, dataset, (x, y) = load_task(weights, model, dataset, data)
    x, y = x[:images].to(device), y[:images].to(device)
    network = network.to(device)
    p = float(norm)
    radii = sorted(eps) or [EPS[dataset][p] / 2, EPS[dataset][p]]
    reports: list[RobustnessReport] = []
    for radius in radii:
        attacks: tuple[Attack, ...]
        if suite == "quick":
            attacks = quick_suite(eps=radius, norm=p)
        else:
            attacks = default_suite(eps=radius, norm=p, steps=steps, queries=queries, seed=seed)
        report = robust_accuracy(
            network,
            x,
            y,
            attacks,
            eps=radius,
            norm=p,
            batch_size=batch_size,
            known=reports[-1].worst if reports else None,  # a smaller ball lies in this one
            audit=0 if reports else audit,
        )
        print(f"\n{report}\n", flush=True)
        reports.append(report)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "weights": weights,
        "model": model,
        "dataset": dataset,
        "suite": suite,
        "steps": steps,
        "queries": queries,
        "batch_size": batch_size,
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "reports": [r.to_dict() for r in reports],
    }
    (out / "robustness.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_accuracy(out / "robustness.png", reports, f"{model or weights}, {len(x)} {dataset} images")
    print(f"numbers and plot: {out}/robustness.json, {out}/robustness.png")
    return reports


def load_task(
    weights: str, model: str | None, dataset: str | None, data: Path
) -> tuple[nn.Module, str, tuple[Tensor, Tensor]]:
    """The model, the name of the data set, and its test images and labels; see :func:`load_model`.

    Raises:
        ValueError: it is not known, and not said, what the model is for.
    """
    network, trained_on = load_model(weights, model)
    dataset = dataset or trained_on
    if dataset is None:
        raise ValueError("say what to attack the model on: --dataset digits or fashion-mnist")
    test = load_digits("test") if dataset == "digits" else load_fashion_mnist(data, "test")
    return network, dataset, test


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    clean = reports[0].clean
    eps = [0.0, *(r.eps for r in reports)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
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
    plt.close(figure)
