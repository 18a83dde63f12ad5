"""The layer: its solve, what it takes, and the module around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Equilibrium, L2Ball, optimize_input
from tests.cases import NETWORKS
from tests.helpers import TIGHT, Net, PairCell, Spy, TanhCell, gradients, linear, plain_solve, rand

# The solve --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [TanhCell(7, 0.8, seed=3), PairCell(seed=3)])
def test_the_answer_is_the_fixed_point(cell: nn.Module) -> None:
    u = rand(3, 7, seed=4)
    z = Equilibrium(cell, solver=TIGHT)(u)
    expected = plain_solve(cell, u)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-12)
    assert isinstance(z, tuple) == isinstance(expected, tuple)


def test_images_as_state() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.mul_(0.2)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(self.conv(z) + u)

    u = rand(3, 2, 5, 4, seed=1)
    cell = Cell()
    z = Equilibrium(cell, solver=TIGHT)(u)
    assert z.shape == u.shape
    torch.testing.assert_close(z, plain_solve(cell, u), rtol=1e-10, atol=1e-12)


def test_several_injections_of_different_kinds() -> None:
    class Cell(nn.Module):
        def forward(self, z: Tensor, u: Tensor, scale: float, extra: Tensor | None) -> Tensor:
            assert extra is None
            return torch.tanh(scale * z + u)

    u = rand(3, 4, seed=1)
    z = Equilibrium(Cell(), solver=TIGHT)(u, 0.5, None)
    torch.testing.assert_close(torch.tanh(0.5 * z + u), z, rtol=1e-10, atol=1e-12)


def test_z0_is_where_the_solve_starts() -> None:
    spy = Spy(TanhCell(5, 0.9, seed=1))
    u = rand(2, 5, seed=2)
    layer = Equilibrium(spy, solver=Anderson(tol=1e-9))
    with torch.no_grad():
        cold = layer(u)
        needed = len(spy.rows)
        start = cold + 1e-6
        spy.calls.clear()
        warm = layer(u, z0=start)
    assert torch.equal(spy.calls[0][0], start)
    assert len(spy.calls) <= needed - 3
    torch.testing.assert_close(warm, cold, rtol=1e-7, atol=1e-7)


def test_initial_state_comes_from_the_cell() -> None:
    class Cell(TanhCell):
        def initial_state(self, u: Tensor) -> Tensor:
            return torch.full_like(u, 0.25)

    cell = Cell(4, 0.5, seed=1)
    spy = Spy(cell)
    u = rand(2, 4, seed=2)
    Equilibrium(spy)(u)
    assert torch.equal(spy.calls[0][0], torch.full_like(u, 0.25))
    plain = Equilibrium(Spy(TanhCell(4, 0.5, seed=1)))
    plain(u)
    assert not bool(plain.cell.calls[0][0].any())  # a cell without one: zeros


def test_without_grad_there_is_no_graph() -> None:
    net, x = Net(), rand(2, 5, seed=1)
    with torch.no_grad():
        quiet = net(x)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, net(x).detach(), rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), quiet)


def test_a_row_does_not_see_its_neighbours() -> None:
    net, x = Net(solver=Anderson(tol=1e-12, max_iter=100)), rand(16, 5, seed=1)
    x[3] *= 30  # a hard neighbour
    together = gradients(net, x)["input"]
    y = net(x)
    for i in (0, 3, 9):
        torch.testing.assert_close(net(x[i : i + 1]), y[i : i + 1], rtol=1e-9, atol=1e-9)
        alone = gradients_of_row(net, x, i)
        torch.testing.assert_close(alone, together[i], rtol=1e-8, atol=1e-8)


def gradients_of_row(net: nn.Module, x: Tensor, i: int) -> Tensor:
    row = x[i : i + 1].clone().requires_grad_()
    y = net(row)
    weights = rand(len(x), y.shape[1], seed=77)[i : i + 1]
    (grad,) = torch.autograd.grad((weights * y).sum() + y.square().sum(), row)
    return grad[0]


def test_an_empty_batch() -> None:
    for name in NETWORKS:
        net = NETWORKS[name]()
        x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
        y = net(x)
        assert y.shape == (0, 3)
        y.sum().backward()
        assert x.grad.shape == (0, 5)


def test_float32_keeps_its_type() -> None:
    net = Net(solver=Anderson(tol=1e-5)).float()
    x = rand(2, 5, seed=1).float().requires_grad_()
    y = net(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), Net()(x.double()), rtol=1e-3, atol=1e-3)


# Inputs that are not by row ---------------------------------------------------------------------


class Shared(nn.Module):
    """A factor for all rows, and a pair of injections."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear(4, 4, seed=1)

    def initial_state(self, parts: tuple[Tensor, Tensor], factor: Tensor) -> Tensor:
        return torch.zeros_like(parts[0])

    def forward(self, z: Tensor, parts: tuple[Tensor, Tensor], factor: Tensor) -> Tensor:
        return torch.tanh(0.9 * self.inner(z) + factor * parts[0] + parts[1])


