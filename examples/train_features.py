"""Train the feature network that sets of Fashion-MNIST images are compared by.

    python examples/train_features.py --folder DIR --out fashion-mnist-features.safetensors

With its defaults this makes the shipped ``fashion-mnist-features``: a classifier whose last hidden
layer ``jiio sample`` measures Fréchet and kernel distances in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from jiio_plugins.data import load_labelled
from jiio_plugins.models import ConvFeatures


@dataclass
class Args:
    """Train one feature network."""

    data: str = "fashion-mnist"
    """fashion-mnist or digits"""
    folder: Path = Path("data")
    """folder of Fashion-MNIST"""
    out: Path = Path("features.safetensors")
    """where the weights go"""
    epochs: int = 3
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


@torch.no_grad()
def accuracy(model: ConvFeatures, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = [
        (model.logits(images).argmax(1) == labels)
        for images, labels in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(torch.cat(right).float().mean())


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    x, y, _ = load_labelled(args.data, "train", args.folder)
    x_test, y_test, _ = load_labelled(args.data, "test", args.folder)
    model = ConvFeatures(in_channels=x.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    per_epoch = len(x) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * per_epoch
    )
    with tqdm(total=args.epochs * per_epoch, desc="training") as bar:
        for _ in range(args.epochs):
            model.train()
            for batch in torch.randperm(len(x)).split(args.batch_size)[:per_epoch]:
                images = x[batch]
                if torch.rand(()) < 0.5:
                    images = images.flip(-1)
                loss = cross_entropy(model.logits(images), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    right = accuracy(model, x_test, y_test)
    model.standardise(x)
    save_file(model.state_dict(), args.out)
    print(f"{args.data}: {100 * right:.2f} % of {len(x_test)} test images; weights in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
