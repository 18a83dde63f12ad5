"""The shipped weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jiio_plugins import Anderson, count_evaluations
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import available_weights, load_pretrained


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("fashion-mnist", 28)])
def test_weights_load(name: str, size: int) -> None:
    assert name in available_weights()
    model = load_pretrained(name)
    assert not model.training
    with torch.no_grad():
        x = torch.full((2, 1, size, size), 0.3)
        first, second = (load_pretrained(name)(x) for _ in range(2))
    assert first.shape == (2, 10)
    assert torch.equal(first, second)


def test_unknown_weights() -> None:
    with pytest.raises(ValueError, match=r"no weights called 'cifar'; there are digits, fashion"):
        load_pretrained("cifar")


def test_digits_classifier_is_accurate_and_converges() -> None:
    x, y = load_digits("test")
    model: nn.Module = load_pretrained("digits")
    with torch.no_grad(), count_evaluations() as counter:
        predicted = model(x).argmax(1)
    assert float((predicted == y).double().mean()) >= 0.97
    assert counter.worst_residual <= model.equilibrium.solver.tol
    # and the tolerance is tight enough: a far tighter one sees the same
    model.equilibrium.solver = Anderson(tol=1e-6, max_iter=300)
    with torch.no_grad():
        again = model(x).argmax(1)
    assert int((again != predicted).sum()) <= 1
