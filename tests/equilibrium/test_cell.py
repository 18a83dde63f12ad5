"""What a cell may return, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Equilibrium, Implicit, Unrolled, optimize_input
from tests.helpers import Elementwise, rand


class Wrong(nn.Module):
    """Returns what it is told, whatever it is given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, z: Any, u: Tensor) -> Any:
        return self.answer(z, u)


@pytest.mark.parametrize(
    "answer",
    [
        lambda z, u: z[:, :3],
        lambda z, u: z[:1],
        lambda z, u: (z, z),
        lambda z, u: z.unsqueeze(0),
    ],
)
def test_a_cell_of_another_output_shape(answer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"cell Wrong is a t.* the state is a tensor of .*\(2, 4\)"
    ):
        Equilibrium(Wrong(answer))(rand(2, 4, seed=1))


def test_a_cell_that_returns_its_tensor_in_a_tuple() -> None:
    with pytest.raises(ValueError, match=r"Wrong is a tuple of shape \(2, 4\), .* is a tensor of"):
        Equilibrium(Wrong(lambda z, u: (z,)))(rand(2, 4, seed=1))


def test_a_cell_whose_state_is_not_shaped_like_its_injection() -> None:
    cell = Wrong(lambda z, u: z @ torch.eye(3).double())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        Equilibrium(cell)(rand(2, 4, seed=1))
    assert "cell Wrong, called with a state of shape (2, 4)" in caught.value.__notes__[0]
    assert "initial_state(*injection)" in caught.value.__notes__[0]


def test_a_cell_that_returns_no_tensor() -> None:
    with pytest.raises(TypeError, match="tensor"):
        Equilibrium(Wrong(lambda z, u: None))(rand(2, 4, seed=1))


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(
    "f", [lambda z, u: 0.3 * z.relu_() + u, lambda z, u: torch.tanh(0.3 * z.add_(u))]
)
def test_a_cell_that_changes_its_state_in_place(f: Any, pair: bool) -> None:
    u, z = rand(2, 4, seed=1), rand(2, 4, seed=2)
    z0 = (z, z.clone()) if pair else z
    cell = Elementwise(lambda z, u: (0.3 * z[0] + u, f(z[1], u)) if pair else f(z, u))
    for adjoint in (Implicit(), Unrolled(steps=3)):
        for grad in (False, True):
            layer = Equilibrium(cell, adjoint=adjoint)
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="state in place"):
                layer(u.clone().requires_grad_(grad), z0=z0)
    with torch.inference_mode():
        assert bool(torch.isfinite(Equilibrium(cell)(u, z0=z0)[0]).all())
    fine = Equilibrium(Elementwise(lambda z, u: f(0.3 * z, u)))  # a tensor of its own
    assert bool(torch.isfinite(fine(u)).all())
    meddles = Equilibrium(Elementwise(lambda z, u: torch.tanh(0.3 * z + u.mul_(0.9))))
    with torch.no_grad(), pytest.raises(RuntimeError, match="or what was injected"):
        meddles(u)
    with pytest.raises(RuntimeError, match="or what was injected"):
        optimize_input(meddles, u, lambda z: z.square().sum(1))
