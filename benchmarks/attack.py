"""JIIO against PGD on the shipped Fashion-MNIST classifier, in one run.

    python benchmarks/attack.py --data DIR [--images 256] [--out out/benchmark-attack]

For an L2 ball (ε = 1) and an L∞ ball (ε = 0.03), both within the pixel box, it runs what
``jiio bench`` runs (:func:`jiio_plugins.evaluation.compare_with_nested`), and ART's and
torchattacks' PGD-20 through the DEQ, with the solver the model carries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from jiio_plugins.data import load_fashion_mnist
from jiio_plugins.evaluation import Comparison, Row, compare_with_nested
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import write_json

EPS = {"L2": 1.0, "Linf": 0.03}  # fixed before Joint was run: PGD-20 leaves 23 % at Linf 0.03


@dataclass
class Args:
    """Benchmark of the attack."""

    data: Path = Path("data")
    """folder of Fashion-MNIST: torchvision's root, or Debian's"""
    images: int = 256
    out: Path = Path("out/benchmark-attack")
    norms: tuple[str, ...] = ("L2", "Linf")
    sweep: bool = True
    """run the sweep of the warm-started nested loop"""
    repeats: int = 3
    """times the compared rows are run for their seconds"""
    threads: int = 2


def art_pgd(comparison: Comparison) -> Any:
    """ART's PGD of 20 steps, through the solves and the gradients that the model itself makes."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=comparison.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(comparison.x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    pgd = ProjectedGradientDescent(
        classifier,
        norm=comparison.norm,
        eps=comparison.eps,
        eps_step=comparison.eps / 8,
        max_iter=20,
        batch_size=len(comparison.x),
        verbose=False,
    )

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(pgd.generate(x=x.numpy(), y=y.numpy()), np.float32))

    return run


def torchattacks_pgd(comparison: Comparison) -> Any:
    import torchattacks

    kind: Any = torchattacks.PGDL2 if comparison.norm == 2 else torchattacks.PGD
    eps = comparison.eps
    pgd = kind(comparison.model, eps=eps, alpha=eps / 5, steps=20, random_start=False)
    return lambda model, x, y: pgd(x, y).detach()


def run_norm(args: Args, norm: str) -> dict[str, Any]:
    x, y = (t[: args.images] for t in load_fashion_mnist(args.data, "test"))
    model, order = load_pretrained("fashion-mnist"), 2.0 if norm == "L2" else math.inf
    comparison = Comparison(model, x, y, norm=order, eps=EPS[norm])
    hosts = [
        (Row("ART PGD-20, step ε/8", "ART PGD-20"), art_pgd(comparison)),
        (Row("torchattacks PGD-20, step ε/5", "torchattacks PGD-20"), torchattacks_pgd(comparison)),
    ]
    verdict = compare_with_nested(comparison, hosts, sweep=args.sweep, repeats=args.repeats)
    title = f"Fashion-MNIST, {norm} ε = {comparison.eps}, pixel box"
    comparison.plot(args.out / f"curve-{norm}.png", title)
    return {**comparison.to_dict(), "norm": norm, "verdict": verdict}


def main(args: Args) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for norm in args.norms:
        results.append(run_norm(args, norm))
        record = {"images": args.images, "results": results}
        write_json(args.out / "results.json", record)
    print(f"written: {args.out}/results.json and a curve for each norm")


if __name__ == "__main__":
    main(tyro.cli(Args))
