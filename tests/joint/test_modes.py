"""What layers do while a mode is on, and that each gives way to the one before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Implicit, JacobianFree, Joint, L2Ball, Picard, Unrolled, optimize_input
from jiio_plugins.evaluation import layers_as
from tests.cases import squared
from tests.helpers import TIGHT, Net, PairNet, Series, input_gradient, rand


@pytest.mark.parametrize("kind", [Net, PairNet, Series])
def test_a_layer_set_from_outside_is_one_built_so(kind: type[nn.Module]) -> None:
    x = rand(3, 5, seed=1)
    for adjoint in (Unrolled(steps=4), JacobianFree(), Implicit()):
        solver = Picard(max_iter=3, tol=0.0)
        net, built = kind(), kind(solver=solver, adjoint=adjoint)
        with layers_as(solver=solver, adjoint=adjoint):
            inside = input_gradient(net, x)
        torch.testing.assert_close(inside, input_gradient(built, x))
        torch.testing.assert_close(input_gradient(net, x), input_gradient(kind(), x))


def test_what_is_not_told_stays_the_layers_own() -> None:
    net, x = Net(solver=Picard(max_iter=2, tol=0.0), adjoint=JacobianFree()), rand(3, 5, seed=1)
    with layers_as():
        inside = input_gradient(net, x)
    torch.testing.assert_close(inside, input_gradient(net, x))


def test_layers_are_their_own_again_after_an_exception() -> None:
    net, x = Net(), rand(3, 5, seed=1)
    before, solver, adjoint = net(x), net.equilibrium.solver, net.equilibrium.adjoint

    def fails() -> None:
        with layers_as(adjoint=Unrolled(steps=1)):
            assert not torch.allclose(net(x), before)
            with layers_as(solver=TIGHT):
                torch.testing.assert_close(net(x), before)
            assert not torch.allclose(net(x), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    torch.testing.assert_close(net(x), before)
    assert net.equilibrium.solver is solver
    assert net.equilibrium.adjoint is adjoint


def test_an_optimisation_inside_the_objective() -> None:
    """The inner one has a mode of its own and gives the outer one its back."""
    outer, inner, x = Net(seed=1), Net(seed=2), rand(2, 5, seed=1)
    reference = optimize_input(outer, x, squared, method=Joint(max_iter=5), constraint=L2Ball(0.5))

    def objective(y: Tensor) -> Tensor:
        optimize_input(inner, x, squared, method=Joint(max_iter=2), constraint=L2Ball(0.1))
        return squared(y)

    got = optimize_input(outer, x, objective, method=Joint(max_iter=5), constraint=L2Ball(0.5))
    assert torch.equal(got.x, reference.x)


def test_layers_called_by_the_input_raise() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = Net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.net(x)
            return y + self.net(x) if self.calls % 2 == 0 else y

    with pytest.raises(RuntimeError, match="must not depend on the input"):
        optimize_input(Moody(), rand(2, 5, seed=1), squared)
