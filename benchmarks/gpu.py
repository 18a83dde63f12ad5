"""What a search costs on a CUDA device. ``make gpu`` runs it after the tests for one.

    python benchmarks/gpu.py --data DIR
    python benchmarks/gpu.py --device cpu --images 16 --rows 4 --large 8 8  # to see that it runs

It prints

* the loop against the bare forward and backward passes that it needs, in seconds (see
  ``benchmarks/loop.py --even``), as it is and captured as a CUDA graph, and how often the host
  waited for the device in the loop;
* peak memory of a search, and of a forward and backward pass of the model;
* an attack on Fashion-MNIST, with its verification, against ART's PGD-20 on the first images.

The *large* classifier has 10 M parameters and sees 3×32×32 pixels. It is not trained, so its images
are noise, and only its costs mean something. Without ``--data`` the images are digits, enlarged.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.loop import Cell, loop_of, method
from jiio_plugins import attack, is_adversarial
from jiio_plugins.data import load_digits, load_fashion_mnist
from jiio_plugins.methods import solve
from jiio_plugins.models import MDEQClassifier, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Args:
    """What a search costs on a CUDA device."""

    data: Path | None = None
    """folder of Fashion-MNIST; None: digits, enlarged"""
    device: str = "cuda"
    images: int = 10_000
    """to be attacked"""
    peer_images: int = 2_000
    """of them, by ART's PGD-20 as well"""
    batch: int = 1_000
    rows: tuple[int, ...] = (1, 64, 1024)
    """batches of the loop"""
    large_rows: int = 128
    """batch of the loop on the large classifier"""
    large: tuple[int, ...] = (180, 360)
    """its channels"""
    iterations: int = 20
    repeats: int = 3


def fashion(data: Path | None) -> tuple[Tensor, Tensor]:
    if data is not None:
        return load_fashion_mnist(data, "test")
    x, y = load_digits("test")
    return interpolate(x, (28, 28)), y


