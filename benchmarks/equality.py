"""Whether two versions of the package give the same results, to the bit.

    python benchmarks/equality.py --out before.json      # in one checkout
    python benchmarks/equality.py --against before.json  # in the other

Fixed seeds, one thread. Each result is an optimised x, its status and its costs, told by a
fingerprint of its bytes: attacks in every norm, free problems, several layers, parameters with
groups, train mode, gradients of a solution, latent fits, few-shot adaptation, reconstruction,
attacks and a training through the adapters. Fashion-MNIST is added where its folder is given.
Two machines may round differently, so run both on one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import TYPE_CHECKING, Any

import deepinv as dinv
import numpy as np
import torch
import tyro
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from jiio_art import JIIOAdversarialTrainer, JIIOAttack
from jiio_deepinv import JIIOReconstructor
from jiio_learn2learn import JIIOLearner
from jiio_plugins import (
    Anderson,
    Box,
    Equilibrium,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    Unrolled,
    attack,
    joint_solution,
    optimize_input,
)
from jiio_plugins.data import load_digits, load_fashion_mnist
from jiio_plugins.evaluation import Backpropagated
from jiio_plugins.generative import fit
from jiio_plugins.models import SinusoidDEQ, load_pretrained
from jiio_plugins.utils import write_json
from jiio_torchattacks import JIIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Named = tuple[str, Tensor]


@dataclass
class Args:
    """Compare two versions bit by bit."""

    data: Path | None = None
    """folder of Fashion-MNIST; None: digits alone"""
    out: Path | None = None
    """file for the fingerprints"""
    against: Path | None = None
    """file of another version, to compare with"""


class Cell(nn.Module):
    """``tanh(W z + u)`` with W 0.7 times an orthogonal matrix."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + u)


