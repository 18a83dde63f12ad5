"""The layer: its solve, its gradients by three routes, and what surrounds a layer in practice."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jiio_plugins import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    JacobianFree,
    L2Ball,
    Phantom,
    Picard,
    Unrolled,
    count_evaluations,
    jacobian_penalty,
    optimize_input,
)
from tests.helpers import (
    TIGHT,
    Affine,
    Context,
    Elementwise,
    Net,
    PairCell,
    PairNet,
    Series,
    Spy,
    TanhCell,
    contraction,
    linear,
    plain_solve,
    rand,
)

NETWORKS: dict[str, Any] = {
    "tensor": Net,
    "tuple": PairNet,
    "series": Series,
    "skip": lambda **kwargs: Net(skip=True, **kwargs),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a scalar of the output, for the input and every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = rand(*y.shape, seed=77)
    loss = (weights * y).sum() + y.square().sum()
    names = ["input", *(n for n, _ in model.named_parameters())]
    values = torch.autograd.grad(loss, [x, *model.parameters()])
    return dict(zip(names, values, strict=True))


def scalar(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        return float((rand(*y.shape, seed=77) * y).sum() + y.square().sum())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        gap = (value - second[name]).norm() / second[name].norm()
        assert float(gap) <= rtol, f"{name}: {float(gap):.2e}"


# Gradients --------------------------------------------------------------------------------------


@every_network
def test_implicit_agrees_with_unrolled(name: str) -> None:
    x = rand(4, 5, seed=1)
    implicit = gradients(NETWORKS[name](adjoint=Implicit()), x)
    unrolled = gradients(NETWORKS[name](adjoint=Unrolled(steps=300)), x)
    assert_same(implicit, unrolled, rtol=1e-6)


@every_network
def test_implicit_agrees_with_finite_differences(name: str) -> None:
    model, x = NETWORKS[name](), rand(2, 5, seed=1)
    exact = gradients(model, x)
    h = 1e-4  # central differences of fourth order: the error is about h⁴
    stencil = ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0))
    for where, tensor in [("input", x), *model.named_parameters()]:
        direction = rand(*tensor.shape, seed=5)
        with torch.no_grad():
            base, total = tensor.clone(), 0.0
            for k, weight in stencil:
                tensor.copy_(base + k * h * direction)
                total += weight * scalar(model, x)
            tensor.copy_(base)
        difference = total / (12 * h)
        assert difference == pytest.approx(float((exact[where] * direction).sum()), rel=1e-6), where


@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden])
def test_any_solver_serves_the_adjoint(kind: Any) -> None:
    solver, x = kind(max_iter=500, tol=1e-13), rand(4, 5, seed=1)
    exact = gradients(Net(adjoint=Unrolled(steps=300)), x)
    assert_same(gradients(Net(adjoint=Implicit(solver=solver)), x), exact, rtol=1e-6)
    assert_same(gradients(Net(solver=solver), x), exact, rtol=1e-6)


def test_a_loose_adjoint_solver_gives_a_loose_gradient() -> None:
    """The tolerance of the adjoint solve is the gradient's: it is not solved in some other way."""
    x = rand(4, 5, seed=1)
    exact = gradients(Net(adjoint=Unrolled(steps=300)), x)
    loose = gradients(Net(adjoint=Implicit(solver=Picard(max_iter=3))), x)
    with pytest.raises(AssertionError):
        assert_same(loose, exact, rtol=1e-6)


@every_network
@pytest.mark.parametrize("adjoint", [Phantom(), Phantom(steps=2, damping=0.8), JacobianFree()])
def test_cheap_gradients_point_the_right_way(name: str, adjoint: Any) -> None:
    x = rand(4, 5, seed=1)
    exact = gradients(NETWORKS[name](), x)
    cheap = gradients(NETWORKS[name](adjoint=adjoint), x)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, cheap)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.7
    inside = torch.cosine_similarity(exact["input"].flatten(), cheap["input"].flatten(), dim=0)
    assert 0.3 < float(inside) < 1 - 1e-9  # an approximation, not the exact one


