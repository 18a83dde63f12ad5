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
import matplotlib as mpl
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
from torch import Tensor

from jiio_deepinv import JIIOReconstructor
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
    rows: list[tuple[str, Tensor]] = [("truth", x)]
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
        rows += [(f"{name}: seen", seen), ("JIIO", found)]
    draw(rows, args.out)


def draw(rows: list[tuple[str, Tensor]], path: Path) -> None:
    """One row of images for each entry."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    columns = len(rows[0][1])
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.1 * columns + 2.2, 1.1 * len(rows)), squeeze=False
    )
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    print(f"saved {path}")


if __name__ == "__main__":
    main(tyro.cli(Args))
