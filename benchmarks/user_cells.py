"""Adversarial training of three cells that are not ours, with the defaults, against PGD training.

    python benchmarks/user_cells.py [--kinds conv torchdeq dense] [--weights 0 0.3 3] [--seeds 3]

Each model is trained from scratch on scikit-learn's digits, in an L2 ball within the pixel box, by

* :class:`jiio_art.JIIOAdversarialTrainer` with its defaults, and with each of ``--weights`` as
  ``jacobian_weight``;
* ART's own ``AdversarialTrainer`` with ART's PGD, through the solves and the gradients that the
  model itself makes. Same weights to begin with, same images, batches and epochs. Each seed draws
  other weights and another order, and either moves the result by several points.

Then it is judged on test images, as they are and under
:func:`jiio_plugins.evaluation.quick_suite`. The columns, in percent:

* clean, robust: of test images, by both kinds of solves;
* verified: test images for which independent solves converge, as they are and at all examples that
  were found for them;
* bar: what the trainer's bar ended with as clean and robust, on some training images;
* judged: the same of all training images, by solves at the images and at the examples that the
  training's own search finds. It is what the bar should say;
* s: of the training, CPU seconds.

The cells: ``conv`` is the deep equilibrium tutorial's block with group norms, ``torchdeq`` a layer
of TorchDEQ with its solver, ``dense`` fully connected.
"""

from __future__ import annotations

import itertools
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchdeq
import tyro
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.data_generators import DataGenerator
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_models.classifiers import Classifier, ResNetCell

from jiio_art import JIIOAdversarialTrainer, JIIOAttack
from jiio_plugins import Anderson, Equilibrium
from jiio_plugins.adversarial import AdversarialTraining, TensorBatches, validate
from jiio_plugins.data import load_digits
from jiio_plugins.evaluation import quick_suite, robust_accuracy
from jiio_plugins.utils import write_json
from jiio_torchdeq import adapt

if TYPE_CHECKING:
    from collections.abc import Callable

SOLVER = Anderson(max_iter=50, tol=1e-3)


def conv(channels: int = 12) -> nn.Module:
    """The tutorial's block, without its batch norms around it."""
    encoder = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels))
    head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(channels * 16, 10))
    cell = ResNetCell(channels, channels, groups=4)
    return Classifier(encoder, Equilibrium(cell, solver=SOLVER), head)


class TorchDEQNet(nn.Module):
    """``f(z, u) = GN(relu(conv z + u))`` from small weights, solved by TorchDEQ."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.head = nn.Linear(channels * 16, 10)
        nn.init.normal_(self.conv.weight, std=0.01)
        self.deq = torchdeq.get_deq(
            f_solver="anderson", f_max_iter=40, f_tol=1e-3, b_max_iter=40, b_tol=1e-3, ift=True
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        z, _ = self.deq(lambda z: self.norm(F.relu(self.conv(z) + u)), torch.zeros_like(u))
        return self.head(F.avg_pool2d(z[-1], 2).flatten(1))


class DenseCell(nn.Module):
    """``f(z, u) = tanh(W z + b + u)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + u)


def dense(width: int = 100) -> nn.Module:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, width))
    layer = Equilibrium(DenseCell(width), solver=SOLVER)
    return Classifier(encoder, layer, nn.Linear(width, 10))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "torchdeq": lambda: adapt(TorchDEQNet()),
    "dense": dense,
}


@dataclass
class Args:
    """Benchmark of adversarial training on users' cells."""

    kinds: tuple[str, ...] = tuple(KINDS)
    weights: tuple[float, ...] = ()
    """of the Jacobian penalty, besides the default"""
    pgd: bool = True
    """whether ART's PGD training is made, too"""
    eps: float = 0.5
    epochs: int = 6
    train: int = 640
    """training images, at most 1297"""
    test: int = 500
    """test images, at most 500"""
    batch: int = 50
    lr: float = 5e-3
    pgd_steps: int = 7
    seeds: int = 3
    """of weights and shuffles: results differ by several points from one to the next"""
    threads: int = 1
    out: Path = Path("out/benchmark-user-cells")


