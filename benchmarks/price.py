"""What an attack as strong as ART's PGD-20 costs, in gradients, and where its evaluations go.

    python benchmarks/price.py --data DIR [--images 1000] [--out out/benchmark-price]

On both shipped classifiers, within the pixel box, it runs ART's PGD-20 and :class:`Joint` with its
defaults at every length from five on. The shortest that is as strong (accuracy within a point or
lower, at least 97 % of the loss, both by converged solves) is priced in f evaluations and VJPs over

* those of one of the peer's 20 gradients;
* those of one gradient of the model at the images as they are: a solve and an adjoint solve from
  scratch to 1e-3. At attacked images they take more.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from attack import EPS, art_pgd

from jiio_plugins import Joint, attack
from jiio_plugins.data import load_labelled
from jiio_plugins.evaluation import Comparison, Row
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

CASES = {
    "Fashion-MNIST, L2": ("fashion-mnist", 2.0, EPS["L2"]),
    "Fashion-MNIST, L∞": ("fashion-mnist", math.inf, EPS["Linf"]),
    "digits, L2": ("digits", 2.0, 0.5),
}


@dataclass
class Args:
    """Benchmark of an attack's price."""

    data: Path = Path("data")
    """folder of Fashion-MNIST: torchvision's root, or Debian's"""
    images: int = 1000
    """of each data set, at most"""
    longest: int = 24
    """iterations of Joint, at most"""
    out: Path = Path("out/benchmark-price")
    threads: int = 1


def ours(comparison: Comparison, iterations: int) -> tuple[Row, dict[str, float]]:
    """JIIO of so many iterations, and where its evaluations go."""
    parts: dict[str, float] = {}

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        settings = {**vars(comparison.threat), "method": Joint(max_iter=iterations)}
        solution = attack(model, x, y, **settings)
        f, vjps, taken, f_verified, vjps_verified = (
            float(getattr(solution.stats, name).double().mean())
            for name in (
                *("f_evals", "vjps", "iterations"),
                *("verification_f_evals", "verification_vjps"),
            )
        )
        parts.update(
            {
                "f with a graph": taken,
                "f without": f - taken,
                "VJP": taken,
                "second VJP": vjps - taken,
                "verification, f": f_verified,
                "verification, VJP": vjps_verified,
            }
        )
        return solution.x

    row = Row(f"JIIO, {iterations} iterations", "JIIO")
    comparison.measure(row, run)
    return row, parts


def price(args: Args, name: str) -> dict[str, Any]:
    """One case: the peer, and the shortest run that is as strong."""
    weights, norm, eps = CASES[name]
    x, y, _ = load_labelled(weights, "test", args.data, limit=args.images)
    comparison = Comparison(load_pretrained(weights), x, y, norm=norm, eps=eps)
    peer = Row("ART PGD-20, step ε/8", "ART PGD-20")
    comparison.measure(peer, art_pgd(comparison))
    gradients = {"peer's": peer.cost / 20, "clean": sum(comparison.gradient)}
    print(f"\n{name}: {len(x)} images, f + VJP of a gradient: {gradients}")
    for iterations in range(5, args.longest + 1):
        row, parts = ours(comparison, iterations)
        print(
            f"{row.method:22} accuracy {100 * row.accuracy:5.1f} ({100 * peer.accuracy:.1f}), loss "
            f"{100 * row.loss / peer.loss:5.1f} % of the peer's, f + VJP {row.cost:5.1f}",
            flush=True,
        )
        if row.as_strong_as(peer):
            break
    else:
        raise SystemExit(f"none is as strong: give a --longest above {args.longest}")
    return {
        "images": len(x),
        "eps": eps,
        "iterations": iterations,
        "gradients": gradients,
        "peer": {**asdict(peer), "cost": peer.cost},
        "row": {**asdict(row), "cost": row.cost},
        "parts": parts,
    }


def main(args: Args) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in CASES:
        found = results[name] = price(args, name)
        cost, verification = (found["row"][key] for key in ("cost", "verification"))
        for kind, gradient in found["gradients"].items():
            alone, verified = cost / gradient, (cost + verification) / gradient
            print(f"in gradients ({kind}): {alone:.2f}, with verification {verified:.2f}")
        print(", ".join(f"{part} {value:.1f}" for part, value in found["parts"].items()))
        write_json(args.out / "results.json", {"results": results})
    print(f"\nwritten: {args.out}/results.json")


if __name__ == "__main__":
    main(tyro.cli(Args))
