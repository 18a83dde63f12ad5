"""``jiio bench``: what JIIO costs on a model, beside the nested loop at its strongest settings.

For a ball within the pixel box it runs, on the same images,

* the nested loop, cold: two step schedules, relative tolerances 1e-3 and 1e-2 in both solves;
* the nested loop, warm-started: every combination of tolerance, outer steps, inner cap and first
  step, with JIIO's own schedule and warm-up; its Pareto front is what JIIO is held against;
* JIIO at several numbers of iterations, and a short run with a longer one for the images that
  withstand it (the verification that finds these counts).

Accuracy and cross-entropy are judged by a converged solve (relative residual 1e-5, from the initial
state) that no method had a part in. f evaluations and VJPs are sums over samples divided by
samples, with everything a method used to choose its answer. Seconds leave that common judgement
out; the rows that are compared in seconds are run in turn, and their medians are printed.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from jiio_plugins.attacks import attack
from jiio_plugins.cli.demo import EPS, check_feasible, converged
from jiio_plugins.cli.evaluate import load_task
from jiio_plugins.equilibrium.counting import count_evaluations
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.methods.joint import Joint
from jiio_plugins.methods.nested import Nested
from jiio_plugins.models.pretrained import CLASSIFIERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from jiio_plugins.methods.base import Method


TOLERANCES = (1e-3, 1e-2, 1e-1, 3e-1)


OUTER = (10, 20, 40)


CAPS = (1, 2, 30)


STEPS = (0.5, 1.0, 2.0)


JOINT = (8, 10, 12, 15, 20, 22, 30, 45, 80)


RETRY = (12, 14, 15)  # iterations for all; 40 more for the images that withstand them


Attack = Callable[[], Tensor]


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
        """F evaluations and VJPs together, per image."""
        return self.f_evals + self.vjps


class Bench:
    """Model, images, ball and the judge.

    Args:
        model: returns logits ``(batch, classes)``.
        x: images within [0, 1].
        y: labels.
        norm: 1, 2 or inf.
        eps: radius.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: float, eps: float) -> None:
        self.model, self.x, self.y, self.norm, self.eps = model.eval(), x, y, norm, eps

    def judge(self, x: Tensor) -> tuple[float, float, float]:
        """See :func:`jiio_plugins.cli.demo.converged`."""
        check_feasible(x, self.x, self.norm, self.eps)
        return converged(self.model, x, self.y)

    def clean(self) -> Row:
        """The images as they are."""
        accuracy, loss, residual = self.judge(self.x)
        return Row("clean", "clean", accuracy, loss, judge_residual=residual)

    def run(self, row: Row, attack: Attack) -> Row:
        """Fill in the row; on later calls, only add a time."""
        with count_evaluations() as counter:
            begin = time.perf_counter()
            x = attack()
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin - counter.verification_seconds
        row.all_seconds.append(seconds)
        row.seconds = statistics.median(row.all_seconds)
        if len(row.all_seconds) == 1:
            row.f_evals = counter.f_evals / len(x)
            row.vjps = counter.vjps / len(x)
            row.accuracy, row.loss, row.judge_residual = self.judge(x)
        return row

    def ours(self, method: Method, retry: Method | None = None) -> Attack:
        """An attack of this package."""

        def run() -> Tensor:
            found = attack(
                self.model,
                self.x,
                self.y,
                norm=self.norm,
                eps=self.eps,
                lower=0.0,
                upper=1.0,
                method=method,
                retry=retry,
            )
            assert isinstance(found.x, Tensor)
            return found.x

        return run

    def compared(self, joint: Iterable[int] = JOINT) -> list[tuple[Row, Attack]]:
        """The rows that are compared in seconds."""
        out: list[tuple[Row, Attack]] = []
        for tol in (1e-3, 1e-2):
            for name, first, last in (("0.3 → 0.03 ε", 0.3, 0.03), ("2 → 0.1 ε", 2.0, 0.1)):
                cold = Nested(
                    max_iter=20, step_size=first, final_step_size=last, solver=Anderson(tol=tol)
                )
                row = Row(f"nested cold, 20 steps, tol {tol:g}, {name}", f"nested cold {tol:g}")
                out.append((row, self.ours(cold)))
        out += [(Row(f"JIIO, {k} iterations", "jiio"), self.ours(Joint(max_iter=k))) for k in joint]
        out += [
            (
                Row(f"JIIO, {k} iterations, retry with 40", "jiio retry"),
                self.ours(Joint(max_iter=k), Joint(max_iter=40)),
            )
            for k in RETRY
        ]
        return out

    def measure(
        self, compared: Sequence[tuple[Row, Attack]], *, sweep: bool, repeats: int
    ) -> tuple[list[Row], list[Row]]:
        """All rows, those of the warm sweep apart; the table and the verdict are printed."""
        name = f"L{self.norm:g}".replace("inf", "∞")
        print(
            f"\n{name}, ε = {self.eps:g}, {len(self.x)} images, {torch.get_num_threads()} threads"
        )
        for _ in tqdm(range(repeats), desc=f"{name}, compared rows"):
            for row, call in compared:
                self.run(row, call)
        warm = []
        if sweep:
            for row, method in tqdm(warm_settings(), desc=f"{name}, nested warm sweep"):
                warm.append(self.run(row, self.ours(method)))
        return [self.clean(), *(row for row, _ in compared)], warm


