"""A TorchDEQ model, trained as its users train theirs, attacked with torchattacks' PGDL2 and JIIO.

    python examples/torchdeq_attack.py
    python examples/torchdeq_attack.py --eps 0.4 --images 64

One line, `adapt(model)`, gives its layers a joint mode; nothing else of the model changes. It also
gives them a gradient in eval mode, which TorchDEQ leaves out and PGD needs. Both attacks get the
same images, ball and pixel box, and are judged by a tighter solve than the one they attacked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torchattacks
import torchdeq
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_plugins import Anderson, count_evaluations
from jiio_plugins.data import load_digits
from jiio_plugins.evaluation import layers_as
from jiio_torchattacks import JIIO
from jiio_torchdeq import adapt


@dataclass
class Args:
    """Compare JIIO with torchattacks' PGDL2 on a TorchDEQ model of the digits."""

    eps: float = 0.6
    """radius of the L2 ball, in units of pixels that go from 0 to 1"""
    images: int = 100
    """test images, at most 500"""
    pgd_steps: int = 20
    epochs: int = 10
    seed: int = 0


class Classifier(nn.Module):
    """z = tanh(W z + u) on a state of two tensors, 8 channels of 8×8 and 8 of 4×4."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 8, 3, padding=1)
        self.fine, self.coarse = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 8, 2, stride=2), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8 * 4 * 4, 10)
        self.deq = torchdeq.get_deq(
            f_solver="anderson",
            f_max_iter=30,
            f_tol=1e-3,
            f_stop_mode="rel",
            ift=True,
            b_solver="anderson",
            b_max_iter=30,
            b_tol=1e-3,
            b_stop_mode="rel",
        )
        torchdeq.apply_norm(self, "weight_norm", filter_out=["encoder", "head"])

    def forward(self, x: Tensor) -> Tensor:
        torchdeq.reset_deq(self)  # TorchDEQ computes normalised weights once a pass
        u = self.encoder(x)

        def f(fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            next_fine = torch.tanh(0.3 * (self.fine(fine) + self.up(coarse)) + u)
            return next_fine, torch.tanh(0.3 * (self.coarse(coarse) + self.down(fine)))

        start = torch.zeros_like(u), torch.zeros_like(u[..., ::2, ::2])
        (*_, (_, coarse)), _ = self.deq(f, start)
        return self.head(coarse.flatten(1))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    model = Classifier()
    train(model, *load_digits("train"), args.epochs)
    model = adapt(model).eval()  # the one line

    images, labels = (t[: args.images] for t in load_digits("test"))

    @torch.no_grad()
    def judged(x: Tensor) -> tuple[float, float]:
        """Accuracy and mean cross-entropy."""
        with layers_as(solver=Anderson(max_iter=200, tol=1e-5)):
            logits = model(x)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return accuracy, cross_entropy(logits, labels).item()

    attacks = {
        f"PGDL2-{args.pgd_steps}": torchattacks.PGDL2(
            model, eps=args.eps, alpha=args.eps / 4, steps=args.pgd_steps
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
