"""Inverse problems on garments: JIIO against deepinv's methods and latent Adam, in one run.

    python benchmarks/inverse_problems.py --data DIR [--minutes 20] [--out out/inverse-problems]

Denoising (σ = 0.2 and 0.4), inpainting (a box of 10×10, and half of the pixels) and compressed
sensing with a quarter of the measurements, on Fashion-MNIST test images that nothing was trained or
tuned on.

* Not trained for the problem: total variation, wavelets, the deep image prior (an image at a time:
  on fewer images, stated); JIIO and Adam over the latents of a generator, the vector or
  the spatial one, whichever is better on validation images.
* Trained for it, on the same images by the same optimiser, ``minutes`` of CPU time each and about
  as many parameters: a U-Net, an unfolded proximal gradient, one with ``DEQ=``, and JIIO end to
  end: the guess of a U-Net, or of an unfolded proximal gradient, as mean of the latents of a
  :class:`jiio_plugins.models.MDEQRefiner`, and a small U-Net's standard deviation
  (:class:`jiio_deepinv.GaussianEncoder`); what the guess is worth by itself is printed beside it.

Weights and stopping are tuned on validation images. Then, on the generator, what JIIO and Adam take
to the PSNR at which Adam ends (less 0.1 dB): iterations are swept, each run is judged by its
converged image, rates are tuned on validation images.

Every result is a file in ``--out``; a run that was stopped goes on with what is missing, and a
training with its checkpoint; a folder holds results of the same settings alone. results.json has
those that the command asked for. Seconds are of the
CPU, an image, in batches. deepinv's wavelets need ``ptwt``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inverse_methods as m
import torch
import tyro
from records import keep_settings, read
from torch import Tensor

from jiio_plugins.data import load_fashion_mnist
from jiio_plugins.generative import load_generator, psnr, ssim
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deepinv.physics import Physics

UNTRAINED = ("TV", "wavelet", "DIP", "latent Adam", "JIIO")
COUNTS = (5, 10, 15, 20, 30, 45, 60)
STEPS = (10, 15, 20, 30, 40, 60, 80, 120, 160)
RATES = (0.05, 0.1, 0.2, 0.4)


@dataclass
class Args:
    """Benchmark of inverse problems."""

    data: Path = Path("data")
    """folder of Fashion-MNIST"""
    generator: Path | None = None
    """folder of a train-generator run; default: the better of the two shipped ones"""
    minutes: float = 20.0
    """CPU minutes of every training"""
    images: int = 256
    dip_images: int = 16
    """of them for the deep image prior"""
    cost_images: int = 64
    """of them for the cost of JIIO and Adam"""
    validation: int = 64
    tasks: tuple[str, ...] = tuple(task.name for task in m.TASKS)
    methods: tuple[str, ...] = (*UNTRAINED, *m.LEARNERS)
    cost: bool = True
    """also compare the cost of JIIO and Adam on the generator"""
    out: Path = Path("out/inverse-problems")
    threads: int = 1


@dataclass
class Result:
    """One method on one problem."""

    task: str
    method: str
    setting: str
    psnr: float
    ssim: float
    seconds: float
    f_evals: float
    vjps: float
    images: int
    parameters: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # PSNR of what its parts make


class Benchmark:
    """The data, the generator and the results so far."""

    def __init__(self, args: Args) -> None:
        self.args = args
        train, _ = load_fashion_mnist(args.data, "train")
        self.train, self.validation = train[: -args.validation], train[-args.validation :]
        self.test = load_fashion_mnist(args.data, "test")[0][: args.images]
        names = ("fashion-mnist-generator", "fashion-mnist-spatial")
        self.generators: Any = {n.split("-")[-1]: load_pretrained(n) for n in names}
        if args.generator is not None:
            self.generators = {args.generator.name: load_generator(args.generator)}
        self.choices: dict[str, m.Choice] = {}
        names = ("minutes", "images", "dip_images", "cost_images", "validation")
        settings: dict[str, Any] = {name: getattr(args, name) for name in names}
        keep_settings(args.out, {**settings, "generators": sorted(self.generators)})

    def path(self, task: str, what: str, suffix: str = ".json") -> Path:
        """File of a result."""
        name = f"{task}-{what}".replace(", ", "-").replace(" ", "-").replace("%", "percent")
        return self.args.out / (name + suffix)

    def results(self) -> Iterator[Result]:
        """All results, those that are missing computed first."""
        for task in m.TASKS:
            if task.name not in self.args.tasks:
                continue
            for method in self.args.methods:
                path = self.path(task.name, method)
                if not path.exists():
                    found = (
                        self.learned(task, method)
                        if method in m.LEARNERS | m.VARIANTS
                        else self.tuned(task, method)
                    )
                    write_json(path, asdict(found))
                yield Result(**read(path))

    def tuned(self, task: m.Task, method: str) -> Result:
        """A method without training."""
        tunings: dict[str, Callable[[m.Task, Tensor], tuple[str, Any]]] = {
            "TV": m.tv,
            "wavelet": m.wavelet,
            "DIP": m.dip,
            "JIIO": self.jiio,
            "latent Adam": self.adam,
        }
        setting, solve = tunings[method](task, self.validation)
        images = self.test[: self.args.dip_images] if method == "DIP" else self.test
        return self.judge(task, method, setting, solve, images)

    def choice(self, task: m.Task) -> m.Choice:
        """The generator for a problem."""
        if task.name not in self.choices:
            self.choices[task.name] = m.choose(self.generators, task, self.validation)
        return self.choices[task.name]

    def on_generator(self, task: m.Task, method: Any) -> Any:
        """A method over its latents."""
        choice = self.choice(task)
        return m.latent(choice.generator, choice.penalty, method)

    def jiio(self, task: m.Task, validation: Tensor) -> tuple[str, Any]:
        """The generator as it is."""
        return str(self.choice(task)), self.on_generator(task, m.joint(60))

    def adam(self, task: m.Task, validation: Tensor) -> tuple[str, Any]:
        """Cold, as CSGM does it."""
        rate = self.rate(task, None)
        return f"rate {rate:g}", self.on_generator(task, m.adam(STEPS[-1], rate, None))

    def rate(self, task: m.Task, cap: int | None) -> float:
        """Adam's rate that is best in 40 steps."""
        settings = {f"{r:g}": self.on_generator(task, m.adam(40, r, cap)) for r in RATES}
        return float(m.best(settings, task, self.validation[:16])[0])

    def learned(self, task: m.Task, method: str) -> Result:
        """A method that is trained for the problem."""
        torch.manual_seed(0)
        learner = (m.LEARNERS | m.VARIANTS)[method](task)
        curve = m.train(
            learner,
            task,
            self.train,
            self.validation,
            self.args.minutes,
            self.path(task.name, method, ".pt"),
            method,
        )
        result = self.judge(task, method, f"{self.args.minutes:g} min", learner.solve, self.test)
        result.curve = curve
        y, physics = task.measure(self.test, seed=2)
        for name, run in learner.parts.items():
            with torch.no_grad():
                result.parts[name] = float(psnr(run(y, physics).clamp(0, 1), self.test).mean())
        result.parameters = sum(p.numel() for p in learner.model.parameters())
        return result

    def judge(
        self,
        task: m.Task,
        method: str,
        setting: str,
        solve: Callable[[Tensor, Physics], m.Found],
        images: Tensor,
    ) -> Result:
        """On test images."""
        y, physics = task.measure(images, seed=2)
        begin = time.process_time()
        found = solve(y, physics)
        seconds = (time.process_time() - begin) / len(images)
        made = found.images.clamp(0, 1)
        return Result(
            task.name,
            method,
            setting,
            float(psnr(made, images).mean()),
            float(ssim(made, images).mean()),
            seconds,
            found.f_evals,
            found.vjps,
            len(images),
        )

    def costs(self, task: m.Task) -> dict[str, list[Result]]:
        """JIIO's and Adam's runs of several lengths, by family."""
        path = self.path(task.name, "cost")
        if not path.exists():
            runs = {"JIIO": {n: m.joint(n) for n in COUNTS}}
            for cap in (None, 1, 2, 5):
                rate = self.rate(task, cap)
                name = f"Adam, {'cold' if cap is None else f'warm, cap {cap}'}, rate {rate:g}"
                runs[name] = {n: m.adam(n, rate, cap) for n in STEPS}
            images = self.test[: self.args.cost_images]
            found = {
                family: [
                    asdict(
                        self.judge(task, family, str(n), self.on_generator(task, method), images)
                    )
                    for n, method in methods.items()
                ]
                for family, methods in runs.items()
            }
            write_json(path, found)
        rows_of = read(path)
        return {family: [Result(**r) for r in rows] for family, rows in rows_of.items()}


