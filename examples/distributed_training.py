"""Adversarial training on several processes, with lightning-fabric.

    python examples/distributed_training.py
    torchrun --nproc-per-node 2 examples/distributed_training.py --report out

The search for adversarial images runs on the model itself, without any communication; the pass with
parameter gradients goes through Fabric's wrapper (``wrapped=``), which averages them over the
processes. Every process makes the same number of iterations.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads the annotations at run time)

import torch
import tyro
from torch.utils.data import DataLoader, TensorDataset

from jiio_plugins.adversarial import AdversarialTraining
from jiio_plugins.data import load_digits
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import launch


@dataclass
class Args:
    """Adversarial training on the digits, one or more processes."""

    epochs: int = 2
    images: int = 1297
    """training images, at most 1297"""
    batch_size: int = 25
    """images a step and process"""
    lr: float = 5e-3
    device: str = "cpu"
    """as in Fabric: cpu, cuda, auto"""
    report: Path | None = None
    """folder for one JSON a process: the images it saw, its losses, a digest of its weights"""
    seed: int = 0


def main(args: Args) -> None:
    torch.set_num_threads(1)
    fabric = launch(args.device)
    torch.manual_seed(args.seed)
    x, y = (t[: args.images] for t in load_digits("train"))
    model = load_pretrained("digits")
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=args.lr))
    dataset = TensorDataset(x, y, torch.arange(len(x)))
    loader = fabric.setup_dataloaders(
        DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)
    )
    training = AdversarialTraining(norm=2, eps=0.6, lower=0.0, upper=1.0)
    # the processes draw the same numbers for their own images
    generator = torch.Generator(fabric.device).manual_seed(args.seed)
    losses, seen = [], []
    wrapped.train()
    for epoch in range(args.epochs):
        right = torch.zeros(2, device=fabric.device)
        for images, labels, indices in loader:
            step = training(model, images, labels, wrapped=wrapped, generator=generator)
            optimizer.zero_grad()
            fabric.backward(step.loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            losses.append(float(step.loss.detach()))
            seen.append(indices.tolist())
            right += torch.tensor([step.robust.sum(), len(images)], device=fabric.device)
        hit, count = fabric.all_reduce(right, reduce_op="sum").tolist()
        fabric.print(
            f"epoch {epoch + 1}: {hit / count:.1%} of {count:.0f} images right under attack, "
            f"loss {losses[-1]:.3f}, {fabric.world_size} processes"
        )
    if args.report is not None:
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        record = {"losses": losses, "seen": seen, "weights": digest.hexdigest()}
        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / f"rank{fabric.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(tyro.cli(Args))
