"""learn2learn's Omniglot loop with two lines changed: the model and its wrapper.

    python examples/learn2learn_fewshot.py [--iterations 500]

The tasks are letters of fonts that are installed anyway, split by script; with ``--omniglot ROOT``
they are Omniglot's characters, from torchvision's folder.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003, tyro reads the annotations
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from jiio_learn2learn import JIIOLearner
from jiio_learn2learn.data import glyph_tasksets, omniglot_tasksets
from jiio_plugins.models import MDEQFewShot


@dataclass
class Args:
    """Few-shot classification."""

    iterations: int = 10
    ways: int = 5
    shots: int = 1
    meta_batch_size: int = 4
    meta_lr: float = 3e-3
    fast_lr: float = 0.4
    adaptation_steps: int = 1
    reg: float = 0.5
    """pulls a task's parameters to the common ones"""
    seed: int = 42
    omniglot: Path | None = None
    """torchvision's root, in place of the glyphs"""
    cache: Path | None = None
    """folder for the images once read or rendered; None: the user's cache"""


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions.argmax(dim=1) == targets).double().mean()


def fast_adapt(
    batch: tuple[Tensor, Tensor], learner: Any, loss: nn.Module, args: Args
) -> tuple[Tensor, Tensor]:
    data, labels = batch
    adaptation = torch.zeros(len(labels), dtype=torch.bool)
    adaptation.view(args.ways, -1)[:, : args.shots] = True  # tasks are sorted by class
    for _ in range(args.adaptation_steps):
        learner.adapt(loss(learner(data[adaptation]), labels[adaptation]))
    predictions = learner(data[~adaptation])
    return loss(predictions, labels[~adaptation]), accuracy(predictions, labels[~adaptation])


def main(args: Args) -> None:
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    sizes = {"ways": args.ways, "samples": 2 * args.shots + 2, "cache": args.cache}
    if args.omniglot is None:
        tasksets = glyph_tasksets(**sizes)
    else:
        tasksets = omniglot_tasksets(args.omniglot, **sizes)

    model = MDEQFewShot(ways=args.ways)
    # with learn2learn's own:  maml = l2l.algorithms.MAML(model, lr=args.fast_lr)
    maml = JIIOLearner(
        model,
        lr=args.fast_lr,
        adapt=["context", "head.weight", "head.bias"],
        reg=args.reg,
        iters=80,
        memory=20,
    )
    opt = torch.optim.Adam(maml.parameters(), args.meta_lr)
    loss = nn.CrossEntropyLoss(reduction="sum")

    for iteration in range(args.iterations):
        opt.zero_grad()
        meta = {"train": [0.0, 0.0], "valid": [0.0, 0.0]}
        for _ in range(args.meta_batch_size):
            learner = maml.clone()
            error, correct = fast_adapt(tasksets.train.sample(), learner, loss, args)
            error.backward()
            meta["train"][0] += error.item()
            meta["train"][1] += correct.item()

            learner = maml.clone()
            error, correct = fast_adapt(tasksets.validation.sample(), learner, loss, args)
            meta["valid"][0] += error.item()
            meta["valid"][1] += correct.item()
        row = "  ".join(
            f"{name}: loss {a / args.meta_batch_size:6.3f}, accuracy {b / args.meta_batch_size:.3f}"
            for name, (a, b) in meta.items()
        )
        print(f"iteration {iteration:4d}  {row}")
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / args.meta_batch_size)
        opt.step()

    error, correct = 0.0, 0.0
    for _ in range(args.meta_batch_size):
        error_, correct_ = fast_adapt(tasksets.test.sample(), maml.clone(), loss, args)
        error, correct = error + error_.item(), correct + correct_.item()
    print(f"unseen scripts: accuracy {correct / args.meta_batch_size:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