def show(results: list[Result]) -> None:
    """A table a problem."""
    for task in dict.fromkeys(r.task for r in results):
        print(f"\n{task:18} {'PSNR':>6} {'SSIM':>6} {'s/image':>8} {'f':>6} {'VJP':>6}")
        for r in results:
            if r.task == task:
                note = f" ({r.images} images)" if r.method == "DIP" else ""
                late = [v for s, v in r.curve if s >= 0.8 * r.curve[-1][0]]
                if late:
                    note += (
                        f", {r.parameters:,} parameters, last fifth {late[-1] - late[0]:+.2f} dB"
                    )
                note += "".join(f", {name} {value:.2f} dB" for name, value in r.parts.items())
                print(
                    f"{r.method:18} {r.psnr:6.2f} {r.ssim:6.3f} {r.seconds:8.3f} {r.f_evals:6.0f} "
                    f"{r.vjps:6.0f}  {r.setting}{note}"
                )


def show_costs(task: str, runs: dict[str, list[Result]]) -> None:
    """What it takes to the PSNR at which cold Adam ends, less 0.1 dB."""
    cold = next(rows for family, rows in runs.items() if "cold" in family)
    target = max(r.psnr for r in cold) - 0.1
    print(f"\n{task}: to {target:.2f} dB")
    costs = {}
    for family, rows in runs.items():
        reached = [r for r in rows if r.psnr >= target]
        if not reached:
            print(f"  {family:28} not reached: {max(r.psnr for r in rows):.2f} dB")
            continue
        first = min(reached, key=lambda r: r.f_evals + r.vjps)
        costs[family] = first.f_evals + first.vjps
        times = f", {costs[family] / costs['JIIO']:.1f} times JIIO's" if "JIIO" in costs else ""
        print(
            f"  {family:28} {first.setting:>4} steps, {first.f_evals:6.0f} f + {first.vjps:6.0f} "
            f"VJP, {first.seconds:.3f} s, {first.psnr:.2f} dB{times}"
        )


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    benchmark = Benchmark(args)
    results, costs = list(benchmark.results()), {}
    show(results)
    if args.cost:
        for task in m.TASKS:
            if task.name in args.tasks:
                costs[task.name] = benchmark.costs(task)
                show_costs(task.name, costs[task.name])
    record = {
        "results": [asdict(r) for r in results],
        "costs": {
            task: {family: [asdict(r) for r in rows] for family, rows in families.items()}
            for task, families in costs.items()
        },
    }
    write_json(args.out / "results.json", record)


if __name__ == "__main__":
    main(tyro.cli(Args))
