"""Train a small generator of digits by fitting latents inside the step, then sample and fit.

    python examples/train_generator.py [--steps 1000] [--out out/generator]

With its defaults this makes the shipped ``digits-generator``; the shipped
``fashion-mnist-generator`` is the command line

    jiio train-generator --dataset fashion-mnist --folder DIR --out RUN --epochs 1 --steps 600 \\
        --step-size 0.1 --checkpoint-every 100 --pictures-every 300

and ``fashion-mnist-spatial``, in some 20 minutes on one core,

    jiio train-generator --dataset fashion-mnist --folder DIR --out RUN --model.latent 4 7 7 \\
        --latent-penalty 0.002 --batch-size 32 --ema-decay 0.995 --epochs 2 --steps 3000
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from jiio_plugins.data import load_digits
from jiio_plugins.generative import (
    TrainConfig,
    decode,
    fit,
    load_generator,
    load_latents,
    sample_latents,
    train,
    write_sheet,
)


@dataclass
class Args:
    """Train, sample, fit."""

    out: Path = Path("out/generator")
    steps: int = 1000


def main(args: Args) -> None:
    train(TrainConfig(data="digits", out=args.out, steps=args.steps, epochs=50, step_size=0.3))
    decoder = load_generator(args.out)
    drawn = sample_latents(load_latents(args.out / "latents.safetensors"), 64, prior="gmm")
    write_sheet(args.out / "samples-gmm.png", decode(decoder, drawn), columns=8)
    held_out, _ = load_digits("test")
    fitted = fit(decoder, held_out[:100])
    print(
        f"100 held-out digits: {float(fitted.psnr.mean()):.2f} dB at "
        f"{float(fitted.f_evals.mean()):.0f} f evaluations and {float(fitted.vjps.mean()):.0f} VJPs"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
