"""JIIO against PGD on the shipped Fashion-MNIST classifier, in one run.

    python benchmarks/attack.py --data DIR [--images 256] [--out out/benchmark-attack]

For an L2 ball (ε = 1) and an L∞ ball (ε = 0.03), both within the pixel box, it runs

* ART's PGD-20 and torchattacks' PGD-20 through the DEQ, with the solver the model carries;
* the nested loop of this package, cold, at relative tolerances 1e-3 and 1e-2 in both solves;
* the nested loop, warm-started: every combination of tolerance, outer steps, inner cap and first
  step, with JIIO's own schedule and warm-up; its Pareto front is what JIIO is held against;
* JIIO at several numbers of iterations, and a short run with a longer one for the images that
  withstand it (the verification that finds these counts);
* JIIO's loop against a bare loop of as many model forwards and VJPs (engine overhead).

Accuracy and cross-entropy are judged by a converged solve (relative residual 1e-5, from zero) that
no method had a part in. f evaluations and VJPs are sums over samples divided by samples, with
everything a method used to choose its answer. Seconds leave that common judgement out; the rows
that are compared in seconds are run in turn, ``--repeats`` times, and their medians are printed.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from jiio_plugins import (
    Anderson,
    Box,
    Equilibrium,
    Intersection,
    Joint,
    L2Ball,
    LinfBall,
    Nested,
    attack_objective,
    count_evaluations,
)
from jiio_plugins.attacks import attack
from jiio_plugins.data import load_fashion_mnist
from jiio_plugins.models import load_pretrained

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EPS = {"L2": 1.0, "Linf": 0.03}  # fixed before Joint was run: PGD-20 leaves 23 % at Linf 0.03
TOLERANCES = (1e-3, 1e-2, 1e-1, 3e-1)
OUTER = (10, 20, 40)
CAPS = (1, 2, 30)
STEPS = (0.5, 1.0, 2.0)
JOINT = (8, 10, 12, 15, 20, 22, 30, 45, 80)
RETRY = (12, 14, 15)  # iterations for all; 40 more for the images that withstand them


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


@dataclass
class Row:
    """One method at one setting."""

    method: str
    family: str
    accuracy: float = 0.0
    loss: float = 0.0
    f_evals: float = 0.0
    vjps: float = 0.0
    seconds: float = 0.0
    judge_residual: float = 0.0
    all_seconds: list[float] = field(default_factory=list)
    setting: dict[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        return self.f_evals + self.vjps


Attack = Callable[[], Tensor]


class Bench:
    """Model, images and the judge."""

    def __init__(self, args: Args, norm: str) -> None:
        x, y = load_fashion_mnist(args.data, "test")
        self.x, self.y = x[: args.images], y[: args.images]
        self.model: Any = load_pretrained("fashion-mnist")
        self.norm, self.eps = norm, EPS[norm]
        self.order = 2.0 if norm == "L2" else math.inf

    def judge(self, x: Tensor) -> tuple[float, float, float]:
        """Accuracy, mean cross-entropy and worst residual of a solve to 1e-5, from zero.

        Ball and box are asserted.
        """
        size = torch.linalg.vector_norm((x.double() - self.x).flatten(1), ord=self.order, dim=1)
        assert float(size.max()) <= self.eps * (1 + 1e-4), f"outside the ball: {float(size.max())}"
        assert float(x.min()) >= 0, "below the box"
        assert float(x.max()) <= 1, "above the box"
        layer = self.model.equilibrium
        own, layer.solver = layer.solver, Anderson(max_iter=300, tol=1e-5)
        with torch.no_grad(), count_evaluations() as counter:
            logits = self.model(x)
        layer.solver = own
        accuracy = float((logits.argmax(1) == self.y).double().mean())
        return accuracy, float(cross_entropy(logits, self.y)), counter.worst_residual

    def run(self, row: Row, attack: Attack) -> Row:
        """Fill in the row; on later calls, only add a time."""
        with count_evaluations() as counter:
            begin = time.perf_counter()
            x = attack()
            seconds = time.perf_counter() - begin - counter.verification_seconds
        row.all_seconds.append(seconds)
        row.seconds = statistics.median(row.all_seconds)
        if len(row.all_seconds) == 1:
            row.f_evals = counter.f_evals / len(x)
            row.vjps = counter.vjps / len(x)
            row.accuracy, row.loss, row.judge_residual = self.judge(x)
        return row

    def ours(self, method: Joint | Nested, retry: Joint | None = None) -> Attack:
        """An attack of this package."""

        def run() -> Tensor:
            found = attack(
                self.model, self.x, self.y, norm=self.order, eps=self.eps, lower=0.0, upper=1.0,
                method=method, retry=retry,
            )  # fmt: skip
            assert isinstance(found.x, Tensor)
            return found.x

        return run

    def art_pgd(self, eps_step: float) -> Attack:
        from art.attacks.evasion import ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            model=self.model, loss=nn.CrossEntropyLoss(), input_shape=(1, 28, 28), nb_classes=10,
            clip_values=(0.0, 1.0), device_type="cpu",
        )  # fmt: skip
        pgd = ProjectedGradientDescent(
            classifier, norm=self.order, eps=self.eps, eps_step=eps_step, max_iter=20,
            batch_size=len(self.x), verbose=False,
        )  # fmt: skip
        return lambda: torch.from_numpy(
            np.asarray(pgd.generate(x=self.x.numpy(), y=self.y.numpy()), dtype=np.float32)
        )

    def torchattacks_pgd(self, alpha: float) -> Attack:
        import torchattacks

        if self.norm == "L2":
            pgd: Any = torchattacks.PGDL2(
                self.model, eps=self.eps, alpha=alpha, steps=20, random_start=False
            )
        else:
            pgd = torchattacks.PGD(
                self.model, eps=self.eps, alpha=alpha, steps=20, random_start=False
            )
        return lambda: pgd(self.x, self.y).detach()


def warm_settings() -> list[tuple[Row, Nested]]:
    """Every warm-started nested setting; a cap of 1 leaves the tolerance without effect."""
    out = []
    for tol, outer, cap, step in itertools.product(TOLERANCES, OUTER, CAPS, STEPS):
        if cap == 1 and tol != TOLERANCES[0]:
            continue
        method = Nested(
            max_iter=outer, step_size=step, warm_start=True, solver=Anderson(max_iter=cap, tol=tol)
        )
        name = f"nested warm, {outer} steps, cap {cap}, tol {tol:g}, step {step:g} ε"
        setting = {"outer": outer, "cap": cap, "tol": tol, "step": step}
        out.append((Row(name, "nested warm", setting=setting), method))
    return out


def front(rows: list[Row]) -> list[Row]:
    """Rows that no other row beats in both cost and loss, cheapest first."""
    out: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.cost, -r.loss)):
        if not out or row.loss > out[-1].loss:
            out.append(row)
    return out


def cost_at(loss: float, rows: list[Row]) -> float | None:
    """Cost at which the front reaches ``loss``, linear between its points; None beyond its end."""
    points = front(rows)
    if not points or points[-1].loss < loss:
        return None
    for before, after in itertools.pairwise(points):
        if before.loss < loss <= after.loss:
            share = (loss - before.loss) / (after.loss - before.loss)
            return before.cost + share * (after.cost - before.cost)
    return points[0].cost


def overhead(bench: Bench, iterations: int, repeats: int) -> dict[str, float]:
    """Seconds of Joint's iterations against as many bare model forwards and VJPs."""
    from jiio_plugins._problem import Problem, Variable

    layer: Equilibrium = bench.model.equilibrium
    x, y = bench.x, bench.y
    objective = attack_objective("cross-entropy", y)
    ball = L2Ball(bench.eps) if bench.norm == "L2" else LinfBall(bench.eps)
    feasible = Intersection(ball, Box(0.0, 1.0)).bind(x)
    parameters = list(bench.model.parameters())
    for p in parameters:
        p.requires_grad_(False)
    state = layer.cell.initial_state(bench.model.encoder(x))

    def bare() -> None:
        for k in range(iterations):
            if k:  # the first iteration needs no second evaluation of f
                with torch.no_grad():
                    layer.cell(state, bench.model.encoder(x))
                    bench.model.decode(state)
            leaf = x.clone().requires_grad_()
            z = tuple(t.clone().requires_grad_() for t in state)
            f = layer.cell(z, bench.model.encoder(leaf))
            loss = objective(bench.model.decode(z)).sum()
            torch.autograd.grad([loss, *f], [leaf, *z], [None, *state])

    method = Joint(max_iter=iterations, warmup=1)

    def joint() -> None:
        problem = Problem(Variable(bench.model, x), objective, len(x))
        method.run(problem, feasible, x.flatten(1))

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
    bench = Bench(args, norm)
    eps = bench.eps
    print(f"\n{norm}, ε = {eps}, {len(bench.x)} test images, {torch.get_num_threads()} threads")
    accuracy, loss, residual = bench.judge(bench.x)
    rows = [Row("clean", "clean", accuracy, loss, judge_residual=residual)]
    compared: list[tuple[Row, Attack]] = [
        (Row("ART PGD-20, step ε/8", "art"), bench.art_pgd(eps / 8)),
        (Row("torchattacks PGD-20, step ε/5", "torchattacks"), bench.torchattacks_pgd(eps / 5)),
    ]
    for tol in (1e-3, 1e-2):
        for name, first, last in (("0.3 → 0.03 ε", 0.3, 0.03), ("2 → 0.1 ε", 2.0, 0.1)):
            method = Nested(
                max_iter=20, step_size=first, final_step_size=last, solver=Anderson(tol=tol)
            )
            row = Row(f"nested cold, 20 steps, tol {tol:g}, {name}", f"nested cold {tol:g}")
            compared.append((row, bench.ours(method)))
    compared += [
        (Row(f"JIIO, {k} iterations", "jiio"), bench.ours(Joint(max_iter=k))) for k in JOINT
    ]
    compared += [
        (
            Row(f"JIIO, {k} iterations, retry with 40", "jiio retry"),
            bench.ours(Joint(max_iter=k), retry=Joint(max_iter=40)),
        )
        for k in RETRY
    ]
    for _ in tqdm(range(args.repeats), desc=f"{norm}, compared rows"):
        for row, call in compared:
            bench.run(row, call)
    rows += [row for row, _ in compared]
    warm = []
    if args.sweep:
        for row, method in tqdm(warm_settings(), desc=f"{norm}, nested warm sweep"):
            warm.append(bench.run(row, bench.ours(method)))
    best = {id(r) for r in front(warm)}
    show = rows + [r for r in warm if id(r) in best]
    print(
        f"{'':58} {'accuracy':>9} {'loss':>7} {'f':>7} {'VJP':>7} {'f+VJP':>7} {'seconds':>8} "
        f"{'judged at':>9}"
    )
    for r in show:
        print(
            f"{r.method:58} {100 * r.accuracy:7.2f} % {r.loss:7.3f} {r.f_evals:7.1f} "
            f"{r.vjps:7.1f} {r.cost:7.1f} {r.seconds:8.2f} {r.judge_residual:9.0e}"
        )
    verdict = compare(rows, warm)
    cost = overhead(bench, 15, args.repeats)
    print(
        f"engine overhead: JIIO's loop {cost['joint']:.2f} s, bare forwards and VJPs "
        f"{cost['bare']:.2f} s, ratio {cost['ratio']:.2f}"
    )
    plot(args.out / f"curve-{norm}.png", rows, warm, norm, eps)
    return {
        "norm": norm, "eps": eps, "rows": [asdict(r) for r in rows],
        "warm": [asdict(r) for r in warm], "verdict": verdict, "overhead": cost,
    }  # fmt: skip


