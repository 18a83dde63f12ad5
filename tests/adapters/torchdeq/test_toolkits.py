"""An adapted network in the other toolkits."""

from __future__ import annotations

import copy

import deepinv as dinv
import numpy as np
import pytest
import torch
import torchattacks
import torchdeq
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_art import JIIOAdversarialTrainer, JIIOAttack
from jiio_deepinv import JIIOReconstructor
from jiio_learn2learn import JIIOLearner
from jiio_plugins import count_evaluations
from jiio_plugins.data.classification import load_digits
from jiio_torchattacks import JIIO
from jiio_torchdeq import adapt
from tests.adapters.torchdeq.toys import Net, Ours
from tests.helpers import contraction, rand


class Digits(nn.Module):
    """A small classifier of 8×8 digits, float32, as a user of TorchDEQ writes it."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.weight = nn.Parameter(contraction(width, 0.6, symmetric=False, seed=1).float())
        self.deq = torchdeq.get_deq(f_solver="anderson", f_max_iter=40, f_tol=1e-4, ift=True)

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x.flatten(1))
        z_out, _ = self.deq(lambda z: torch.tanh(z @ self.weight + u), torch.zeros_like(u))
        return self.head(z_out[-1])


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    torch.manual_seed(0)
    net = Digits()
    images, labels = load_digits("train")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(10):
        for batch in torch.randperm(len(images)).split(100):
            loss = cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return adapt(net).eval()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


@pytest.mark.filterwarnings("ignore:.* not to be relied on")  # it has learnt for seconds
def test_attacks_of_both_kinds(digits: nn.Module) -> None:
    x, y = (t[:100] for t in load_digits("test"))
    assert accuracy(digits, x, y) > 0.9
    ours = JIIO(digits, norm="L2", eps=0.6)
    found = accuracy(digits, ours(x, y), y)
    with count_evaluations() as counter:
        attack = torchattacks.PGDL2(digits, eps=0.6, alpha=0.15, steps=20)
        theirs = accuracy(digits, attack(x, y), y)
    assert found <= theirs + 0.02 < 0.7
    stats = ours.solution.stats
    assert float((stats.f_evals + stats.vjps).mean()) < (counter.f_evals + counter.vjps) / 500


def test_art(digits: nn.Module) -> None:
    x, y = (t[:50] for t in load_digits("test"))
    net = copy.deepcopy(digits)
    classifier = PyTorchClassifier(
        net,
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        clip_values=(0, 1),
        device_type="cpu",
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
    )
    adversarial = JIIOAttack(classifier, norm=2, eps=0.6).generate(x.numpy(), y.numpy())
    attacked = accuracy(net, torch.from_numpy(adversarial), y)
    assert attacked < 0.7
    attack = JIIOAttack(classifier, norm=2, eps=0.6)
    trainer = JIIOAdversarialTrainer(classifier, attack, trades=2.0, verbose=False)
    trainer.fit(x.numpy(), y.numpy(), nb_epochs=8, batch_size=25)
    assert accuracy(net, torch.from_numpy(adversarial), y) > attacked + 0.1
    assert np.isfinite(classifier.predict(x.numpy())).all()


def test_learn2learn() -> None:
    x, y = rand(12, 5, seed=4), torch.arange(12) % 3

    def adapted(net: nn.Module) -> Tensor:
        learner = JIIOLearner(net, lr=0.1, adapt=("head.weight",), reg=1.0, iters=40).clone()
        learner.adapt(cross_entropy(learner(x), y))
        loss = cross_entropy(learner(x), y)
        loss.backward()
        return torch.cat([loss.detach()[None], net.encoder.weight.grad.flatten()])

    assert torch.allclose(adapted(adapt(Net()).eval()), adapted(Ours()), rtol=1e-4, atol=1e-7)


def test_deepinv() -> None:
    class Generator(Net):
        latent_shape = (5,)

        def forward(self, w: Tensor) -> Tensor:
            return super().forward(w).reshape(len(w), 1, 1, 3)

    generator = adapt(Generator()).eval()
    truth = generator(rand(4, 5, seed=6)).detach()
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.01))
    model = JIIOReconstructor(generator, latent_penalty=1e-3, iters=60)
    with torch.no_grad():
        assert float((model(truth, physics) - truth).abs().max()) < 0.02
