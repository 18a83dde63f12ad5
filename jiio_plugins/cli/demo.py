"""``jiio demo``: JIIO and ART's PGD on the same DEQ, images and ball, side by side."""

from __future__ import annotations

import importlib
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.equilibrium.counting import count_evaluations
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.evaluation import layers_as
from jiio_plugins.hosts import load_adapter
from jiio_plugins.models import load_pretrained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


EPS = {
    "digits": {2.0: 0.5, math.inf: 0.1, 1.0: 3.0},
    "fashion-mnist": {2.0: 1.0, math.inf: 0.03, 1.0: 10.0},
}


PGD_STEPS = (2, 5, 10, 20)


JIIO_STEPS = (4, 8, 12, 16, 24)


@dataclass
class Row:
    """One attack, judged by a converged solve that it had no part in."""

    attack: str
    iterations: int
    accuracy: float
    loss: float
    f_evals: float
    vjps: float
    seconds: float
    worst_residual: float

    @property
    def cost(self) -> float:
        """F evaluations and VJPs together, per image."""
        return self.f_evals + self.vjps


def run_demo(
    dataset: str, data: Path, out: Path, images: int, norm: float, eps: float | None
) -> list[Row]:
    """Run both attacks, print the table, write ``results.json``, ``curve.png``, ``images.png``."""
    importlib.import_module("matplotlib")  # rather now than after the last attack
    load_adapter("art")  # says what to install before anything is run
    x, y = load_digits("test") if dataset == "digits" else load_fashion_mnist(data, "test")
    x, y = x[:images], y[:images]
    eps = EPS[dataset][norm] if eps is None else eps
    model = load_pretrained(dataset)
    classifier = _classifier(model, x)
    print(
        f"{len(x)} {dataset} test images, L{norm:g} ball of radius {eps:g} within [0, 1]. "
        "Accuracy and loss are from a converged solve at the returned images."
    )
    rows = [judge("clean", 0, model, x, y, 0.0, 0.0, 0.0)]
    examples: dict[str, Tensor] = {}
    jobs = [("ART PGD", k) for k in PGD_STEPS] + [("JIIO in ART", k) for k in JIIO_STEPS]
    with tqdm(jobs, desc="attacks") as bar:
        for name, steps in bar:
            bar.set_postfix_str(f"{name}, {steps} steps")
            attack = _attack(name, classifier, norm, eps, steps)
            with count_evaluations() as counter:
                begin = time.perf_counter()
                found = torch.from_numpy(attack(x.numpy(), y.numpy()))
                # JIIO judges itself before it returns; PGD does not, so both are timed without
                seconds = time.perf_counter() - begin - counter.verification_seconds
            check_feasible(found, x, norm, eps)
            cost = counter.f_evals / len(x), counter.vjps / len(x)
            rows.append(judge(name, steps, model, found, y, *cost, seconds))
            examples[name] = found
    _print_table(rows)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "results.json", rows, dataset, len(x), norm, eps)
    _plot_curve(out / "curve.png", rows)
    _plot_images(out / "images.png", model, x, examples["JIIO in ART"], y)
    print(f"pictures and numbers: {out}/images.png, {out}/curve.png, {out}/results.json")
    return rows


def judge(
    name: str, steps: int, model: nn.Module, x: Tensor, y: Tensor, f: float, vjp: float, s: float
) -> Row:
    """A row, by :func:`converged`."""
    accuracy, loss, residual = converged(model, x, y)
    return Row(name, steps, accuracy, loss, f, vjp, s, residual)