def compare(rows: list[Row], warm: list[Row]) -> dict[str, Any]:
    """JIIO's cheapest run as strong as cold PGD-20, and each run against the warm front."""
    out: dict[str, Any] = {}
    cold = [r for r in rows if r.family == "nested cold 0.001"]
    for reference in cold:
        equal = [
            r for r in rows
            if r.family.startswith("jiio") and r.accuracy <= reference.accuracy + 0.01
            and r.loss >= 0.97 * reference.loss
        ]  # fmt: skip
        if not equal:
            print(f"no JIIO run is as strong as: {reference.method}")
            continue
        r = min(equal, key=lambda row: row.cost)
        others = {o.method: (o.cost / r.cost, o.seconds / r.seconds) for o in rows if o.cost > 0}
        cost, seconds = others[reference.method]
        print(
            f"{r.method} is as strong as [{reference.method}]: f+VJP 1/{cost:.1f}, "
            f"seconds 1/{seconds:.1f}"
        )
        out[reference.method] = {"jiio": r.method, "f+VJP": cost, "seconds": seconds}
    if warm:
        for r in rows:
            if r.family != "jiio":
                continue
            peer = cost_at(r.loss, warm)
            real = min((w.cost for w in warm if w.loss >= r.loss), default=None)
            if peer is None or real is None:
                print(f"{r.method}: loss {r.loss:.3f}, which no warm-started nested point reaches")
                continue
            print(
                f"{r.method}: f+VJP {r.cost / peer:.2f} of the warm-started nested front at equal "
                f"loss ({r.cost / real:.2f} of its cheapest point that is at least as strong)"
            )
            out[f"{r.method} / warm"] = {"front": r.cost / peer, "point": r.cost / real}
    return out


