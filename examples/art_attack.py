"""Attack the shipped digits classifier from inside ART, with its own PGD and with JIIO.

    python examples/art_attack.py
    python examples/art_attack.py --norm inf --eps 0.1 --images 64

The classifier is a deep equilibrium model, so every one of PGD's gradients solves for the state z
and then for its adjoint. JIIO advances z, the adjoint and the image together. Both attacks get the
same images, ball and pixel box, and both are judged by ``classifier.predict``. The counts hold
everything the two do inside ``generate``; of PGD's, two solves an image are for its log message.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import tyro
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier

from jiio_art import JIIOAttack
from jiio_plugins import count_evaluations
from jiio_plugins.data import load_digits
from jiio_plugins.models import load_pretrained

if TYPE_CHECKING:
    from art.attacks.attack import EvasionAttack


@dataclass
class Args:
    """Compare JIIO with ART's PGD on the digits."""

    norm: Literal["2", "inf", "1"] = "2"
    eps: float = 0.6
    """radius of the ball, in units of pixels that go from 0 to 1"""
    images: int = 100
    """test images, at most 500"""
    pgd_steps: int = 20
    device: Literal["cpu", "gpu"] = "cpu"
    seed: int = 0


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 (ART draws from the global state)
    images, labels = load_digits("test")
    x, y = images[: args.images].numpy(), labels[: args.images].numpy()
    classifier = PyTorchClassifier(
        load_pretrained("digits"),
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type=args.device,
    )
    norm = float(args.norm)
    common = {"norm": norm, "eps": args.eps, "batch_size": 50}
    attacks: dict[str, EvasionAttack] = {
        f"ART PGD-{args.pgd_steps}": ProjectedGradientDescentPyTorch(
            classifier, eps_step=args.eps / 4, max_iter=args.pgd_steps, verbose=False, **common
        ),
        "JIIO": JIIOAttack(classifier, verbose=False, **common),
    }
    clean = (classifier.predict(x).argmax(1) == y).mean()
    print(f"{len(x)} digits, L{args.norm} ball of radius {args.eps}, clean accuracy {clean:.1%}\n")
    print(f"{'attack':<12}{'accuracy':>10}{'loss':>8}{'f / image':>11}{'VJP / image':>13}{'s':>8}")
    for name, attack in attacks.items():
        begin = time.perf_counter()
        with count_evaluations() as counter:
            adversarial = attack.generate(x, y)
        seconds = time.perf_counter() - begin
        accuracy = (classifier.predict(adversarial).argmax(1) == y).mean()
        loss = classifier.compute_loss(adversarial, np.eye(10, dtype=np.float32)[y]).mean()
        f_evals, vjps = counter.f_evals / len(x), counter.vjps / len(x)
        print(
            f"{name:<12}{accuracy:>10.1%}{loss:>8.2f}{f_evals:>11.1f}{vjps:>13.1f}{seconds:>8.1f}"
        )
        size = np.linalg.norm((adversarial - x).reshape(len(x), -1), ord=norm, axis=1)
        assert size.max() <= args.eps * (1 + 1e-5)
    jiio = attacks["JIIO"]
    print(f"\nattack.solution.report(): {jiio.solution.report()}")


if __name__ == "__main__":
    main(tyro.cli(Args))
