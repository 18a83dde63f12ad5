"""A recorded loss, computed again from another output, is what the same code would give there."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from jiio_learn2learn.recording import Recorded, Tape
from tests.adapters.learn2learn.toys import Toy, learner, task
from tests.helpers import rand
from tests.utils.test_trees import MAKE

if TYPE_CHECKING:
    from collections.abc import Callable

LABELS = torch.arange(6) % 4


def augmented(y: Tensor) -> Tensor:
    loss = cross_entropy(y, LABELS, reduction="sum")
    loss /= len(y)
    return loss


def into_a_constant(y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    total += y.square().mean()
    total += y.mean()
    return total


def changed_in_place(y: Tensor) -> Tensor:
    y = y * 1.0
    y[0] = 2.0
    y[1:3].mul_(3.0)
    return y.sum()


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "cross-entropy": lambda y: cross_entropy(y, LABELS),
    "label smoothing": lambda y: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(y, LABELS),
    "mse": lambda y: mse_loss(y, torch.ones_like(y)),
    "in-place division": augmented,
    "into a constant": into_a_constant,
    "in place": changed_in_place,
    "methods": lambda y: (2 - y.softmax(1).log().gather(1, LABELS[:, None]).mean()) / 3,
    "rows": lambda y: sum(row.norm() for row in y),
    "maximum": lambda y: y.max(dim=1).values.sum() + y.T[0].sum(),
    "several": lambda y: torch.stack(y.unbind(1)).sum() * torch.cat([y, y]).mean(),
    "reads a shape": lambda y: y.reshape(y.shape[0] * y.size(1)).square().sum() / y.numel(),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_replay_is_the_same_code_at_another_output(name: str) -> None:
    here, there = rand(6, 4, seed=1), rand(6, 4, seed=2)
    tape = Tape(here)
    loss = LOSSES[name](tape.wrap(here.clone()))
    torch.testing.assert_close(loss.detach(), LOSSES[name](here.clone()), rtol=0, atol=0)
    for _ in range(2):
        torch.testing.assert_close(tape.replay(loss), LOSSES[name](here.clone()), rtol=0, atol=0)
        again = there.clone().requires_grad_()
        got = tape.replay(loss, again * 1)
        assert type(got) is Tensor
        expected = LOSSES[name]((plain := there.clone().requires_grad_()) * 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got, again), torch.autograd.grad(expected, plain), rtol=0, atol=0
        )


def test_outputs_in_tuples_and_dicts() -> None:
    output = {"logits": rand(3, 2, seed=1), "parts": (rand(3, 1, seed=2), 5)}
    tape = Tape(output)
    wrapped = tape.wrap(output)
    loss = wrapped["logits"].sum() * wrapped["parts"][0].mean()
    other = {"logits": rand(3, 2, seed=3), "parts": (rand(3, 1, seed=4), 5)}
    expected = other["logits"].sum() * other["parts"][0].mean()
    torch.testing.assert_close(tape.replay(loss, other), expected)


class Returning(Toy):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(super().forward(x))


@pytest.mark.parametrize("make", MAKE)
def test_a_model_may_return_containers_of_its_own(make: Any) -> None:
    x, y, query, _ = task(30)
    clone, plain = learner(model=Returning(make)).clone(), learner().clone()
    output = clone(x)
    assert type(output) is make
    clone.adapt(cross_entropy(output.logits, y))
    plain.adapt(cross_entropy(plain(x), y))
    torch.testing.assert_close(clone(query).logits, plain(query), rtol=1e-6, atol=1e-8)


def test_an_output_without_tensors_is_refused() -> None:
    opaque = learner(model=Returning(lambda y: SimpleNamespace(logits=y))).clone()
    with pytest.raises(TypeError, match="returned SimpleNamespace, in which no tensor was found"):
        opaque(task(30)[0])


def test_it_is_a_tensor_like_any_other() -> None:
    y = Tape(x := rand(3, 2, seed=1).requires_grad_()).wrap(x * 2)
    assert isinstance(y, Recorded)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())
    assert y.argmax(1).tolist() == (2 * x).argmax(1).tolist()
    assert isinstance(y.sum().item(), float)
    assert y.detach().numpy().shape == (3, 2)
    assert type(copy.deepcopy(y.detach())) is Tensor
    file = io.BytesIO()
    torch.save(y.detach(), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), 2 * x.detach())


def test_two_tapes_mix_to_a_plain_tensor() -> None:
    first, second = (Tape(t).wrap(t) for t in (rand(2, 2, seed=1), rand(2, 2, seed=2)))
    assert type(first.sum() + second.sum()) is Tensor
    assert isinstance(first.sum() + 1.0, Recorded)


def test_constants_are_those_from_elsewhere() -> None:
    y = Tape(x := rand(2, 2, seed=1)).wrap(x)
    weight = torch.ones(2, dtype=torch.float64)
    loss = (y * weight).sum()
    assert any(t is weight for t in loss.tape.constants())
