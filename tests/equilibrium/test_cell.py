"""What a cell may return, and what it must leave alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Damped,
    Equilibrium,
    Implicit,
    L2Ball,
    Picard,
    Unrolled,
    optimize_input,
    solve_fixed_point,
)
from tests.cases import NETWORKS, every_network, squared
from tests.helpers import (
    TIGHT,
    Affine,
    Elementwise,
    PairNet,
    TanhCell,
    assert_same,
    gradients,
    rand,
)


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


def test_a_cell_may_look_at_its_state_as_another_shape() -> None:
    model, x, seen = PairNet(), rand(4, 5, seed=1), []

    def flat(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append([part.view(-1) for part in inputs[0]])

    model.equilibrium.cell.register_forward_pre_hook(flat)
    model(x)
    solves = len(seen)
    optimize_input(model, x, squared, constraint=L2Ball(0.5))
    assert len(seen) > solves > 0


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


# Damping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.15, 0.6, 1.3])
@every_network
def test_a_damped_cell_has_the_fixed_points_and_gradients_of_its_cell(
    name: str, damping: float
) -> None:
    model, damped, x = NETWORKS[name](), NETWORKS[name](), rand(4, 5, seed=1)
    for layer in [m for m in damped.modules() if isinstance(m, Equilibrium)]:
        layer.cell = Damped(layer.cell, damping)
        layer.solver = replace(TIGHT, memory=10)
    torch.testing.assert_close(damped(x), model(x), rtol=1e-9, atol=1e-10)
    ours = {k.replace("cell.cell", "cell"): g for k, g in gradients(damped, x).items()}
    assert_same(ours, gradients(model, x), rtol=1e-7)


def test_damping_makes_a_repelling_fixed_point_attract() -> None:
    """Eigenvalues −3, −1.5 and ±2i: plain iteration runs away, 0.3 times its step does not."""
    a = torch.block_diag(
        torch.diag(torch.tensor([-3.0, -1.5])), torch.tensor([[0.0, -2.0], [2.0, 0.0]])
    ).double()
    u, plain = rand(3, 4, seed=1), Picard(max_iter=300, tol=1e-10)
    exact = torch.linalg.solve(torch.eye(4).double() - a, u.T).T
    cells = Affine(a), Damped(Affine(a), 0.3)
    found = [solve_fixed_point(lambda z, f=f: f(z, u), torch.zeros_like(u), plain) for f in cells]
    assert not bool(found[0].converged.any())
    assert bool(found[1].converged.all())
    torch.testing.assert_close(found[1].z, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, -0.1, math.nan, math.inf])
def test_bad_damping(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be above 0 and finite, got"):
        Damped(TanhCell(3, 0.5, seed=1), damping)


def test_damping_refuses_what_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"of the cell Wrong is a tensor of shape \(1, 4\)"):
        Equilibrium(Damped(Wrong(lambda z, u: z[:1]), 0.5))(rand(2, 4, seed=1))
    with pytest.raises(TypeError, match=r"cell must be an nn\.Module, got function"):
        Damped(lambda z: z, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_a_cell_that_returns_other_numbers(dtype: torch.dtype) -> None:
    class Rounded(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return (0.5 * z + u).to(dtype)

    model, x = nn.Sequential(Equilibrium(Rounded())), rand(2, 5, seed=1)
    words = f"output of the cell Rounded is {dtype}, but a state holds real floating-point"
    with pytest.raises(TypeError, match=words):
        model(x)
    with pytest.raises(TypeError, match=words):
        optimize_input(model, x, squared)