@pytest.mark.parametrize("factor", [torch.tensor(0.5), 0.5 * torch.ones(1, 4)])
def test_rows_that_converge_early_share_what_is_for_all_rows(factor: Tensor) -> None:
    layer = Equilibrium(Shared(), solver=Anderson(max_iter=200, tol=1e-10))
    u = torch.cat([10 * rand(3, 4, seed=2), 0.1 * rand(3, 4, seed=3)])
    together = layer((u, u), factor.double())
    alone = [layer((row, row), factor.double()) for row in u.split(1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-8, atol=1e-9)


def test_an_input_that_is_not_batch_first_is_an_error() -> None:
    layer, u = Equilibrium(Shared()), rand(3, 4, seed=2)
    with pytest.raises(ValueError, match=r"has 3 rows, an input has shape \(4,\)\. What all rows"):
        layer((u, u), torch.ones(4).double())


# The module -------------------------------------------------------------------------------------


def test_state_dict_holds_the_cell_and_nothing_else() -> None:
    net, x = Net(), rand(2, 5, seed=1)
    names = {"equilibrium.cell.weight"} | {
        f"{part}.{kind}" for part in ("encoder", "head") for kind in ("weight", "bias")
    }
    assert set(net.state_dict()) == names
    net(x).sum().backward()
    optimize_input(net, x, lambda y: y.sum(1), constraint=L2Ball(0.1))
    assert set(net.state_dict()) == names
    assert set(vars(net.equilibrium)) == set(vars(Net().equilibrium))


def test_deep_copies_are_independent() -> None:
    net, x = Net(), rand(2, 5, seed=1)
    before = net(x).detach()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.equilibrium.cell.weight.mul_(0.5)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    assert not torch.allclose(twin(x), before)
    assert twin.equilibrium.solver == net.equilibrium.solver


def test_pickling(tmp_path: Any) -> None:
    net, x = Net(), rand(2, 5, seed=1)
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded(x), net(x))


def test_repr_names_solver_and_gradient() -> None:
    assert "solver=Anderson(" in repr(Net().equilibrium)
    assert "adjoint=Implicit(" in repr(Net().equilibrium)


def test_several_calls_of_one_layer() -> None:
    layer = Equilibrium(TanhCell(4, 0.7, seed=1), solver=TIGHT)
    u = rand(2, 4, seed=2).requires_grad_()
    (grad,) = torch.autograd.grad(layer(layer(u)).sum(), u)
    cell = layer.cell
    (expected,) = torch.autograd.grad(plain_solve(cell, plain_solve(cell, u)).sum(), u)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


def test_wrong_arguments_of_the_layer() -> None:
    cell = TanhCell(4, 0.5, seed=1)
    with pytest.raises(TypeError, match=r"cell must be an nn\.Module, got function"):
        Equilibrium(lambda z, u: z)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"solver must be Anderson\(\.\.\.\)"):
        Equilibrium(cell, solver="anderson")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"adjoint must be Implicit\(\.\.\.\)"):
        Equilibrium(cell, adjoint="implicit")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least one injected tensor"):
        Equilibrium(cell)()
    with pytest.raises(TypeError, match="floating point"):
        Equilibrium(cell)(torch.zeros(2, 4, dtype=torch.long))