def test_jacobian_free_is_its_formula() -> None:
    """``(∂f/∂u)ᵀ g`` at the fixed point, nothing else."""
    cell, u = TanhCell(6, 0.8, seed=1), rand(3, 6, seed=2).requires_grad_()
    z = Equilibrium(cell, solver=TIGHT, adjoint=JacobianFree())(u)
    g = rand(3, 6, seed=3)
    got = torch.autograd.grad(z, [u, cell.weight], g)

    fixed = plain_solve(cell, u.detach())
    slope = 1 - fixed.square()  # of tanh
    torch.testing.assert_close(got[0], slope * g, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[1], (slope * g).T @ fixed, rtol=1e-9, atol=1e-12)


def test_phantom_is_its_formula() -> None:
    """Gradient through k damped steps from the fixed point, which is held constant."""
    cell, u = TanhCell(6, 0.8, seed=1), rand(3, 6, seed=2).requires_grad_()
    g = rand(3, 6, seed=3)
    layer = Equilibrium(cell, solver=TIGHT, adjoint=Phantom(steps=3, damping=0.6))
    got = torch.autograd.grad(layer(u), [u, cell.weight], g)
    z = plain_solve(cell, u.detach()).detach()
    for _ in range(3):
        z = 0.4 * z + 0.6 * cell(z, u)
    expected = torch.autograd.grad(z, [u, cell.weight], g)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_phantom_tends_to_the_exact_gradient() -> None:
    x = rand(4, 5, seed=1)
    exact = gradients(Net(), x)
    assert_same(gradients(Net(adjoint=Phantom(steps=200, damping=0.7)), x), exact, rtol=1e-6)


