"""What a call made is gone when its result is: no circle of references keeps a batch alive."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from jiio_plugins import (
    Implicit,
    JacobianFree,
    Joint,
    L2Ball,
    Nested,
    Phantom,
    Unrolled,
    attack,
    optimize_input,
)
from jiio_plugins.generative import fit
from jiio_plugins.models import load_pretrained
from jiio_torchattacks import JIIO
from jiio_torchdeq import adapt
from tests.adapters.deepinv.toys import measured, reconstructor
from tests.adapters.learn2learn.toys import learner, task
from tests.adapters.torchdeq.toys import Net as TheirNet
from tests.adversarial.helpers import TRAINING, build, data
from tests.cases import every_method, squared
from tests.helpers import Net, rand

if TYPE_CHECKING:
    from collections.abc import Callable


def assert_nothing_stays(call: Callable[[], Any]) -> None:
    """With the collector off, no tensor that a call made outlives it."""
    call()  # what is made once, such as caches
    gc.collect()
    gc.disable()
    try:
        before = {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor)}
        call()
        after = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and id(o) not in before]
        shapes = [tuple(t.shape) for t in after]
        del after
    finally:
        gc.enable()
    assert not shapes


@every_method
@pytest.mark.parametrize("constraint", [None, L2Ball(0.5)])
def test_an_optimisation(method: Any, constraint: Any) -> None:
    model, x = Net(), rand(4, 5, seed=1)
    assert_nothing_stays(
        lambda: optimize_input(model, x, squared, method=method, constraint=constraint)
    )


def test_an_attack_and_a_gradient_of_a_solution() -> None:
    model, x, labels = Net(), rand(4, 5, seed=1), torch.zeros(4, dtype=torch.long)
    assert_nothing_stays(
        lambda: attack(model, x, labels, norm=2, eps=0.5, random_starts=2, retry=Nested())
    )

    def differentiate() -> None:
        found = optimize_input(
            model, x.requires_grad_(), squared, constraint=L2Ball(0.5), differentiable=True
        )
        torch.autograd.grad(found.x.sum(), x)

    assert_nothing_stays(differentiate)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), JacobianFree(), Unrolled()])
def test_a_pass_through_a_layer(adjoint: Any) -> None:
    model = Net()
    model.equilibrium.adjoint = adjoint

    def go(backward: bool) -> None:
        x = rand(4, 5, seed=1).requires_grad_()
        y = model(x).sum()
        if backward:
            torch.autograd.grad(y, x)

    for backward in (True, False):
        assert_nothing_stays(lambda backward=backward: go(backward))


def test_an_attack_of_torchattacks() -> None:
    """Its attacks are set in a way that keeps what is set alive."""
    model, (x, labels) = load_pretrained("digits"), data("test", 4)
    atk = JIIO(model, norm="L2", eps=0.3, steps=3)

    def run() -> None:
        atk(x, labels)
        atk._solution = None  # it keeps the last one

    assert_nothing_stays(run)
    assert_nothing_stays(lambda: JIIO(model, norm="L2", eps=0.3, steps=3)(x, labels))


def test_a_step_of_adversarial_training() -> None:
    model, (x, labels) = build(), data()

    def step() -> None:
        TRAINING(model, x[:8], labels[:8]).loss.backward()
        model.zero_grad()

    assert_nothing_stays(step)


def test_a_reconstruction_an_adaptation_a_fit_and_a_layer_of_torchdeq() -> None:
    model, (_, y, physics) = reconstructor(iters=20), measured()

    def reconstruct() -> None:
        model(y, physics).sum().backward()
        model.zero_grad()
        model._solution = model._latents = None  # it keeps the last ones

    assert_nothing_stays(reconstruct)
    own, (x, labels, query, _) = learner(iters=20), task(1)

    def adapt_and_ask() -> None:
        clone = own.clone()
        clone.adapt(torch.nn.functional.cross_entropy(clone(x), labels))
        clone(query).sum().backward()
        own.zero_grad()

    assert_nothing_stays(adapt_and_ask)
    generator: Any = load_pretrained("digits-generator")
    images, _ = data("test", 4)
    assert_nothing_stays(lambda: fit(generator, images, method=Joint(max_iter=3)))
    theirs, x = adapt(TheirNet()).eval(), rand(4, 5, seed=1)
    assert_nothing_stays(lambda: optimize_input(theirs, x, squared, constraint=L2Ball(0.5)))