def classifier(args: Args, kind: str, seed: int) -> PyTorchClassifier:
    torch.manual_seed(seed)
    model = KINDS[kind]()
    return PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        optimizer=torch.optim.Adam(model.parameters(), lr=args.lr),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def by_jiio(args: Args, target: PyTorchClassifier, seed: int, **options: Any) -> dict[str, Any]:
    """Train. What the bar showed last, and what it said of the training."""
    x, y = (t[: args.train].numpy() for t in load_digits("train"))
    attack = JIIOAttack(target, norm=2, eps=args.eps, verbose=False)
    trainer = JIIOAdversarialTrainer(target, attack, seed=seed, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(x, y, batch_size=args.batch, nb_epochs=args.epochs)
    return {"history": trainer.history, "warnings": [str(w.message) for w in said]}


class SameBatches(DataGenerator):
    """The batches that :class:`JIIOAdversarialTrainer` draws, for ART's trainer."""

    def __init__(self, batches: TensorBatches) -> None:
        super().__init__(len(batches.x), batches.batch_size)
        self.drawn = (pair for epoch in itertools.count() for pair in batches.epoch(epoch))

    def get_batch(self) -> tuple[Any, ...]:
        """The next images and labels."""
        return tuple(t.numpy() for t in next(self.drawn))


def by_pgd(args: Args, target: PyTorchClassifier, seed: int) -> dict[str, Any]:
    """Train with ART's own trainer and attack."""
    x, y = (t[: args.train] for t in load_digits("train"))
    attack = ProjectedGradientDescentPyTorch(
        target,
        norm=2,
        eps=args.eps,
        eps_step=2.5 * args.eps / args.pgd_steps,
        max_iter=args.pgd_steps,
        batch_size=args.batch,
        verbose=False,
    )
    np.random.seed(seed)  # noqa: NPY002 (ART shuffles a batch by it)
    trainer = AdversarialTrainer(target, attack, ratio=1.0)
    batches = SameBatches(TensorBatches(x, y, args.batch, seed=seed))
    trainer.fit_generator(batches, nb_epochs=args.epochs)
    return {}


def judged(args: Args, model: nn.Module) -> dict[str, float]:
    """The columns that are judged."""
    ball: dict[str, Any] = {"eps": args.eps, "norm": 2, "lower": 0.0, "upper": 1.0}
    x, y = (t[: args.test] for t in load_digits("test"))
    report = robust_accuracy(model, x, y, quick_suite(**ball), **ball, audit=0)
    training = AdversarialTraining(**ball)
    test = validate(model, training, x, y)
    train = validate(model, training, *(t[: args.train] for t in load_digits("train")))
    return {
        "clean": report.clean.value,
        "robust": report.accuracy.value,
        "verified": 1 - max(report.unverified / args.test, test["unverified"]),
        "judged_clean": train["clean"],
        "judged_robust": train["robust"],
    }


def header() -> str:
    return (
        f"  {'training':<32}{'clean':>7}{'robust':>8}{'verified':>10}{'bar: clean':>12}"
        f"{'judged':>8}{'bar: robust':>13}{'judged':>8}{'s':>7}  warnings"
    )


def show(name: str, row: dict[str, Any]) -> None:
    last = row["history"][-1] if "history" in row else {}
    ended = {k: last.get(f"final_{k}") for k in ("clean", "robust")}
    bar = {k: "" if value is None else f"{100 * value:.1f}" for k, value in ended.items()}
    percent = {k: 100 * v for k, v in row["judged"].items()}
    print(
        f"  {name:<32}{percent['clean']:>7.1f}{percent['robust']:>8.1f}{percent['verified']:>10.1f}"
        f"{bar['clean']:>12}{percent['judged_clean']:>8.1f}{bar['robust']:>13}"
        f"{percent['judged_robust']:>8.1f}{row['seconds']:>7.0f}  {len(row.get('warnings', []))}",
        flush=True,
    )


def main(args: Args) -> None:
    if unknown := set(args.kinds) - set(KINDS):
        raise SystemExit(f"no such kind: {sorted(unknown)}. There are {', '.join(KINDS)}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainings: dict[str, Callable[..., dict[str, Any]]] = {
        "JIIO, defaults": partial(by_jiio, args),
        **{
            f"JIIO, jacobian_weight={w:g}": partial(by_jiio, args, jacobian_weight=w)
            for w in args.weights
        },
    }
    if args.pgd:
        trainings[f"PGD-{args.pgd_steps}"] = partial(by_pgd, args)
    results: dict[str, Any] = {}
    for kind in args.kinds:
        print(f"\n{kind}\n{header()}", flush=True)
        for seed, (name, train) in itertools.product(range(args.seeds), trainings.items()):
            target = classifier(args, kind, seed)
            begin = time.process_time()
            row = train(target, seed)
            row["seconds"] = time.process_time() - begin
            row["judged"] = judged(args, target.model)
            results[f"{kind} / {name} / seed {seed}"] = row
            show(f"{name}, seed {seed}", row)
            write_json(args.out / "results.json", results)
    print(f"\nwritten: {args.out}/results.json")


if __name__ == "__main__":
    main(tyro.cli(Args))