def converged(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Accuracy, mean cross-entropy and worst residual of a solve to 1e-5, from nothing."""
    tight = Anderson(max_iter=300, tol=1e-5)
    with torch.no_grad(), count_evaluations() as counter, layers_as(solver=tight):
        logits = model(x)
    accuracy = float((logits.argmax(1) == y).double().mean())
    return accuracy, float(cross_entropy(logits, y)), counter.worst_residual


def _classifier(model: nn.Module, x: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if torch.cuda.is_available() else "cpu",
    )


def _attack(
    name: str, classifier: Any, norm: float, eps: float, steps: int
) -> Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]:
    if name == "ART PGD":
        from art.attacks.evasion import ProjectedGradientDescent

        pgd = ProjectedGradientDescent(
            classifier,
            norm=norm,
            eps=eps,
            eps_step=2.5 * eps / steps,
            max_iter=steps,
            batch_size=1024,
            verbose=False,
        )
        generate: Any = pgd.generate
    else:
        jiio = load_adapter("art").JIIOAttack(
            classifier, norm=norm, eps=eps, max_iter=steps, batch_size=1024, verbose=False
        )
        generate = jiio.generate
    return lambda x, y: np.asarray(generate(x=x, y=y), dtype=np.float32)


def check_feasible(found: Tensor, x: Tensor, norm: float, eps: float) -> None:
    """Ball and box, whoever made the images."""
    size = torch.linalg.vector_norm((found.double() - x.double()).flatten(1), ord=norm, dim=1)
    rounding = torch.finfo(x.dtype).eps * x[0].numel() ** (1 / norm)
    allowed = eps * (1 + 1e-4) + rounding
    if float(size.max()) > allowed or float(found.min()) < 0 or float(found.max()) > 1:
        raise RuntimeError(
            f"an attack left its ball or box: largest norm {float(size.max())}, allowed {eps}"
        )


def _print_table(rows: list[Row]) -> None:
    print(
        f"{'attack':>12} {'steps':>6} {'accuracy':>9} {'loss':>7} {'f':>7} {'VJP':>7} "
        f"{'f+VJP':>7} {'seconds':>8}"
    )
    for r in rows:
        print(
            f"{r.attack:>12} {r.iterations:6d} {100 * r.accuracy:7.1f} % {r.loss:7.3f} "
            f"{r.f_evals:7.1f} {r.vjps:7.1f} {r.cost:7.1f} {r.seconds:8.2f}"
        )
    strongest = [r for r in rows if r.attack == "ART PGD"][-1]
    equal = [
        r
        for r in rows
        if r.attack == "JIIO in ART"
        and r.accuracy <= strongest.accuracy + 0.01
        and r.loss >= 0.97 * strongest.loss
    ]
    if equal:
        r = min(equal, key=lambda row: row.cost)
        print(
            f"JIIO with {r.iterations} steps is as strong as PGD-{strongest.iterations} (accuracy "
            f"within 1 point or lower, loss at least 97 %) at 1/{strongest.cost / r.cost:.1f} of "
            f"its f+VJP and 1/{strongest.seconds / r.seconds:.1f} of its time."
        )
    else:
        print("No JIIO run here is as strong as the strongest PGD run.")


def _write_json(
    path: Path, rows: list[Row], dataset: str, images: int, norm: float, eps: float
) -> None:
    record = {
        "dataset": dataset,
        "images": images,
        "norm": str(norm),
        "eps": eps,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [asdict(r) for r in rows],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _plot_curve(path: Path, rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, marker in (("ART PGD", "s"), ("JIIO in ART", "o")):
        some = [r for r in rows if r.attack == name]
        axes.plot([r.cost for r in some], [r.loss for r in some], marker=marker, label=name)
    axes.axhline(rows[0].loss, color="grey", linestyle=":", label="clean")
    axes.set(
        xscale="log",
        xlabel="f evaluations + VJPs per image",
        ylabel="cross-entropy, verified",
        title="Strength of the attack against its cost",
    )
    axes.set_xticks([20, 50, 100, 200, 500, 1000], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def _plot_images(path: Path, model: nn.Module, x: Tensor, found: Tensor, y: Tensor) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    before, after = model(x).argmax(1), model(found).argmax(1)
    turned = ((before == y) & (after != y)).nonzero().squeeze(1)
    shown = (turned if len(turned) else torch.arange(len(x)))[:8]
    figure, axes = plt.subplots(
        3, len(shown), figsize=(1.3 * len(shown) + 0.4, 4.6), layout="constrained", squeeze=False
    )
    delta = found - x
    limit = float(delta[shown].abs().max()) or 1.0
    for column, i in enumerate(int(k) for k in shown):
        panels = (
            (x[i, 0], {"cmap": "gray", "vmin": 0, "vmax": 1}, f"{int(before[i])}"),
            (delta[i, 0], {"cmap": "RdBu", "vmin": -limit, "vmax": limit}, ""),
            (found[i, 0], {"cmap": "gray", "vmin": 0, "vmax": 1}, f"{int(after[i])}"),
        )
        for axis, (image, style, title) in zip(axes[:, column], panels, strict=True):
            axis.imshow(image, **style)
            axis.set_title(title and f"says {title}")
            axis.set(xticks=[], yticks=[])
    for axis, label in zip(axes[:, 0], ("clean", "perturbation", "adversarial"), strict=True):
        axis.set_ylabel(label)
    figure.savefig(path, dpi=150)
    plt.close(figure)
