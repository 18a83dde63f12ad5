"""How the cost of an attack grows with batch, image, number of classes and state.

    python benchmarks/scaling.py [--axes batch side] [--out out/benchmark-scaling]

A convolutional DEQ attacks digits that are enlarged to the size asked for. Its weights are as they
were drawn, but that it contracts: this measures cost, and no strength. The check at the end is left
out, as its length depends on the cell. Each axis changes one size and keeps the others.

Seconds are of the process, the least of several rounds, and of all rows of the batch. The exponent
is that of the growth from one size to the next, ``log(seconds) / log(size)``, by pixels where the
side grows: 1 is linear. It is below 1 at small sizes, as a call has costs of its own.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from matplotlib.figure import Figure
from torch.nn.functional import interpolate

from jiio_plugins import Joint, attack
from jiio_plugins.data import load_digits
from jiio_plugins.models import ConvDEQClassifier
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Args:
    """Benchmark of how cost grows."""

    axes: list[str] = field(default_factory=lambda: list(AXES))
    """Which of them: batch, side, classes, state."""
    iterations: int = 10
    """Of the joint iteration."""
    rounds: int = 3
    """Rounds, of which the fastest counts."""
    largest: float = math.inf
    """Sizes above this are left out, for a quick look."""
    threads: int = 1
    """Of PyTorch."""
    out: Path = Path("out/benchmark-scaling")
    """Where results.json and the plot go."""


@dataclass(frozen=True)
class Size:
    """What one run has."""

    batch: int = 16
    side: int = 28
    classes: int = 10
    channels: int = 8
    stride: int = 2

    @property
    def state(self) -> int:
        """Numbers in a row's state."""
        return self.channels * math.ceil(self.side / self.stride) ** 2


AXES: dict[str, list[Size]] = {
    "batch": [Size(batch=n) for n in (1, 4, 16, 64, 256, 1024)],
    "side": [Size(side=n) for n in (28, 40, 56, 80, 128)],
    "classes": [Size(classes=n) for n in (10, 100, 1000)],
    "state": [Size(batch=2, side=n, stride=1) for n in (32, 64, 128, 192, 256)],
}


def at(axis: str, size: Size) -> int:
    """Where a run stands on its axis."""
    found: int = getattr(size, axis)
    return found


def images(size: Size) -> tuple[Tensor, Tensor]:
    x, y = load_digits("test")
    picked = torch.arange(size.batch) % len(x)
    large = interpolate(x[picked], size=(size.side, size.side), mode="bilinear")
    return large.clamp(0, 1), y[picked]


def measure(args: Args, axis: str, size: Size) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ConvDEQClassifier(classes=size.classes, channels=size.channels, stride=size.stride)
    with torch.no_grad():
        model.equilibrium.cell.norm3.weight.mul_(0.2)
    x, y = images(size)
    seconds = math.inf
    for _ in range(args.rounds):
        begin = time.process_time()
        found = attack(
            model,
            x,
            y,
            norm=2,
            eps=1.0,
            lower=0,
            upper=1,
            method=Joint(max_iter=args.iterations),
            verify=False,
        )
        seconds = min(seconds, time.process_time() - begin)
    stats = found.stats
    return {
        **asdict(size),
        "state": size.state,
        "seconds": seconds,
        "f_evals": stats.f_evals.mean().item(),
        "vjps": stats.vjps.mean().item(),
        "at": at(axis, size),
    }


def run_axis(args: Args, axis: str) -> list[dict[str, Any]]:
    print(f"\n{axis:>10}{'f':>8}{'VJP':>8}{'seconds':>10}{'s a row':>10}{'exponent':>10}")
    rows: list[dict[str, Any]] = []
    for size in AXES[axis]:
        if at(axis, size) > args.largest:
            continue
        row = measure(args, axis, size)
        text = f"{row['at']:>10}{row['f_evals']:>8.1f}{row['vjps']:>8.1f}{row['seconds']:>10.3f}"
        text += f"{row['seconds'] / row['batch']:>10.4f}"
        if rows:
            last = rows[-1]
            growth = math.log(row["seconds"] / last["seconds"])
            times = (row["at"] / last["at"]) ** (2 if axis == "side" else 1)
            row["exponent"] = growth / math.log(times)
            text += f"{row['exponent']:>10.2f}"
        print(text, flush=True)
        rows.append(row)
    return rows


def plot(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    figure = Figure(figsize=(3.2 * len(results), 3.0), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for ax, (axis, rows) in zip(panels, results.items(), strict=True):
        sizes = [row["at"] for row in rows]
        seconds = [row["seconds"] for row in rows]
        ax.loglog(sizes, seconds, "o-", label="attack")
        power = 2 if axis == "side" else 1
        linear = [seconds[-1] * (n / sizes[-1]) ** power for n in sizes]
        ax.loglog(sizes, linear, ":", color="grey", label="linear")
        ax.set_xlabel({"state": "numbers in a row's state"}.get(axis, axis))
        ax.set_ylabel("seconds")
        ax.legend()
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    if unknown := set(args.axes) - set(AXES):
        raise SystemExit(f"no such axis: {sorted(unknown)}. There are {', '.join(AXES)}")
    torch.set_num_threads(args.threads)
    results = {axis: run_axis(args, axis) for axis in args.axes}
    record = {"iterations": args.iterations, "threads": args.threads, "results": results}
    write_json(args.out / "results.json", record)
    plot(args.out / "scaling.png", results)
    print(f"\nwritten: {args.out}/results.json and scaling.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
