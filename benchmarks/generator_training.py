"""Training a generator: latents fitted jointly against nested Adam, and a VAE, in one run.

    python benchmarks/generator_training.py --data DIR [--target 18] [--out out/generator-training]

Every method trains the same decoder from the same weights on the same batches of Fashion-MNIST, and
differs in how the latents of a batch are found inside the step, always from zero:

* JIIO, the trainer's default;
* Adam, or gradient descent, with a full solve of state and adjoint for each of its steps (cold,
  relative tolerance 1e-3);
* the same with warm-started solves, for inner caps of 1, 2 and 5.

The peers take ``nested_steps`` steps at the rate that trains best: the one of four with the best
fits after ``tuning_steps`` training steps, with warm starts and one inner step, for Adam and for
gradient descent. Every ``every`` steps held-out images are fitted with the averaged weights, by one
converged method for all, which is not counted. Reported is what it took until those fits first met
the target: CPU seconds of the training steps, f evaluations and VJPs an image and step.

Then a VAE with the same decoder is trained for the seconds that JIIO took, and both are judged by
held-out fits and by the distance of their samples to held-out images.

A run that was stopped goes on where it was; runs that met the target are not repeated, and a folder
holds runs of the same settings alone.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from adam import NestedAdam
from records import keep_settings, read
from torch import Tensor, nn

from jiio_plugins import Anderson, Nested
from jiio_plugins.data import load_fashion_mnist
from jiio_plugins.generative import (
    Encoder,
    TrainConfig,
    decode,
    distances,
    fit,
    fit_latents,
    load_generator,
    sample_latents,
    train,
)
from jiio_plugins.models import MDEQDecoder, load_pretrained
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from jiio_plugins.generative import StepResult
    from jiio_plugins.methods import Method

METHODS = (
    "JIIO",
    *(f"{kind}, warm, cap {cap}" for kind in ("Adam", "gradient") for cap in (1, 2, 5)),
    "Adam, cold",
    "gradient, cold",
)
RATES = (0.05, 0.1, 0.2, 0.4)


@dataclass
class Args:
    """Benchmark of generator training."""

    data: Path = Path("data")
    """folder of Fashion-MNIST"""
    target: float = 18.0
    """PSNR of held-out fits to reach, dB"""
    every: int = 25
    """steps between held-out fits"""
    nested_steps: int = 10
    tuning_steps: int = 100
    batch_size: int = 32
    max_seconds: float = 3600.0
    """CPU seconds after which a method is given up"""
    methods: tuple[str, ...] = METHODS
    """those to run now; the tables show all that were"""
    images: int = 1000
    """samples and held-out images that are compared"""
    out: Path = Path("out/generator-training")
    threads: int = 1


@dataclass
class Curve:
    """What a method had spent at each evaluation, and how well its generator fitted."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    f_evals: float = 0.0
    vjps: float = 0.0


class Clock:
    """CPU seconds and evaluations of the training steps alone."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.spent: list[float] = []
        self.f_evals: list[float] = []
        self.vjps: list[float] = []

    def __call__(self, step: int, result: StepResult) -> None:
        now = time.process_time()
        if self.last is not None:
            self.spent.append(now - self.last)
        self.last = now
        self.f_evals.append(float(result.f_evals.mean()))
        self.vjps.append(float(result.vjps.mean()))

    @property
    def seconds(self) -> float:
        """The first step's time is not seen; it counts as the others' mean."""
        return sum(self.spent) * (len(self.spent) + 1) / max(1, len(self.spent))


def peers(args: Args) -> dict[str, Nested | None]:
    """The methods to run by name, in the order of their cost; None is the trainer's own."""
    out: dict[str, Nested | None] = {"JIIO": None}
    for name, kind in (("Adam", NestedAdam), ("gradient", Nested)):
        rows = {f"{name}, warm, cap {cap}": Anderson(max_iter=cap, tol=1e-2) for cap in (1, 2, 5)}
        rows[f"{name}, cold"] = Anderson(max_iter=60, tol=1e-3)
        if not set(rows) & set(args.methods):
            continue
        cheapest = kind(
            solver=Anderson(max_iter=1, tol=1e-2), warm_start=True, max_iter=args.nested_steps
        )
        rate = rate_for(name, cheapest, args)
        for row, solver in rows.items():
            warm = "warm" in row
            out[row] = replace(cheapest, solver=solver, warm_start=warm, step_size=rate)
    return {name: out[name] for name in METHODS if name in out and name in args.methods}


def rate_for(name: str, method: Nested, args: Args) -> float:
    """The rate that trains best."""
    reached = {}
    for rate in RATES:
        trial = replace(args, every=args.tuning_steps, target=-math.inf)
        curve = run(f"{name}, rate {rate:g}", replace(method, step_size=rate), trial)
        reached[rate] = curve.psnr[-1]
    print(f"{name}: {', '.join(f'{p:.2f} dB at {r:g}' for r, p in reached.items())}")
    return max(reached, key=reached.__getitem__)


def folder_of(name: str, args: Args) -> Path:
    """Of a method's run; its curve is a file beside it."""
    return args.out / name.replace(", ", "-").replace(" ", "-").replace(".", "_")


