"""Gradients of the layer by three routes: implicit, unrolled, finite differences."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    Equilibrium,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Unrolled,
    count_evaluations,
)
from tests.cases import NETWORKS, every_network
from tests.helpers import (
    TIGHT,
    Affine,
    Context,
    Cut,
    Net,
    TanhCell,
    assert_same,
    contraction,
    gradients,
    linear,
    plain_solve,
    rand,
)

# The exact gradient -----------------------------------------------------------------------------


def scalar(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        return float((rand(*y.shape, seed=77) * y).sum() + y.square().sum())


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


@pytest.mark.filterwarnings("ignore:the adjoint of an equilibrium layer has not settled")
def test_a_loose_adjoint_solver_gives_a_loose_gradient() -> None:
    """The tolerance of the adjoint solve is the gradient's: it is not solved in some other way."""
    x = rand(4, 5, seed=1)
    exact = gradients(Net(adjoint=Unrolled(steps=300)), x)
    loose = gradients(Net(adjoint=Implicit(solver=Picard(max_iter=3))), x)
    with pytest.raises(AssertionError):
        assert_same(loose, exact, rtol=1e-6)


def test_linear_equilibrium_has_the_closed_form_gradient() -> None:
    a, u = contraction(5, 0.9, symmetric=False, seed=1), rand(2, 5, seed=2).requires_grad_()
    z = Equilibrium(Affine(a), solver=TIGHT)(u)
    g = rand(2, 5, seed=3)
    (grad,) = torch.autograd.grad(z, u, g)
    expected = torch.linalg.solve((torch.eye(5, dtype=a.dtype) - a).T, g.T).T
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    assert linear(5, 2, seed=1).weight.dtype == torch.float64


def test_parameters_of_the_injection_get_gradients_through_context() -> None:
    """A parameter broadcast over rows before the layer."""
    model, x = Context(), rand(4, 4, seed=1)
    (got,) = torch.autograd.grad(model(x)[:, :3].square().sum(), model.context)
    u = model.encoder(x) + model.context
    y = model.head(plain_solve(model.equilibrium.cell, u))
    (expected,) = torch.autograd.grad(y.square().sum(), model.context)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


# Cheaper ones -----------------------------------------------------------------------------------


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


# In autograd ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), JacobianFree(), Unrolled()])
def test_what_follows_may_send_no_gradient_back(adjoint: Any) -> None:
    net = Net(adjoint=adjoint)
    u = net.encoder(rand(3, 5, seed=1))
    with count_evaluations() as cut:
        Cut.apply(net.equilibrium(u)).sum().backward(retain_graph=True)
    assert not any(bool(p.grad.any()) for p in net.parameters() if p.grad is not None)
    if not isinstance(adjoint, Implicit):  # which learns of it too late
        assert cut.vjps == 0
    z = net.equilibrium(u)
    (one,) = torch.autograd.grad(z.sum(), net.equilibrium.cell.weight, retain_graph=True)
    (both,) = torch.autograd.grad((z + Cut.apply(z)).sum(), net.equilibrium.cell.weight)
    assert torch.equal(one, both)


def test_gradcheck_of_an_unrolled_layer() -> None:
    """It sends undefined gradients back, too."""
    layer = Equilibrium(TanhCell(3, 0.5, seed=1), adjoint=Unrolled(steps=4))
    assert torch.autograd.gradcheck(layer, rand(2, 3, seed=2).requires_grad_())


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


# An adjoint that has not settled ----------------------------------------------------------------


def turning(rate: float) -> tuple[Affine, Tensor]:
    """A slow contraction, ``rate`` times an orthogonal matrix, and its injection."""
    q = torch.linalg.qr(rand(64, 64, seed=1)).Q
    return Affine(rate * q), rand(6, 64, seed=2).requires_grad_()


def error_of_gradient(cell: Affine, u: Tensor, **settings: Any) -> float:
    """Relative, against the closed form ``(I − Aᵀ)⁻¹ g``."""
    weights = rand(*u.shape, seed=3)
    z = Equilibrium(cell, **settings)(u)
    found = torch.autograd.grad((weights * z).sum(), u)[0]
    exact = torch.linalg.solve(torch.eye(64).double() - cell.a.T, weights.T).T
    return float((found - exact).norm() / exact.norm())


def test_an_unsettled_adjoint_is_counted_and_warned_of() -> None:
    cell, u = turning(0.995)
    text = r"not settled in up to 100% of the rows: .* up to 1e-01, asked for was 1e-04.*max_iter"
    with count_evaluations() as counter, pytest.warns(ConvergenceWarning, match=text):
        assert error_of_gradient(cell, u, solver=Anderson(memory=5)) > 0.5
    assert 1e-2 < counter.worst_adjoint_residual < 1e-1
    remedy = Implicit(solver=Anderson(max_iter=500, memory=70, tol=1e-8))
    with count_evaluations() as counter:
        assert error_of_gradient(cell, u, adjoint=remedy) < 1e-5
    assert 0 < counter.worst_adjoint_residual <= 1e-8


def test_an_adjoint_that_is_loose_on_purpose_is_not_warned_of() -> None:
    cell, u = turning(0.9)
    with count_evaluations() as counter:
        error_of_gradient(cell, u)  # near its tolerance
        error_of_gradient(cell, u, adjoint=Implicit(solver=Anderson(max_iter=15, tol=0.05)))
    assert 1e-2 < counter.worst_adjoint_residual < 0.5


def test_nan_in_a_gradient_is_warned_of() -> None:
    cell, u = turning(0.5)
    z = Equilibrium(cell)(u)
    with pytest.warns(ConvergenceWarning, match="relative residual is NaN"):
        z.backward(torch.full_like(z, torch.nan))


def test_the_warning_of_an_adjoint_has_few_texts() -> None:
    """Python shows a text once, and a training must not show a line for every step."""
    cell, _ = turning(0.995)
    texts = set()
    for seed in range(20):
        u = rand(5, 64, seed=seed).requires_grad_()
        loss = Equilibrium(cell, solver=Anderson(memory=5))(u).square().sum()
        with pytest.warns(ConvergenceWarning) as seen:
            loss.backward()
        texts |= {str(w.message) for w in seen}
    assert len(texts) == 1
