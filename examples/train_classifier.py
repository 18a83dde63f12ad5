"""Train the classifiers whose weights ship with the package.

    python examples/train_classifier.py --data digits --epochs 60 --shift 1 --out digits.safetensors
    python examples/train_classifier.py --data fashion-mnist --folder DIR --epochs 5 \\
        --jacobian-weight 6 --out first.safetensors
    python examples/train_classifier.py --data fashion-mnist --folder DIR --epochs 3 --seed 1 \\
        --jacobian-weight 6 --init first.safetensors --out fashion-mnist.safetensors

The cell is kept easy to solve by a Hutchinson Jacobian penalty; gradients are phantom gradients
during training, and the reported accuracy uses the solver the model carries afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from jiio_plugins import Anderson, Phantom, count_evaluations, jacobian_penalty
from jiio_plugins.data import load_labelled
from jiio_plugins.models import CLASSIFIERS


@dataclass
class Args:
    """Train one shipped classifier."""

    data: str = "digits"
    """digits or fashion-mnist"""
    out: Path = Path("classifier.safetensors")
    """where the weights go"""
    folder: Path = Path("data")
    """folder of Fashion-MNIST"""
    epochs: int = 30
    batch_size: int = 100
    lr: float = 2e-3
    jacobian_weight: float = 8.0
    """weight of the Jacobian penalty"""
    penalty_every: int = 2
    """steps between two Jacobian penalties"""
    seed: int = 0
    init: Path | None = None
    """weights to continue from"""
    shift: int = 0
    """augment by shifts of up to so many pixels"""
    train_size: int | None = None
    """use the first so many training images"""


def shifted(x: Tensor, pixels: int) -> Tensor:
    """The batch moved by one random offset, zeros coming in."""
    if not pixels:
        return x
    dy, dx = (int(k) for k in torch.randint(0, 2 * pixels + 1, (2,)))
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x, (pixels,) * 4)
    return padded[:, :, dy : dy + height, dx : dx + width]


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Accuracy, f evaluations a sample and the worst residual, by the model's own solver."""
    model.eval()
    right = 0
    with count_evaluations() as counter:
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(x), counter.f_evals / len(x), counter.worst_residual


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    model = CLASSIFIERS[args.data]()
    if args.init is not None:
        model.load_state_dict(load_file(args.init))
    x, y, _ = load_labelled(args.data, "train", args.folder)
    x, y = x[: args.train_size], y[: args.train_size]
    x_test, y_test, _ = load_labelled(args.data, "test", args.folder)
    layer = model.equilibrium
    final_solver, final_adjoint = layer.solver, layer.adjoint
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3)
    steps = args.epochs * (len(x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    bar = tqdm(total=steps, desc="training")
    for epoch in range(args.epochs):
        model.train()
        layer.solver, layer.adjoint = Anderson(max_iter=14, tol=1e-2), Phantom(steps=4, damping=0.8)
        for k, batch in enumerate(torch.randperm(len(x)).split(args.batch_size)):
            if len(batch) < args.batch_size:
                continue
            u = model.encoder(shifted(x[batch], args.shift))
            z = layer(u)
            loss = cross_entropy(model.decode(z), y[batch])
            total = loss
            if k % args.penalty_every == 0:
                total = loss + args.jacobian_weight * jacobian_penalty(layer.cell, z, u)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", jac=f"{(total - loss).item():.3f}")
        layer.solver, layer.adjoint = final_solver, final_adjoint
        acc, evals, residual = accuracy(model, x_test[:2000], y_test[:2000])
        bar.write(
            f"epoch {epoch + 1}: {100 * acc:.2f} % on {min(2000, len(x_test))} test images, "
            f"{evals:.1f} f evaluations, residual {residual:.1e}"
        )
        save_file(model.state_dict(), args.out)
    bar.close()
    acc, evals, residual = accuracy(model, x_test, y_test)
    print(
        f"{args.data}: {100 * acc:.2f} % of {len(x_test)} test images, {evals:.1f} f evaluations "
        f"a sample, worst residual {residual:.1e}; weights in {args.out}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