class Two(nn.Module):
    """Two layers in series, a context that may be optimised, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Equilibrium(Cell(6)), Equilibrium(Cell(6))
        self.encoder, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.context = nn.Parameter(torch.zeros(1, 6))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.first(self.encoder(x) + self.context))
        return self.head(self.dropout(z))


def parts(name: str, found: Any) -> Iterator[Named]:
    """What is compared of a solution."""
    x = found.x
    yield f"{name}: x", torch.cat([t.flatten() for t in x.values()]) if isinstance(x, dict) else x
    for field in ("value", "status"):
        if hasattr(found, field):
            yield f"{name}: {field}", getattr(found, field)
    stats = getattr(found, "stats", found)
    yield f"{name}: f evaluations", stats.f_evals
    yield f"{name}: VJPs", stats.vjps


def away(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: -cross_entropy(logits, y, reduction="none")


def towards(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: cross_entropy(logits, y, reduction="none")


def classifier(name: str, x: Tensor, y: Tensor, eps: float, eps_inf: float) -> Iterator[Named]:
    model = load_pretrained(name)
    box, few, some = Box(0.0, 1.0), x[:8], y[:8]
    free, ball = towards(some), L2Ball(eps)
    jobs: dict[str, tuple[Tensor, Any, Any, Any]] = {
        "L2": (x, away(y), Intersection(ball, box), Joint()),
        "Linf": (x, away(y), Intersection(LinfBall(eps_inf), box), Joint(max_iter=12)),
        "L1": (few, away(some), Intersection(L1Ball(6 * eps), box), Joint(max_iter=12)),
        "free": (few, free, None, Joint(max_iter=15)),
        "free, Anderson": (few, free, None, Joint(max_iter=15, mixing="anderson")),
        "one state step": (few, away(some), ball, Joint(max_iter=12, state_steps=1)),
        "nested": (few, away(some), ball, Nested(max_iter=6)),
        "nested, warm": (few, away(some), ball, Nested(max_iter=6, warm_start=True)),
        "own gradient": (few, away(some), ball, Backpropagated(max_iter=4)),
        "unrolled": (few, away(some), ball, Backpropagated(views=(Unrolled(steps=8),), max_iter=4)),
    }
    for job, (start, objective, constraint, method) in jobs.items():
        found = optimize_input(model, start, objective, constraint=constraint, method=method)
        yield from parts(f"{name}, {job}", found)
    limits: dict[str, Any] = {"norm": 2, "eps": eps, "lower": 0.0, "upper": 1.0}
    retried = attack(model, x, y, loss="dlr", random_starts=2, retry=Joint(max_iter=20), **limits)
    yield from parts(f"{name}, attack", retried)
    stopped = attack(model, few, some, training_mode=True, early_stop=True, **limits)
    yield from parts(f"{name}, train mode", stopped)
    step = Joint(max_iter=7, step_size=2.0, warmup=2, adjoint_warmup=6, relaxation=1.2)
    inner = joint_solution(model, few, away(some), method=step, constraint=ball)
    yield from parts(f"{name}, training", inner)


def layers() -> Iterator[Named]:
    model = Two().double()
    x, t = (torch.randn(10, n, generator=torch.Generator().manual_seed(n)).double() for n in (5, 3))

    def error(output: Tensor) -> Tensor:
        return (output - t).square().sum(1)

    long, groups, names = Joint(max_iter=30), torch.arange(10) // 5, ["context"]
    model.eval()
    yield from parts("two layers, L2", optimize_input(model, x, error, constraint=L2Ball(0.5)))
    yield from parts("two layers, free", optimize_input(model, x, error, method=long))
    found = optimize_input(model, x, error, variables=names, method=long)
    yield from parts("two layers, parameters", found)
    found = optimize_input(model, x, error, variables=names, groups=groups, method=long)
    yield from parts("two layers, groups", found)
    model.train()
    found = optimize_input(model, x, error, constraint=L2Ball(0.5), training_mode=True)
    yield from parts("two layers, train mode", found)
    model.eval()
    live = x.clone().requires_grad_()
    found = optimize_input(model, live, error, constraint=L2Ball(0.3), differentiable=True)
    found.x.sum().backward()
    yield from parts("two layers, differentiable", found)
    assert live.grad is not None
    yield "two layers, differentiable: gradient", live.grad


def latents(name: str, images: Tensor) -> Iterator[Named]:
    found = fit(load_pretrained(name), images, method=Joint(max_iter=25))
    yield f"{name}: latents", found.latents
    yield f"{name}: f evaluations", found.f_evals


def few_shot() -> Iterator[Named]:
    torch.manual_seed(0)
    model = SinusoidDEQ()
    x = torch.linspace(-5, 5, 10)[:, None]
    for first_order in (True, False):
        learner = JIIOLearner(model, lr=0.1).clone()
        learner.adapt(mse_loss(learner(x), torch.sin(x)), first_order=first_order)
        loss = mse_loss(learner(x + 0.1), torch.sin(x + 0.1))
        yield f"few-shot, first order {first_order}: query loss", loss.detach()
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    yield "few-shot: meta-gradient", torch.cat(grads)


def reconstruction(name: str, images: Tensor) -> Iterator[Named]:
    generator = load_pretrained(name)
    mask = torch.Generator().manual_seed(0)
    physics = dinv.physics.Inpainting(tuple(images.shape[1:]), mask=0.5, rng=mask)
    physics.noise_model = dinv.physics.GaussianNoise(0.05)
    torch.manual_seed(1)
    y = physics(images)
    with torch.no_grad():
        yield f"{name}: reconstruction", JIIOReconstructor(generator, iters=15)(y, physics)
    loose = Anderson(max_iter=8, memory=8, tol=0.1)
    model = JIIOReconstructor(generator, iters=10, range_penalty=10.0, implicit=loose)
    image = model(y, physics)
    image.sum().backward()
    yield f"{name}: beyond the range", image.detach()
    grads = [p.grad.flatten() for p in generator.parameters() if p.grad is not None]
    yield f"{name}: gradient", torch.cat(grads)


def adapters(x: Tensor, y: Tensor) -> Iterator[Named]:
    model = load_pretrained("digits")
    host = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        optimizer=torch.optim.SGD(model.parameters(), 0.01),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    images, labels = x.numpy(), y.numpy()
    inf = JIIOAttack(host, norm=np.inf, eps=0.1, max_iter=8, num_random_init=1, verbose=False)
    yield "ART: images", torch.from_numpy(inf.generate(images[:10], labels[:10]))
    yield "torchattacks: images", JIIO(model, eps=0.5, steps=8)(x[:10], y[:10])
    ball = JIIOAttack(host, norm=2, eps=0.5, verbose=False)
    trainer = JIIOAdversarialTrainer(
        host, ball, jacobian_weight=0.1, restart_every=2, verbose=False
    )
    trainer.fit(images, labels, nb_epochs=2, batch_size=32)
    yield "ART: trained weights", torch.cat([p.detach().flatten() for p in model.parameters()])


def results(data: Path | None) -> Iterator[Named]:
    x, y = load_digits("test")
    yield from classifier("digits", x[:24], y[:24], 0.5, 0.1)
    yield from layers()
    yield from latents("digits-generator", x[:12])
    yield from few_shot()
    yield from reconstruction("digits-generator", x[:3])
    yield from adapters(x[:64], y[:64])
    if data is not None:
        x, y = load_fashion_mnist(data, "test")
        yield from classifier("fashion-mnist", x[:12], y[:12], 1.0, 0.03)
        yield from latents("fashion-mnist-generator", x[:6])
        yield from reconstruction("fashion-mnist-generator", x[:3])


def fingerprint(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def main(args: Args) -> None:
    torch.set_num_threads(1)
    found = {name: fingerprint(tensor) for name, tensor in results(args.data)}
    if args.out is not None:
        write_json(args.out, found)
        print(f"{len(found)} fingerprints: {args.out}")
    if args.against is not None:
        before = json.loads(args.against.read_text())
        differ = sorted(name for name in found if before.get(name) != found[name])
        for name in differ:
            print(f"differs: {name}")
        print(f"{len(found)} results, {len(differ)} differ")


if __name__ == "__main__":
    main(tyro.cli(Args))