def test_unrolled_needs_no_solver() -> None:
    net = Net(adjoint=Unrolled(steps=300, damping=0.8), solver=Picard(max_iter=1))
    x = rand(2, 5, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(net(x), Net()(x), rtol=1e-9, atol=1e-9)


def test_a_second_derivative_raises() -> None:
    """Also where the adjoint's right-hand side does not depend on x."""
    for loss in (torch.sum, torch.linalg.norm):
        x = rand(2, 5, seed=1).requires_grad_()
        with pytest.raises(RuntimeError, match=r"first derivatives only.*Unrolled"):
            torch.autograd.grad(loss(Net()(x)), x, create_graph=True)


def test_a_second_derivative_through_the_unrolled_solve_works() -> None:
    net = Net(adjoint=Unrolled(steps=60), n=4, rate=0.5)
    assert torch.autograd.gradgradcheck(net, rand(1, 5, seed=1).requires_grad_())


def test_backward_twice_raises_unless_the_graph_is_kept() -> None:
    x = rand(2, 5, seed=1).requires_grad_()
    y = Net()(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_the_graph_dies_with_the_output() -> None:
    """No reference cycle keeps a solve's tensors alive until the garbage collector comes."""
    x = rand(2, 5, seed=1).requires_grad_()
    net = Net()
    seen: list[weakref.ref[Tensor]] = []
    net.equilibrium.cell.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    gc.disable()
    try:
        y = net(x)
        y.sum().backward()
        del y
        assert [ref for ref in seen if ref() is not None] == []
    finally:
        gc.enable()


def test_only_what_needs_a_gradient_gets_one() -> None:
    net, x = Net(), rand(2, 5, seed=1)
    net.requires_grad_(False)
    net.equilibrium.cell.weight.requires_grad_(True)
    net(x).sum().backward()
    assert net.encoder.weight.grad is None
    assert net.head.weight.grad is None
    assert float(net.equilibrium.cell.weight.grad.norm()) > 0


def test_a_state_the_cell_ignores() -> None:
    """A cell that is constant in z has the identity for an adjoint."""
    u = rand(2, 3, seed=1).requires_grad_()

    class Constant(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return u.square()

    z = Equilibrium(Constant())(u)
    torch.testing.assert_close(z, u.square())
    (grad,) = torch.autograd.grad(z.sum(), u)
    torch.testing.assert_close(grad, 2 * u)


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


class MixedCell(nn.Module):
    """A cell that multiplies its injection too: in half precision that needs autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear(8, 8, seed=1).float(), linear(8, 8, seed=2).float()
        with torch.no_grad():
            self.inner.weight.mul_(0.4)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(u))


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom()])
def test_autocast(adjoint: Any) -> None:
    """Rows of different difficulty, so that the adjoint solve evaluates the cell for some again."""

    def run(half: bool) -> tuple[Tensor, Tensor]:
        net = Net(solver=Anderson(tol=1e-2), adjoint=adjoint).float()
        net.equilibrium.cell = MixedCell()
        x = (rand(8, 5, seed=1) * torch.logspace(-2, 1, 8)[:, None]).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = net(x)
            loss = y.float().square().sum()
        loss.backward()
        return y.float(), x.grad

    (y, grad), (y_full, grad_full) = run(True), run(False)
    torch.testing.assert_close(y, y_full, rtol=0.1, atol=0.1)
    assert float(torch.cosine_similarity(grad.flatten(), grad_full.flatten(), dim=0)) > 0.98


# Counting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Phantom(steps=4), JacobianFree(), Unrolled(steps=7)]
)
def test_counted_evaluations_are_those_that_happened(adjoint: Any) -> None:
    net = Net(adjoint=adjoint)
    net.equilibrium.cell = spy = Spy(net.equilibrium.cell)
    x = rand(1, 5, seed=1).requires_grad_()
    with count_evaluations() as counter:
        y = net(x)
        forward = spy.total
        assert counter.f_evals == forward
        assert counter.vjps == 0
        y.sum().backward()
    assert counter.f_evals == spy.total == forward  # one row is never compacted
    if isinstance(adjoint, Implicit):
        assert counter.vjps > 1
    else:
        assert counter.vjps == getattr(adjoint, "steps", 1)  # one for each step with a graph


def test_counted_vjps_are_those_that_happened() -> None:
    products = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return g

    class Cell(TanhCell):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return Counted.apply(super().forward(z, u))

    u = rand(1, 6, seed=2).requires_grad_()
    with count_evaluations() as counter:
        Equilibrium(Cell(6, 0.9, seed=1), solver=TIGHT)(u).sum().backward()
    assert counter.vjps == products


def test_counts_are_sums_over_rows_and_nest() -> None:
    net, x = Net(solver=Anderson(tol=1e-8)), rand(6, 5, seed=1)
    with torch.no_grad(), count_evaluations() as outer:
        with count_evaluations() as inner:
            net(x)
        each = []
        for row in x:
            with count_evaluations() as one:
                net(row[None])
            each.append(one.f_evals)
    assert inner.f_evals == sum(each)
    assert outer.f_evals == 2 * inner.f_evals
    assert len(set(each)) > 1
    assert 0 < inner.worst_residual <= 1e-8


def test_worst_residual_tells_an_unfinished_solve() -> None:
    net = Net(solver=Anderson(max_iter=3, tol=1e-12))
    with torch.no_grad(), count_evaluations() as counter:
        net(rand(6, 5, seed=1))
    assert counter.f_evals == 18
    assert counter.worst_residual > 1e-6


def test_converged_rows_cost_no_vjp_of_the_adjoint_solve() -> None:
    """Rows of different difficulty: the adjoint solve of each stops by itself."""
    rates = torch.tensor([0.05, 0.2, 0.5, 0.9]).double()
    decay = torch.tensor([1.0, 0.9, -0.5, 0.3]).double()

    class Cell(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return u[:, :1] * decay * z + u[:, 1:]

    def cost(rows: Tensor) -> float:
        u = torch.cat([rows[:, None], rand(4, 4, seed=3)[: len(rows)]], dim=1)
        layer = Equilibrium(Cell(), solver=Picard(max_iter=500, tol=1e-10))
        with count_evaluations() as counter:
            z0 = torch.zeros(len(u), 4, dtype=torch.float64)
            u = u.requires_grad_()
            layer(u, z0=z0).sum().backward()
        return counter.vjps

    together = cost(rates)
    assert together < 4 * cost(rates[3:])
    assert together == pytest.approx(sum(math.ceil(cost(r[None])) for r in rates), rel=0.1)


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


# Misuse -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Phantom(steps=0), "steps must be at least 1, got 0"),
        (lambda: Phantom(damping=0.0), "damping must be above 0 and at most 1"),
        (lambda: Unrolled(steps=0), "steps must be at least 1, got 0"),
        (lambda: Unrolled(damping=1.5), "damping must be above 0 and at most 1"),
    ],
)
def test_wrong_arguments_of_the_gradients(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# Around the layer: compile, checkpoint, data parallelism ------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compile_breaks_the_graph_at_the_layer() -> None:
    torch._dynamo.reset()
    net, x = Net(), rand(2, 5, seed=1)
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-9, atol=1e-9)
    assert_same(
        {"input": input_gradient(compiled, x)}, {"input": input_gradient(net, x)}, rtol=1e-9
    )
    plain = optimize_input(net, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
    fast = optimize_input(compiled, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.value, plain.value, rtol=1e-9, atol=1e-9)


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


def test_compile_with_fullgraph_raises() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Net(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"data-dependent loop|torch\.compiler\.disable"):
        compiled(rand(2, 5, seed=1))


class Checkpointed(nn.Module):
    """:class:`Net` with activation checkpointing around one of its parts."""

    def __init__(self, part: str, reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.part, self.reentrant = Net(), part, reentrant

    def _call(self, part: str, *args: Tensor) -> Tensor:
        module = getattr(self.net, part)
        if part != self.part:
            return module(*args)
        return checkpoint(module, *args, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        u = self._call("encoder", x)
        return self._call("head", self._call("equilibrium", u))


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_checkpointing_encoder_or_head_works(part: str) -> None:
    x = rand(3, 5, seed=1)
    wrapped, plain = Checkpointed(part), Net()
    assert_same(
        {"input": input_gradient(wrapped, x)}, {"input": input_gradient(plain, x)}, rtol=1e-9
    )
    one = optimize_input(wrapped, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    two = optimize_input(plain, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    torch.testing.assert_close(one.x, two.x, rtol=1e-9, atol=1e-9)


def test_checkpointing_the_layer_raises_in_joint_mode() -> None:
    x = rand(3, 5, seed=1)
    wrapped = Checkpointed("equilibrium")
    plain = input_gradient(Net(), x)
    torch.testing.assert_close(input_gradient(wrapped, x), plain, rtol=1e-8, atol=1e-10)
    with pytest.raises(RuntimeError, match="activation checkpointing must not wrap the layer"):
        optimize_input(wrapped, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    # and the next optimisation is none the worse for it
    optimize_input(Net(), x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # from the solves
@pytest.mark.parametrize("part", ["encoder", "equilibrium", "head"])
def test_reentrant_checkpointing_is_refused_by_autograd(part: str) -> None:
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimize_input(Checkpointed(part, reentrant=True), rand(3, 5, seed=1), lambda y: y.sum(1))


def test_checkpointing_inside_the_cell_works() -> None:
    class Cell(TanhCell):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return checkpoint(super().forward, z, u, use_reentrant=False)

    net, x = Net(), rand(3, 5, seed=1)
    expected = input_gradient(net, x)
    plain = optimize_input(net, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    net.equilibrium.cell = Cell(8, 0.7, seed=2)
    torch.testing.assert_close(input_gradient(net, x), expected, rtol=1e-8, atol=1e-10)
    again = optimize_input(net, x, lambda y: y.square().sum(1), constraint=L2Ball(0.5))
    torch.testing.assert_close(again.x, plain.x, rtol=1e-9, atol=1e-9)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/sync", rank=0, world_size=1)
    try:
        net, x = Net(), rand(3, 5, seed=1)
        expected = gradients(net, x)
        wrapped = nn.parallel.DistributedDataParallel(net)
        y = wrapped(x)
        ((rand(*y.shape, seed=77) * y).sum() + y.square().sum()).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)
        got = optimize_input(wrapped, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
        plain = optimize_input(net, x, lambda y: y.sum(1), constraint=L2Ball(0.5))
        assert torch.equal(got.x, plain.x)
    finally:
        dist.destroy_process_group()


def test_data_parallel_raises() -> None:
    with pytest.raises(TypeError, match=r"DataParallel.*pass model\.module"):
        optimize_input(nn.DataParallel(Net()), rand(2, 5, seed=1), lambda y: y.sum(1))


# The penalty ------------------------------------------------------------------------------------


def exact_frobenius(cell: nn.Module, z: Tensor, u: Tensor) -> Tensor:
    """``‖J_z‖²_F / n``, averaged over rows."""
    total = z.new_zeros(())
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(
            lambda state, i=i: cell(state[None], u[i : i + 1])[0], z[i], create_graph=True
        )
        total = total + jacobian.square().sum()
    return total / z.numel()


def test_jacobian_penalty_estimates_the_frobenius_norm() -> None:
    cell, u = TanhCell(6, 0.8, seed=1), rand(5, 6, seed=2)
    z = plain_solve(cell, u).detach()
    generator = torch.Generator().manual_seed(0)
    estimate = jacobian_penalty(cell, z, u, probes=4000, generator=generator)
    exact = exact_frobenius(cell, z, u)
    # the standard error of 4000 probes over 5 rows is below 1 %
    torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0)
    (slope,) = torch.autograd.grad(estimate, cell.weight)
    (exact_slope,) = torch.autograd.grad(exact, cell.weight)
    assert float((slope - exact_slope).norm() / exact_slope.norm()) < 0.05


def test_jacobian_penalty_on_tuples_and_its_randomness() -> None:
    cell, u = PairCell(seed=1), rand(3, 7, seed=2)
    z = tuple(t.detach() for t in plain_solve(cell, u))
    first = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(1))
    second = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(1))
    other = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(2))
    assert first.item() == second.item() != other.item()
    with torch.no_grad():
        quiet = jacobian_penalty(cell, z, u, generator=torch.Generator().manual_seed(1))
    assert quiet.item() == first.item()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        jacobian_penalty(cell, z, u, probes=0)


def test_parameters_of_the_injection_get_gradients_through_context() -> None:
    """A parameter broadcast over rows before the layer."""
    model, x = Context(), rand(4, 4, seed=1)
    (got,) = torch.autograd.grad(model(x)[:, :3].square().sum(), model.context)
    u = model.encoder(x) + model.context
    y = model.head(plain_solve(model.equilibrium.cell, u))
    (expected,) = torch.autograd.grad(y.square().sum(), model.context)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_linear_equilibrium_has_the_closed_form_gradient() -> None:
    a, u = contraction(5, 0.9, symmetric=False, seed=1), rand(2, 5, seed=2).requires_grad_()
    z = Equilibrium(Affine(a), solver=TIGHT)(u)
    g = rand(2, 5, seed=3)
    (grad,) = torch.autograd.grad(z, u, g)
    expected = torch.linalg.solve((torch.eye(5, dtype=a.dtype) - a).T, g.T).T
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    assert linear(5, 2, seed=1).weight.dtype == torch.float64


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