def run_bench(
    weights: str,
    model: str | None,
    dataset: str | None,
    data: Path,
    out: Path,
    images: int,
    norm: str,
    eps: float | None,
    sweep: bool,
    repeats: int,
    threads: int | None,
    device: str,
) -> dict[str, Any]:
    """Measure, print the table and the verdict, write ``results.json`` and ``curve.png``."""
    if images < 1 or repeats < 1:
        raise ValueError(f"images and repeats must be at least 1, got {images} and {repeats}")
    importlib.import_module("matplotlib")  # rather now than after the last measurement
    if threads is not None:
        torch.set_num_threads(threads)
    network, dataset, (x, y) = load_task(weights, model, dataset, data)
    p = float(norm)
    radius = EPS[dataset][p] if eps is None else eps
    if not radius > 0:
        raise ValueError(f"eps must be above 0, got {radius}")
    bench = Bench(network.to(device), x[:images].to(device), y[:images].to(device), p, radius)
    rows, warm = bench.measure(bench.compared(), sweep=sweep, repeats=repeats)
    show(rows, warm)
    used = None if model and weights in CLASSIFIERS else weights  # the default is not for --model
    record = {
        "weights": used,
        "model": model,
        "dataset": dataset,
        "norm": norm,
        "eps": radius,
        "images": len(bench.x),
        **machine(),
        "rows": [asdict(r) for r in rows],
        "warm": [asdict(r) for r in warm],
        "verdict": compare(rows, warm),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(out / "curve.png", rows, warm, f"{model or weights}, L{norm} ε = {radius:g}, pixel box")
    print(f"numbers and plot: {out}/results.json, {out}/curve.png")
    return record


def machine() -> dict[str, Any]:
    """What seconds depend on."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


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


def front(rows: Iterable[Row]) -> list[Row]:
    """Rows that no other row beats in both cost and loss, cheapest first."""
    out: list[Row] = []
    for row in sorted((r for r in rows if math.isfinite(r.loss)), key=lambda r: (r.cost, -r.loss)):
        if not out or row.loss > out[-1].loss:
            out.append(row)
    return out


def cost_at(loss: float, rows: Iterable[Row]) -> float | None:
    """Cost at which the front reaches ``loss``, linear between its points; None beyond its end."""
    points = front(rows)
    if not points or points[-1].loss < loss:
        return None
    for before, after in itertools.pairwise(points):
        if before.loss < loss <= after.loss:
            share = (loss - before.loss) / (after.loss - before.loss)
            return before.cost + share * (after.cost - before.cost)
    return points[0].cost


def show(rows: Sequence[Row], warm: Sequence[Row]) -> None:
    """The table; of the sweep, its front."""
    print(
        f"{'':58} {'accuracy':>9} {'loss':>7} {'f':>7} {'VJP':>7} {'f+VJP':>7} {'seconds':>8} "
        f"{'judged at':>9}"
    )
    for r in (*rows, *front(warm)):
        print(
            f"{r.method:58} {100 * r.accuracy:7.2f} % {r.loss:7.3f} {r.f_evals:7.1f} "
            f"{r.vjps:7.1f} {r.cost:7.1f} {r.seconds:8.2f} {r.judge_residual:9.0e}"
        )


def compare(rows: Sequence[Row], warm: Sequence[Row]) -> dict[str, Any]:
    """JIIO's cheapest run as strong as cold PGD-20, and each run against the warm front."""
    out: dict[str, Any] = {}
    cold = [r for r in rows if r.family == "nested cold 0.001"]
    for reference in cold:
        equal = [
            r
            for r in rows
            if r.family.startswith("jiio")
            and r.accuracy <= reference.accuracy + 0.01
            and r.loss >= 0.97 * reference.loss
        ]
        if not equal:
            print(f"no JIIO run is as strong as: {reference.method}")
            continue
        r = min(equal, key=lambda row: row.cost)
        cost, seconds = reference.cost / r.cost, reference.seconds / r.seconds
        print(
            f"{r.method} is as strong as [{reference.method}]: f+VJP 1/{cost:.1f}, "
            f"seconds 1/{seconds:.1f}"
        )
        out[reference.method] = {"jiio": r.method, "f+VJP": cost, "seconds": seconds}
    for r in rows if warm else ():
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


def plot(path: Path, rows: Sequence[Row], warm: Sequence[Row], title: str) -> None:
    """Loss against cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    if warm:
        axes.scatter([r.cost for r in warm], [r.loss for r in warm], s=8, color="0.75")
        best = front(warm)
        axes.plot([r.cost for r in best], [r.loss for r in best], color="0.5", label="nested, warm")
    for family, marker, label in (
        ("jiio", "o-", "JIIO"),
        ("jiio retry", "*", "JIIO with retry"),
        ("nested cold 0.001", "s", "nested, cold, tol 1e-3"),
        ("nested cold 0.01", "D", "nested, cold, tol 1e-2"),
        ("art", "^", "ART PGD-20"),
        ("torchattacks", "v", "torchattacks PGD-20"),
    ):
        some = [r for r in rows if r.family == family]
        if some:
            axes.plot([r.cost for r in some], [r.loss for r in some], marker, label=label)
    axes.set(
        xscale="log",
        xlabel="f evaluations + VJPs per image",
        ylabel="cross-entropy, verified",
        title=title,
    )
    ticks = (30, 50, 100, 200, 500)  # the default ones print over each other
    axes.set_xticks(ticks, labels=[str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
