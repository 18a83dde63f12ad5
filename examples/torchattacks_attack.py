"""Attack the shipped digits classifier from torchattacks, with its PGDL2 and with JIIO.

    python examples/torchattacks_attack.py
    python examples/torchattacks_attack.py --eps 0.4 --images 64

The classifier is a deep equilibrium model, so every one of PGD's gradients solves for the state z
and then for its adjoint. JIIO advances z, the adjoint and the image together. Both attacks get the
same images, ball and pixel box, and both are judged by a solve that is tighter than the one they
attacked.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
import torchattacks
import tyro
from torch import Tensor
from torch.nn.functional import cross_entropy

from jiio_plugins import Anderson, count_evaluations
from jiio_plugins.data import load_digits
from jiio_plugins.models import load_pretrained
from jiio_torchattacks import JIIO


@dataclass
class Args:
    """Compare JIIO with torchattacks' PGDL2 on the digits."""

    eps: float = 0.6
    """radius of the L2 ball, in units of pixels that go from 0 to 1"""
    images: int = 100
    """test images, at most 500"""
    pgd_steps: int = 20
    device: str = "cpu"
    seed: int = 0


def main(args: Args) -> None:
    torch.manual_seed(args.seed)  # PGDL2 starts at random, from the global generator
    model = load_pretrained("digits").to(args.device)
    images, labels = (t[: args.images].to(args.device) for t in load_digits("test"))
    judge = copy.deepcopy(model)
    judge.equilibrium.solver = Anderson(max_iter=200, tol=1e-5)

    @torch.no_grad()
    def judged(x: Tensor) -> tuple[float, float]:
        """Accuracy and mean cross-entropy."""
        logits = judge(x)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return accuracy, cross_entropy(logits, labels).item()

    alpha = args.eps / 4
    attacks = {
        f"PGDL2-{args.pgd_steps}": torchattacks.PGDL2(
            model, eps=args.eps, alpha=alpha, steps=args.pgd_steps
        ),
        "JIIO": JIIO(model, norm="L2", eps=args.eps),
    }
    n = len(images)
    print(f"{n} digits, L2 ball of radius {args.eps}, clean accuracy {judged(images)[0]:.1%}\n")
    print(f"{'attack':<12}{'accuracy':>10}{'loss':>8}{'f / image':>11}{'VJP / image':>13}{'s':>8}")
    for name, attack in attacks.items():
        begin = time.perf_counter()
        with count_evaluations() as counter:
            adversarial = attack(images, labels)
            if args.device != "cpu":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        accuracy, loss = judged(adversarial)
        f_evals, vjps = counter.f_evals / n, counter.vjps / n
        print(
            f"{name:<12}{accuracy:>10.1%}{loss:>8.2f}{f_evals:>11.1f}{vjps:>13.1f}{seconds:>8.1f}"
        )
        assert (adversarial - images).flatten(1).norm(dim=1).max() <= args.eps * (1 + 1e-5)
    print(f"\nattack.solution.report(): {attacks['JIIO'].solution.report()}")


if __name__ == "__main__":
    main(tyro.cli(Args))