def load_curve(name: str, args: Args) -> Curve | None:
    """What there is of a method."""
    record = folder_of(name, args).with_suffix(".json")
    return Curve(**read(record)) if record.exists() else None


def run(name: str, method: Method | None, args: Args) -> Curve:
    """Train until the target or the time is reached, going on where an earlier run was."""
    folder, curve = folder_of(name, args), load_curve(name, args) or Curve()
    config = TrainConfig(
        data="fashion-mnist",
        folder=args.data,
        out=folder,
        epochs=4,
        batch_size=args.batch_size,
        checkpoint_every=10**9,
        pictures_every=10**9,
        latents_kept=1,
        ema_decay=0.95,
        accelerator="cpu",
    )
    while not curve.psnr or (curve.psnr[-1] < args.target and curve.seconds[-1] < args.max_seconds):
        done = curve.steps[-1] if curve.steps else 0
        clock = Clock()
        trained = train(
            replace(config, steps=done + args.every, resume=done > 0), method=method, on_step=clock
        )
        curve.f_evals, curve.vjps = clock.f_evals[-1], clock.vjps[-1]
        curve.steps.append(trained.steps)
        curve.seconds.append((curve.seconds[-1] if curve.seconds else 0.0) + clock.seconds)
        curve.psnr.append(trained.psnr)
        write_json(folder.with_suffix(".json"), asdict(curve))
    return curve


class VAE(nn.Module):
    """``−log p(y | w) + KL(encoder(y) ‖ N(0, I))`` with Gaussian pixels of σ = 0.1."""

    def __init__(self, decoder: MDEQDecoder) -> None:
        super().__init__()
        (self.size,) = decoder.latent_shape
        self.decoder, self.encoder = decoder, Encoder(decoder.image_shape, (2 * self.size,))

    def forward(self, y: Tensor) -> Tensor:
        """The loss per image, ``(rows,)``."""
        mean, log_var = self.encoder(y).split(self.size, dim=1)
        w = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        error = (self.decoder(w) - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        loss: Tensor = error + divergence
        return loss


def train_vae(seconds: float, images: Tensor, args: Args) -> MDEQDecoder:
    """With the trainer's architecture, optimiser and batches, for so many CPU seconds."""
    config = TrainConfig(data="fashion-mnist", out=args.out)
    torch.manual_seed(config.seed)
    vae = VAE(config.model.build((1, 28, 28)))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        loss = vae(images[torch.randint(len(images), (args.batch_size,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1e3)
        optimizer.step()
    return vae.decoder.eval()


def judge(decoder: MDEQDecoder, latents: Tensor, held_out: Tensor) -> dict[str, float]:
    """Held-out fits, and the distance of the images of these latents to held-out images."""
    features: Any = load_pretrained("fashion-mnist-features")
    found = distances(held_out[: len(latents)], decode(decoder, latents), features)
    return {
        "PSNR": float(fit(decoder, held_out[:256]).psnr.mean()),
        "frechet": found.frechet,
        "kernel": found.kernel,
    }


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    names = ("every", "nested_steps", "tuning_steps", "batch_size")
    keep_settings(args.out, {name: getattr(args, name) for name in names})
    held_out, _ = load_fashion_mnist(args.data, "test")
    for name, method in peers(args).items():
        run(name, method, args)
    found = {name: load_curve(name, args) for name in METHODS}
    curves = {name: curve for name, curve in found.items() if curve is not None}
    print(f"\nto {args.target:g} dB in fits of held-out images, batches of {args.batch_size}:")
    print(f"{'':20} {'steps':>6} {'seconds':>8} {'f':>5} {'VJP':>5} {'best':>6} {'to JIIO':>8}")
    if "JIIO" not in curves:
        raise SystemExit("there is no run of JIIO to compare with: add it to --methods")
    ours = curves["JIIO"].seconds[-1]
    for name, c in curves.items():
        short = "" if c.psnr[-1] >= args.target else ", not reached"
        print(
            f"{name:20} {c.steps[-1]:6d} {c.seconds[-1]:8.0f} {c.f_evals:5.0f} {c.vjps:5.0f} "
            f"{max(c.psnr):6.2f} {c.seconds[-1] / ours:8.2f}{short}"
        )
    decoder = load_generator(args.out / "JIIO")
    images, _ = load_fashion_mnist(args.data, "train")
    latents = fit_latents(decoder, (images[:2048] * 255).round().byte())
    torch.manual_seed(0)
    vae = train_vae(ours, images, args)
    rows = {
        "JIIO": judge(decoder, sample_latents(latents, args.images, prior="gmm"), held_out),
        "VAE": judge(vae, torch.randn(args.images, *vae.latent_shape), held_out),
    }
    print(
        f"\nafter {ours:.0f} CPU s; distances of {args.images} samples in fashion-mnist-features:"
    )
    for name, row in rows.items():
        print(
            f"{name:5} held-out fits {row['PSNR']:.2f} dB, Fréchet distance {row['frechet']:.1f}, "
            f"kernel distance {row['kernel']:.3f}"
        )
    record = {"curves": {n: asdict(c) for n, c in curves.items()}, "judged": rows}
    write_json(args.out / "results.json", record)


if __name__ == "__main__":
    main(tyro.cli(Args))
