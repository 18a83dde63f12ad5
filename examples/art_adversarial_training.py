"""Adversarial training of the shipped digits classifier inside ART.

    python examples/art_adversarial_training.py
    python examples/art_adversarial_training.py --epochs 20 --trades 6

``JIIOAdversarialTrainer`` takes ART's classifier, data and schedulers. Each of its steps solves for
adversarial images, the model's state and its adjoint in one iteration. With ``--checkpoint FILE``
the training can be killed at any moment: the same command goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads the annotations at run time)

import torch
import tyro
from art.estimators.classification import PyTorchClassifier
from art.metrics import adversarial_accuracy

from jiio_art import JIIOAdversarialTrainer, JIIOAttack
from jiio_plugins.data import load_digits
from jiio_plugins.models import load_pretrained


@dataclass
class Args:
    """Adversarial training on the digits."""

    eps: float = 0.6
    """radius of the L2 ball, in units of pixels that go from 0 to 1"""
    epochs: int = 3
    images: int = 1297
    """training images, at most 1297"""
    test_images: int = 200
    trades: float | None = None
    """weight of the TRADES loss"""
    checkpoint: Path | None = None
    seed: int = 0


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    x, y = (t[: args.images].numpy() for t in load_digits("train"))
    x_test, y_test = (t[: args.test_images].numpy() for t in load_digits("test"))
    model = load_pretrained("digits")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    classifier = PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        optimizer=optimizer,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = JIIOAttack(classifier, norm=2, eps=args.eps, batch_size=200, verbose=False)

    def report(when: str) -> None:
        clean = (classifier.predict(x_test).argmax(1) == y_test).mean()
        robust = clean * adversarial_accuracy(classifier, x_test, y_test, attack_crafter=attack)
        print(f"{when}: clean accuracy {clean:.1%}, under attack {robust:.1%}")

    report("before")
    trainer = JIIOAdversarialTrainer(
        classifier,
        attack,
        trades=args.trades,
        max_grad_norm=1.0,
        checkpoint=args.checkpoint,
        resume=args.checkpoint is not None,
        seed=args.seed,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    trainer.fit(x, y, batch_size=50, nb_epochs=args.epochs, scheduler=schedule)
    report("after")


if __name__ == "__main__":
    main(tyro.cli(Args))
