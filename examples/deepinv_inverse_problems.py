"""Denoise, inpaint, deblur and more with a DEQ generator inside deepinv.

    python examples/deepinv_inverse_problems.py
    python examples/deepinv_inverse_problems.py --data DIR --images 6

With ``--data`` naming a folder with Fashion-MNIST the shipped generator of garments is used, else
the one of scikit-learn's digits. The same settings serve every problem: step size and likelihood
come from the physics. Nothing is trained; the generator has not seen these images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import deepinv as dinv
import torch
import tyro
from deepinv.physics import (
    BlurFFT,
    CompressedSensing,
    Denoising,
    GaussianNoise,
    Inpainting,
    Physics,
    PoissonNoise,
)

from jiio_deepinv import JIIOReconstructor
from jiio_plugins import plots
from jiio_plugins.data import load_digits, load_fashion_mnist
from jiio_plugins.models import load_pretrained


@dataclass
class Args:
    """Reconstruct test images from six kinds of measurements."""

    data: Path | None = None
    """folder with Fashion-MNIST; without it, the digits"""
    images: int = 6
    iters: int = 60
    out: Path = Path("deepinv_inverse_problems.png")
    seed: int = 0


def problems(shape: tuple[int, ...], rng: torch.Generator) -> dict[str, Physics]:
    """Name -> physics of images of this shape."""
    side = shape[-1]
    box = torch.ones(1, *shape)
    box[..., side // 3 : 2 * side // 3, side // 3 : 2 * side // 3] = 0
    blur = dinv.physics.functional.gaussian_blur(sigma=(side / 20, side / 20))
    pixels, little = side * side, GaussianNoise(0.05, rng=rng)
    return {
        "denoising, σ = 0.2": Denoising(GaussianNoise(0.2, rng=rng)),
        "inpainting, 50 %": Inpainting(shape, 0.5, noise_model=little, rng=rng),
        "inpainting, box": Inpainting(shape, box, noise_model=little),
        "deblurring": BlurFFT(shape, filter=blur, noise_model=little),
        "compressed sensing, 25 %": CompressedSensing(
            pixels // 4, shape, noise_model=little, rng=rng
        ),
        "Poisson, gain 0.2": Denoising(PoissonNoise(0.2, rng=rng)),
    }


def main(args: Args) -> None:
    rng = torch.Generator().manual_seed(args.seed)
    if args.data is None:
        generator, (images, _) = load_pretrained("digits-generator"), load_digits("test")
    else:
        generator = load_pretrained("fashion-mnist-generator")
        images, _ = load_fashion_mnist(args.data, "test")
    x = images[: args.images]
    model = JIIOReconstructor(generator, iters=args.iters)
    psnr = dinv.metric.PSNR()
    rows = {"truth": x}
    for name, physics in problems(tuple(x.shape[1:]), rng).items():
        y = physics(x)
        start = time.perf_counter()
        with torch.no_grad():
            found = model(y, physics)
        seconds = time.perf_counter() - start
        assert model.solution is not None
        stats = model.solution.stats
        seen = physics.A_adjoint(y)
        print(
            f"{name:26} {psnr(seen, x).mean():5.2f} dB -> {psnr(found, x).mean():5.2f} dB, "
            f"{stats.f_evals.mean():.0f} f + {stats.vjps.mean():.0f} VJP an image, "
            f"{seconds / len(x):.2f} s an image"
        )
        rows |= {f"{name}: seen": seen, f"{name}: JIIO": found}
    plots.save(args.out, plots.images(rows))
    print(f"saved {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