def plot(path: Path, rows: list[Row], warm: list[Row], norm: str, eps: float) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    if warm:
        axes.scatter([r.cost for r in warm], [r.loss for r in warm], s=8, color="0.75")
        best = front(warm)
        axes.plot([r.cost for r in best], [r.loss for r in best], color="0.5", label="nested, warm")
    for family, marker, label in (
        ("jiio", "o-", "JIIO"), ("jiio retry", "*", "JIIO with retry"),
        ("nested cold 0.001", "s", "nested, cold, tol 1e-3"),
        ("nested cold 0.01", "D", "nested, cold, tol 1e-2"), ("art", "^", "ART PGD-20"),
        ("torchattacks", "v", "torchattacks PGD-20"),
    ):  # fmt: skip
        some = [r for r in rows if r.family == family]
        axes.plot([r.cost for r in some], [r.loss for r in some], marker, label=label)
    axes.set(
        xscale="log", xlabel="f evaluations + VJPs per image", ylabel="cross-entropy, verified",
        title=f"Fashion-MNIST, {norm} ε = {eps}, pixel box",
    )  # fmt: skip
    ticks = (30, 50, 100, 200, 500)  # the default ones print over each other
    axes.set_xticks(ticks, labels=[str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for norm in args.norms:
        results.append(run_norm(args, norm))
        record = {
            "images": args.images, "threads": args.threads, "torch": torch.__version__,
            "machine": platform.machine(), "python": platform.python_version(),
            "results": results,
        }  # fmt: skip
        (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out}/results.json and a curve for each norm")


if __name__ == "__main__":
    main(tyro.cli(Args))
