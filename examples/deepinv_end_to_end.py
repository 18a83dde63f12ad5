"""Train a reconstruction end to end inside deepinv: photographs, or an MRI slice.

    python examples/deepinv_end_to_end.py --problem photographs
    python examples/deepinv_end_to_end.py --problem mri

A U-Net guesses an image m, a smaller one how far off each pixel may be, s; and JIIO moves the guess
to where a generator's image fits the measurements,
``w* = argmin_w ‖A G(w) − y‖² / 2σ² + ‖(w − m)/s‖² / 2``. All networks learn together, through the
solution, in deepinv's own trainer. It takes some five minutes on one core.

The photographs are the two that scikit-learn ships (trained on patches of one, shown on the other);
the slice is matplotlib's sample MRI of a head (trained on its upper half, shown on its lower).
"""

from __future__ import annotations

import gzip
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepinv as dinv
import matplotlib as mpl
import numpy as np
import torch
import tyro
from deepinv.physics import GaussianNoise, Physics
from torch import Tensor, nn
from torch.utils.data import DataLoader

from jiio_deepinv import GaussianEncoder, JacobianLoss, JIIOReconstructor
from jiio_plugins import Anderson, Joint, plots
from jiio_plugins.models import MDEQRefiner

SIDE = 32


@dataclass
class Args:
    """End-to-end training of a reconstruction."""

    problem: Literal["photographs", "mri"] = "photographs"
    guess_epochs: int = 20
    """of the encoder alone"""
    epochs: int = 2
    """of all together"""
    patches: int = 960
    """to learn from"""
    images: int = 6
    """patches that are shown"""
    out: Path | None = None
    """picture; default: deepinv_PROBLEM.png"""
    seed: int = 0


def photographs() -> tuple[Tensor, Tensor, Physics]:
    """Patches ``(n, 3, 32, 32)`` of one photograph and of another; colour noise and lost pixels."""
    from sklearn.datasets import load_sample_images

    china, flower = (
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        for image in load_sample_images().images
    )
    physics = dinv.physics.Inpainting((3, SIDE, SIDE), mask=0.7, noise_model=GaussianNoise(0.1))
    return cut(half(china), 8), cut(half(flower), SIDE), physics


def mri() -> tuple[Tensor, Tensor, Physics]:
    """Patches ``(n, 2, 32, 32)``, real and imaginary, of two halves; a quarter of k-space."""
    with gzip.open(mpl.cbook.get_sample_data("s1045.ima.gz", asfileobj=False)) as file:
        slice_ = np.frombuffer(file.read(), "<u2").reshape(256, 256).astype(np.float32)
    image = torch.from_numpy(slice_ / slice_.max())[None, None]
    image = torch.cat([image, torch.zeros_like(image)], dim=1)
    upper, lower = cut(image[:, :, :128], 4), cut(image[:, :, 128:], SIDE)
    size = (2, SIDE, SIDE)
    mask = dinv.physics.generator.GaussianMaskGenerator(
        size, acceleration=4, center_fraction=0.15, rng=torch.Generator().manual_seed(0)
    ).step()["mask"]
    physics = dinv.physics.MRI(mask=mask, img_size=size, noise_model=GaussianNoise(0.02))
    return bright(upper), bright(lower), physics


def half(image: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(image, 2)


def cut(image: Tensor, stride: int) -> Tensor:
    """All patches of an image ``(1, c, h, w)``."""
    patches = image.unfold(2, SIDE, stride).unfold(3, SIDE, stride)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, image.shape[1], SIDE, SIDE)


def bright(patches: Tensor) -> Tensor:
    """Those that show more than background."""
    return patches[patches[:, 0].mean((1, 2)) > 0.15]


def reconstructor(channels: int) -> tuple[JIIOReconstructor, nn.Module]:
    """It and its guess: 180,000 parameters; a loose gradient is enough to learn from."""
    network = dinv.models.UNet(channels, channels, scales=3, channels_per_scale=[16, 32, 64])
    guess = dinv.models.ArtifactRemoval(network)
    spread = dinv.models.UNet(
        2 * channels,
        channels,
        scales=3,
        channels_per_scale=[8, 16, 32],
        residual=False,
        batch_norm=False,
    )
    model = JIIOReconstructor(
        MDEQRefiner((channels, SIDE, SIDE), channels=(16,)),
        encoder=GaussianEncoder(guess, spread),
        method=Joint(max_iter=10, step_size=1.0, tol=1e-3),
        implicit=Anderson(max_iter=8, memory=8, tol=0.1),
    )
    return model, guess


def train(model: Any, losses: list[Any], data: Any, physics: Physics, epochs: int) -> None:
    """deepinv's trainer, with new noise at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    dinv.Trainer(
        model=model,
        physics=physics,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, 2e-4),
        train_dataloader=data,
        losses=losses,
        epochs=epochs,
        online_measurements=True,
        save_path=None,
        device="cpu",
        non_blocking_transfers=False,
        freq_update_progress_bar=10,
    ).train()


def main(args: Args) -> None:
    # the gradient is loose by choice, and looser still before the cell has learned to contract
    warnings.filterwarnings("ignore", "the equation for the implicit gradient|the joint solution")
    torch.manual_seed(args.seed)
    images, others, physics = photographs() if args.problem == "photographs" else mri()
    some = torch.randperm(len(images))[: args.patches]
    model, guess = reconstructor(images.shape[1])
    loader = DataLoader([{"x": x} for x in images[some]], batch_size=16, shuffle=True)
    print(f"{len(some)} patches to learn from, {len(others)} others to test on")
    # a guess alone is cheap to learn; what the generator and the measurements add comes after
    train(guess, [dinv.loss.SupLoss()], loader, physics, args.guess_epochs)
    train(model, [dinv.loss.SupLoss(), JacobianLoss(0.3)], loader, physics, args.epochs)
    psnr = dinv.metric.PSNR()
    torch.manual_seed(args.seed)
    y = physics(others)
    model.eval()
    with torch.no_grad():
        found, first = model(y, physics), guess(y, physics)
    seen = physics.A_adjoint(y)
    for name, made in (("measured", seen), ("the encoder's guess", first), ("JIIO", found)):
        print(f"{name:20} {psnr(made, others).mean():.2f} dB on {len(others)} other patches")
    assert model.solution is not None
    print(model.solution.report(), model.solution.stats.summary())
    shown = torch.linspace(0, len(others) - 1, args.images).round().long()
    rows = {"truth": others, "measured": seen, "guess": first, "JIIO": found}
    out = args.out or Path(f"deepinv_{args.problem}.png")
    plots.save(out, plots.images({name: visible(t[shown]) for name, t in rows.items()}))
    print(f"saved {out}")


def visible(images: Tensor) -> Tensor:
    """The magnitude of two channels, which are a complex image."""
    return images.norm(dim=1, keepdim=True) if images.shape[1] == 2 else images


if __name__ == "__main__":
    main(tyro.cli(Args))
