"""An attack in half precision and with a compiled cell, beside the same as it is.

    python benchmarks/precision.py --data DIR [--images 128] [--device cpu]

The shipped classifiers are attacked by :class:`jiio_plugins.Joint` with its defaults, in the L2
ball that they are tested in elsewhere. All kinds run by turns in one process, and the best of
several rounds counts. Losses and accuracies are those of the final verification, which is made in
single precision by the cell as it is called. Seconds are of the whole call, verification included.

* *bfloat16*: ``Joint(precision=torch.bfloat16)``;
* *compiled*: ``model.equilibrium.cell.compile(dynamic=True)``. The seconds of the first call, in
  which it is compiled, are told apart;
* *captured*: ``Joint(capture=True)``, on CUDA alone.

Without ``--data`` the digits' classifier is attacked alone.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
import tyro

from benchmarks.gpu import Device
from jiio_plugins import Joint, attack
from jiio_plugins.data import load_digits, load_fashion_mnist
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Args:
    """Attacks in half precision and with a compiled cell."""

    data: Path | None = None
    """folder of Fashion-MNIST"""
    images: int = 128
    iterations: int = 30
    rounds: int = 3
    """of which the fastest counts"""
    device: str = "cpu"
    threads: int = 1
    """of PyTorch"""
    compiled: bool = True
    """whether to compile, which takes a minute"""
    out: Path = Path("out/benchmark-precision")
    """where results.json goes"""


class Kind:
    """One way to run the attack.

    Args:
        name: of the way.
        model: attacked, of which this keeps a copy.
        method: of the attack.
        compiled: whether the cell is.
    """

    first = best = 0.0

    def __init__(self, name: str, model: nn.Module, method: Joint, compiled: bool = False) -> None:
        self.name, self.method, self.model = name, method, copy.deepcopy(model)
        if compiled:
            layer: Any = self.model.equilibrium
            layer.cell.compile(dynamic=True)

    def __call__(self, x: Tensor, y: Tensor, eps: float, device: Device) -> None:
        """Attack, and keep the seconds: of the first call, and of the fastest after it."""
        device.synchronize()
        begin = time.perf_counter()
        self.found = attack(
            self.model, x, y, norm=2, eps=eps, lower=0.0, upper=1.0, method=self.method
        )
        device.synchronize()
        seconds = time.perf_counter() - begin
        if not self.first:
            self.first = seconds
        else:
            self.best = min(self.best or seconds, seconds)

    def row(self, y: Tensor) -> dict[str, Any]:
        found, stats = self.found, self.found.stats
        left = found.output.argmax(1) == y
        return {
            "name": self.name,
            "loss": found.value.neg().mean().item(),
            "accuracy": left.float().mean().item(),
            "f_evals": stats.f_evals.mean().item(),
            "vjps": stats.vjps.mean().item(),
            "verification": (stats.verification_f_evals + stats.verification_vjps).mean().item(),
            "first_seconds": self.first,
            "seconds": self.best,
        }


def kinds(args: Args, model: nn.Module) -> list[Kind]:
    plain = Joint(max_iter=args.iterations)
    half = Joint(max_iter=args.iterations, precision=torch.bfloat16)
    found = [Kind("as it is", model, plain), Kind("bfloat16", model, half)]
    if args.compiled:
        found += [
            Kind("compiled", model, plain, compiled=True),
            Kind("compiled, bfloat16", model, half, compiled=True),
        ]
    if args.device.startswith("cuda"):
        captured = Joint(max_iter=args.iterations, capture=True)
        found.append(Kind("captured", model, captured))
    return found


def measure(args: Args, name: str, images: tuple[Tensor, Tensor], eps: float) -> dict[str, Any]:
    x, y = (t[: args.images].to(args.device) for t in images)
    each, device = kinds(args, load_pretrained(name).to(args.device)), Device(args.device)
    for _ in range(args.rounds + 1):
        for kind in each:
            kind(x, y, eps, device)
    rows = [kind.row(y) for kind in each]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
        print(
            f"{name:14} {row['name']:20} {row['seconds']:7.2f} s  {row['ratio']:5.2f}  first "
            f"{row['first_seconds']:6.1f} s  loss {row['loss']:6.3f}  {row['accuracy']:6.1%}"
        )
    return {"classifier": name, "eps": eps, "images": len(x), "rows": rows}


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # all kinds share the code of one cell
    print("classifier     kind                 seconds  ratio")
    found = [measure(args, "digits", load_digits("test"), 0.5)]
    if args.data is not None:
        garments = load_fashion_mnist(args.data, "test")
        found.append(measure(args, "fashion-mnist", garments, 1.0))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", {"results": found})
    print(f"results in {args.out / 'results.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
