"""JIIO against PGD on the shipped Fashion-MNIST classifier, in one run.

    python benchmarks/attack.py --data DIR [--images 256] [--out out/benchmark-attack]

For an L2 ball (ε = 1) and an L∞ ball (ε = 0.03), both within the pixel box, it runs what
``jiio bench`` runs (:mod:`jiio_plugins.cli.bench` says what, and how it is judged), and

* ART's PGD-20 and torchattacks' PGD-20 through the DEQ, with the solver the model carries;
* JIIO's loop against a bare loop of as many model forwards and VJPs (engine overhead).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from torch import nn

from jiio_plugins import Box, Equilibrium, Intersection, Joint, L2Ball, LinfBall, attack_objective
from jiio_plugins.cli.bench import Attack, Bench, Row, compare, machine, plot, show
from jiio_plugins.data import load_fashion_mnist
from jiio_plugins.joint import Problem, Variable
from jiio_plugins.models import load_pretrained

if TYPE_CHECKING:
    from torch import Tensor

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


def art_pgd(bench: Bench) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=bench.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    pgd = ProjectedGradientDescent(
        classifier,
        norm=bench.norm,
        eps=bench.eps,
        eps_step=bench.eps / 8,
        max_iter=20,
        batch_size=len(bench.x),
        verbose=False,
    )
    return lambda: torch.from_numpy(
        np.asarray(pgd.generate(x=bench.x.numpy(), y=bench.y.numpy()), dtype=np.float32)
    )


def torchattacks_pgd(bench: Bench) -> Attack:
    import torchattacks

    kind: Any = torchattacks.PGDL2 if bench.norm == 2 else torchattacks.PGD
    pgd = kind(bench.model, eps=bench.eps, alpha=bench.eps / 5, steps=20, random_start=False)
    return lambda: pgd(bench.x, bench.y).detach()


def overhead(bench: Bench, iterations: int, repeats: int) -> dict[str, float]:
    """Seconds of Joint's iterations against as many bare model forwards and VJPs."""
    model: Any = bench.model
    layer: Equilibrium = model.equilibrium
    x, y = bench.x, bench.y
    objective = attack_objective("cross-entropy", y)
    ball = L2Ball(bench.eps) if bench.norm == 2 else LinfBall(bench.eps)
    inside = Intersection(ball, Box(0.0, 1.0))
    parameters = list(model.parameters())
    for p in parameters:
        p.requires_grad_(False)
    state = layer.cell.initial_state(model.encoder(x))

    def bare() -> None:
        for k in range(iterations):
            if k:  # the first iteration needs no second evaluation of f
                with torch.no_grad():
                    layer.cell(state, model.encoder(x))
                    model.decode(state)
            leaf = x.clone().requires_grad_()
            z: tuple[Tensor, ...] = tuple(t.clone().requires_grad_() for t in state)
            f = layer.cell(z, model.encoder(leaf))
            loss = objective(model.decode(z)).sum()
            torch.autograd.grad([loss, *f], [leaf, *z], [None, *state])

    method = Joint(max_iter=iterations, warmup=1, adjoint_warmup=0)

    def joint() -> None:
        method.run(Problem(Variable(model, x), objective, inside))

    times: dict[str, list[float]] = {"bare": [], "joint": []}
    for _ in range(repeats + 1):
        for name, call in (("bare", bare), ("joint", joint)):
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    for p in parameters:
        p.requires_grad_(True)
    bare_s, joint_s = (statistics.median(times[name][1:]) for name in ("bare", "joint"))
    return {"bare": bare_s, "joint": joint_s, "ratio": joint_s / bare_s}


def run_norm(args: Args, norm: str) -> dict[str, Any]:
    x, y = load_fashion_mnist(args.data, "test")
    order = 2.0 if norm == "L2" else math.inf
    model = load_pretrained("fashion-mnist")
    bench = Bench(model, x[: args.images], y[: args.images], order, EPS[norm])
    hosts = [
        (Row("ART PGD-20, step ε/8", "art"), art_pgd(bench)),
        (Row("torchattacks PGD-20, step ε/5", "torchattacks"), torchattacks_pgd(bench)),
    ]
    rows, warm = bench.measure([*hosts, *bench.compared()], sweep=args.sweep, repeats=args.repeats)
    show(rows, warm)
    verdict = compare(rows, warm)
    cost = overhead(bench, 15, args.repeats)
    print(
        f"engine overhead: JIIO's loop {cost['joint']:.2f} s, bare forwards and VJPs "
        f"{cost['bare']:.2f} s, ratio {cost['ratio']:.2f}"
    )
    title = f"Fashion-MNIST, {norm} ε = {bench.eps}, pixel box"
    plot(args.out / f"curve-{norm}.png", rows, warm, title)
    return {
        "norm": norm,
        "eps": bench.eps,
        "rows": [asdict(r) for r in rows],
        "warm": [asdict(r) for r in warm],
        "verdict": verdict,
        "overhead": cost,
    }


def main(args: Args) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for norm in args.norms:
        results.append(run_norm(args, norm))
        record = {"images": args.images, **machine(), "results": results}
        (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out}/results.json and a curve for each norm")


if __name__ == "__main__":
    main(tyro.cli(Args))