@torch.no_grad()
def large(channels: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = MDEQClassifier(in_channels=3, channels=channels)
    cell: Any = model.equilibrium.cell
    for block, post in zip(cell.blocks, cell.post, strict=True):  # until it contracts
        block.conv2.parametrizations.weight.original0.mul_(0.3)
        post[2].weight.fill_(0.4)
    return model.eval()


class Device:
    """Clock, memory and waiting of a device. Of a CPU the memory is not known, and it never waits.

    Args:
        name: of the device.
    """

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name.startswith("cuda")

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """The best of several calls, after one that is not counted."""
        best = float("inf")
        for k in range(repeats + 1):
            self.synchronize()
            begin = time.perf_counter()
            call()
            self.synchronize()
            if k:
                best = min(best, time.perf_counter() - begin)
        return best

    def peak(self, call: Callable[[], Any]) -> float:
        """MiB that a call holds at most, beside what is there."""
        if not self.cuda:
            return float("nan")
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def waits(self, call: Callable[[int], Any], few: int, many: int) -> int:
        """How often the host waits in the iterations that ``call(many)`` has more."""
        return self._waits(lambda: call(many)) - self._waits(lambda: call(few))

    def _waits(self, call: Callable[[], Any]) -> int:
        if not self.cuda:
            call()
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def show_loop(args: Args, device: Device, cell: Cell) -> None:
    """One row of the table of the loop."""
    problem, iterations = cell.problem("L2"), args.iterations
    solve(problem, method(iterations, even=True))
    warmup = max(1, round(float(problem.f_evals.mean())) - 2 * iterations + 1)
    second = max(0, round(float(problem.vjps.mean())) - iterations)

    def bare() -> None:
        cell.bare(iterations, warmup, second)

    loop = loop_of(cell, "L2", even=True)
    ours = device.seconds(lambda: loop(iterations), args.repeats)
    replayed = loop_of(cell, "L2", even=True, capture=True)
    captured = device.seconds(lambda: replayed(iterations), args.repeats)
    theirs = device.seconds(bare, args.repeats)
    peak, plain = device.peak(lambda: loop(iterations)), device.peak(cell.plain)
    waits = device.waits(loop, 4, iterations)
    print(
        f"{cell.name:8} {len(cell.x):5}  {1e3 * ours / iterations:8.2f} "
        f"{1e3 * theirs / iterations:8.2f} {ours / theirs:6.2f} {captured / theirs:8.2f}   "
        f"{float(problem.f_evals.mean()):6.1f} {float(problem.vjps.mean()):6.1f}   "
        f"{peak:8.1f} {plain:8.1f} {peak / plain:6.2f}   {waits:5}"
    )


def art_pgd(model: nn.Module, device: Device, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.cuda else "cpu",
    )
    settings: dict[str, Any] = {"norm": 2, "eps": 1.0, "eps_step": 0.125, "max_iter": 20}
    pgd = ProjectedGradientDescent(classifier, **settings, batch_size=batch, verbose=False)

    def run(x: Tensor, y: Tensor) -> Tensor:
        found = pgd.generate(x=x.cpu().numpy(), y=y.cpu().numpy())
        return torch.from_numpy(found).to(x.device)

    return run


def show_attack(args: Args, device: Device) -> None:
    """An attack of all images, and ART's PGD of some."""
    model = load_pretrained("fashion-mnist").to(device.name)
    x, y = (t[: args.images].to(device.name) for t in fashion(args.data))
    some = min(args.peer_images, len(x))
    parts = range(0, len(x), args.batch)

    def ours(k: int) -> Tensor:
        part = x[k : k + args.batch], y[k : k + args.batch]
        found = attack(model, *part, norm=2, eps=1.0, lower=0.0, upper=1.0)
        return ~is_adversarial(found, part[1])

    ours(0)  # what is made once
    device.synchronize()
    begin = time.perf_counter()
    right = torch.cat([ours(k) for k in parts])
    device.synchronize()
    seconds = time.perf_counter() - begin
    pgd = art_pgd(model, device, args.batch)
    begin = time.perf_counter()
    images = pgd(x[:some], y[:some])
    device.synchronize()
    theirs = time.perf_counter() - begin
    with torch.no_grad():
        left = torch.cat([model(t) for t in images.split(args.batch)]).argmax(1) == y[:some]
    print("\nan attack with its verification, L2 ε = 1 in the pixel box")
    each, peer = 1e3 * seconds / len(x), 1e3 * theirs / some
    of_all, of_some = (float(t.float().mean()) for t in (right, right[:some]))
    print(
        f"  Joint       {len(x):6} images  {seconds:8.2f} s  {each:8.3f} ms an image  "
        f"accuracy {of_all:.1%}, of the first {some} {of_some:.1%}\n"
        f"  ART PGD-20  {some:6} images  {theirs:8.2f} s  {peer:8.3f} ms an image  "
        f"accuracy {float(left.float().mean()):.1%}\n"
        f"  Joint takes {each / peer:.3f} of the seconds"
    )


def main(args: Args) -> None:
    device = Device(args.device)
    kind = torch.cuda.get_device_name() if device.cuda else "a CPU"
    print(f"{kind}, torch {torch.__version__}\n")
    print("                 ms an iteration                   passes a row            MiB at most")
    print(
        "cell      rows     loop     bare  ratio captured        f    VJP       "
        "loop    model  ratio   waits"
    )
    images = fashion(args.data)
    for rows in args.rows:
        show_loop(args, device, Cell("digits", rows, args.device))
        own = load_pretrained("fashion-mnist")
        show_loop(args, device, Cell("fashion", rows, args.device, own, images))
    noise = torch.rand(args.large_rows, 3, 32, 32), torch.arange(args.large_rows) % 10
    show_loop(args, device, Cell("large", args.large_rows, args.device, large(args.large), noise))
    show_attack(args, device)


if __name__ == "__main__":
    main(tyro.cli(Args))
