"""``optimize_input``: right answers, honest values, no side effects, clear errors."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Box,
    Broyden,
    Equilibrium,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    Picard,
    Solution,
    Status,
    Unrolled,
    count_evaluations,
    joint_solution,
    optimize_input,
)
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from tests.helpers import (
    Context,
    Elementwise,
    LinearNet,
    Net,
    PairNet,
    Series,
    Spy,
    TanhCell,
    independent_output,
    linear,
    rand,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NETWORKS: dict[str, Any] = {
    "tensor": Net,
    "tuple": PairNet,
    "series": Series,
    "skip": lambda **kwargs: Net(skip=True, **kwargs),
}
METHODS = {
    "joint": Joint(),
    "paper": Joint(state_steps=1, adjoint_warmup=0, relaxation=1.0),
    "nested": Nested(solver=Anderson(tol=1e-4)),
    "warm": Nested(solver=Anderson(tol=1e-2), warm_start=True),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def squared(y: Tensor) -> Tensor:
    return y.square().sum(1)


def statuses(solution: Solution) -> set[Status]:
    return {Status(int(s)) for s in solution.status}


# The adjoint ------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("answer_fz", [False, True])
def test_the_adjoint_alone(name: str, answer_fz: bool) -> None:
    model, x = NETWORKS[name](), rand(4, 5, seed=1)
    problem = Problem(Variable(model, x), squared)
    z = problem.warm_up(x, 2)
    mu = rand(*z.shape, seed=2)
    lin = problem.linearize(x, z, answer_fz=answer_fz)
    alone = lin.jz_mu(mu)
    assert torch.equal(alone, lin.vjp(mu)[0])
    assert float(alone.abs().max()) > 0


def test_its_warmup_is_a_second_step_at_the_same_state() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    start = Joint(max_iter=1, warmup=2, adjoint_warmup=1)
    found = joint_solution(model, x, squared, method=start, constraint=L2Ball(0.5))
    z = found.flat.z  # after a step with ω = 1.5 from where the adjoint was evaluated
    problem = Problem(Variable(model, x), squared)
    state = problem.warm_up(x, 2)
    lin = problem.linearize(x, state)
    b, _ = lin.gradient(problem.loss(lin.output))
    assert torch.allclose(z, state + 1.5 * (lin.fz - state))
    assert torch.allclose(found.flat.mu, b + lin.jz_mu(b))
    assert torch.allclose(found.flat.jz_mu, lin.vjp(found.flat.mu)[0])


class Injected(nn.Module):
    """``cell(z, u) + e``: the gradient with respect to e is the adjoint μ."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.e = cell, None
        build = getattr(cell, "initial_state", None)
        if build is not None:
            self.initial_state = build

    def forward(self, z: Any, u: Tensor) -> Any:
        out = self.cell(z, u)
        parts = out if isinstance(out, tuple) else (out,)
        if self.e is None:
            self.e = tuple(torch.zeros_like(p, requires_grad=True) for p in parts)
        moved = tuple(p + e for p, e in zip(parts, self.e, strict=True))
        return moved if isinstance(out, tuple) else moved[0]


def exact_adjoint(model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Any:
    """μ of every layer, by autograd through an unrolled, converged solve."""
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, Equilibrium)]
    for layer in layers:
        layer.adjoint, layer.cell = Unrolled(steps=400), Injected(layer.cell)
    loss = objective(model(x)).sum()
    states = [layer.cell.e for layer in layers]
    grads = torch.autograd.grad(loss, [e for es in states for e in es])
    out, at = [], 0
    for es in states:
        part = tuple(grads[at : at + len(es)])
        out.append(part if len(es) > 1 else part[0])
        at += len(es)
    return out[0] if len(out) == 1 else tuple(out)


@every_network
@pytest.mark.parametrize(
    "method",
    [
        Joint(max_iter=300),
        Joint(max_iter=300, relaxation=1.0, state_steps=1),
        Nested(max_iter=2, solver=Anderson(tol=1e-12, max_iter=200)),
        Nested(max_iter=100, solver=Anderson(tol=1e-12, max_iter=3), warm_start=True),
    ],
    ids=["joint", "paper", "nested", "warm"],
)
def test_the_costate_is_the_adjoint(name: str, method: Any) -> None:
    """With v held still by a ball of radius 0, μ converges to the exact adjoint."""
    model, x = NETWORKS[name](), rand(4, 5, seed=1)
    solution = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.0))
    assert torch.equal(solution.x, x)
    exact = exact_adjoint(model, x, squared)
    torch.testing.assert_close(solution.costate, exact, rtol=1e-6, atol=1e-8)
    assert float(solution.stats.costate_residual.max()) < 1e-7


def test_the_costate_of_an_unbounded_problem_too() -> None:
    """Where v is free and has settled, z, μ and v fulfil their equations together."""
    model, x = Ridge(rate=0.9), rand(3, 6, seed=1)
    method = Joint(max_iter=600, step_size=1 / model.curvature(), tol=1e-11)
    solution = optimize_input(model, x, model.objective(seed=3), method=method)
    exact = exact_adjoint(model, solution.x, model.objective(seed=3))
    torch.testing.assert_close(solution.costate, exact, rtol=1e-5, atol=1e-7)


# Known answers ----------------------------------------------------------------------------------


class Ridge(nn.Module):
    """Linear equilibrium whose output holds ``√ρ x`` as well: strongly convex in x."""

    def __init__(self, rate: float = 0.8, rho: float = 2.0) -> None:
        super().__init__()
        self.net, self.rho = LinearNet(inputs=6, n=10, outputs=4, rate=rate, seed=2), rho
        with torch.no_grad():
            self.net.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), self.rho**0.5 * x], dim=1)

    def objective(self, seed: int) -> Callable[[Tensor], Tensor]:
        """``½‖M x − t‖² + ½ρ‖x‖²``."""
        target = rand(4, seed=seed)
        return lambda y: 0.5 * ((y[:, :4] - target).square().sum(1) + y[:, 4:].square().sum(1))

    def hessian(self) -> Tensor:
        m = self.net.matrix()
        return m.T @ m + self.rho * torch.eye(6, dtype=m.dtype)

    def curvature(self) -> float:
        """The largest eigenvalue of the Hessian."""
        return float(torch.linalg.eigvalsh(self.hessian())[-1])

    def answer(self, seed: int) -> Tensor:
        return torch.linalg.solve(self.hessian(), self.net.matrix().T @ rand(4, seed=seed))

    def boxed_answer(self, seed: int, low: float, high: float) -> Tensor:
        """By projected gradient on the closed form."""
        h, g = self.hessian(), self.net.matrix().T @ rand(4, seed=seed)
        x = torch.zeros(6, dtype=h.dtype)
        for _ in range(5000):
            x = (x - (h @ x - g) / self.curvature()).clamp(low, high)
        return x


def smooth_methods(step: float) -> list[Any]:
    tight = Anderson(tol=1e-9, max_iter=200)
    return [
        Joint(max_iter=300, step_size=step, tol=1e-10),
        Joint(max_iter=400, step_size=step / 3, acceleration=0),
        Nested(max_iter=80, step_size=step, solver=tight),
        Nested(
            max_iter=300,
            step_size=step / 3,
            solver=Anderson(max_iter=2, tol=1e-12),
            warm_start=True,
        ),
    ]


SMOOTH = pytest.mark.parametrize("which", range(4), ids=["joint", "plain", "nested", "warm"])


@SMOOTH
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_a_strongly_convex_problem_has_the_known_answer(which: int, rate: float) -> None:
    model = Ridge(rate)
    method = smooth_methods(1 / model.curvature())[which]
    x = rand(3, 6, seed=4)
    solution = optimize_input(model, x, model.objective(seed=3), method=method)
    answer = model.answer(seed=3)
    torch.testing.assert_close(solution.x, answer.expand(3, 6), rtol=1e-5, atol=1e-6)
    best = model.objective(seed=3)(independent_output(model, answer[None]))
    torch.testing.assert_close(solution.value, best.expand(3), rtol=1e-8, atol=1e-9)
    assert statuses(solution) == {Status.CONVERGED}


def test_acceleration_pays_where_v_settles() -> None:
    """At the same number of iterations the mixed run is far nearer to the optimum."""
    model, x = Ridge(rho=0.2), rand(3, 6, seed=4)
    answer, step = model.answer(seed=3), 0.5 / model.curvature()
    gaps = [
        (
            optimize_input(
                model,
                x,
                model.objective(seed=3),
                method=Joint(max_iter=40, step_size=step, tol=0.0, acceleration=memory),
            ).x
            - answer
        )
        .norm(dim=1)
        .max()
        for memory in (5, 0)
    ]
    assert float(gaps[0]) < 0.05 * float(gaps[1])


@SMOOTH
def test_a_strongly_convex_problem_in_a_box(which: int) -> None:
    model = Ridge()
    method = smooth_methods(1 / model.curvature())[which]
    low, high = -0.05, 0.1
    answer = model.boxed_answer(3, low, high)
    assert 0 < int(((answer == low) | (answer == high)).sum()) < 6
    solution = optimize_input(
        model,
        torch.zeros(2, 6).double(),
        model.objective(seed=3),
        method=method,
        constraint=Box(low, high),
    )
    torch.testing.assert_close(solution.x, answer.expand(2, 6), rtol=1e-5, atol=1e-6)


@SMOOTH
@pytest.mark.parametrize("problems", [1, 3])
def test_named_parameters_have_the_known_answer(which: int, problems: int) -> None:
    """Rows of a problem share its context: least squares over all of them."""
    model, rows = Context(affine=True), 4
    x = rand(problems * rows, 4, seed=5)
    target, rho = rand(problems * rows, 3, seed=6), 2.0
    groups = torch.arange(problems).repeat(rows)  # rows of a problem need not be neighbours

    def objective(y: Tensor) -> Tensor:
        return 0.5 * (y[:, :3] - target).square().sum(1) + 0.5 * rho * y[:, 3:].square().sum(1)

    a, head = model.equilibrium.cell.a, model.head.weight.detach()
    inverse = torch.linalg.inv(torch.eye(6, dtype=a.dtype) - a)
    m = head @ inverse
    hessian = rows * (m.T @ m + rho * torch.eye(6, dtype=a.dtype))
    method = smooth_methods(1 / float(torch.linalg.eigvalsh(hessian)[-1]))[which]
    with torch.no_grad():
        offset = model.encoder(x) @ m.T + model.head.bias
    pull = torch.zeros(problems, 6).double().index_add(0, groups, (target - offset) @ m)
    answer = torch.linalg.solve(hessian, pull.T).T

    solution = optimize_input(
        model,
        x,
        objective,
        method=method,
        variables=["context"],
        groups=groups if problems > 1 else None,
    )
    found = solution.x["context"]
    assert found.shape == (problems, 6)
    torch.testing.assert_close(found, answer, rtol=1e-5, atol=1e-6)
    assert solution.value.shape == solution.status.shape == (problems,)
    assert solution.stats.f_evals.shape == (problems * rows,)
    assert not bool(model.context.any())  # the model keeps its own


def test_several_named_parameters_at_once() -> None:
    model, x = Context(), rand(4, 4, seed=1)
    target = rand(4, 3, seed=2)
    solution = optimize_input(
        model,
        x,
        lambda y: (y[:, :3] - target).square().sum(1),
        method=Joint(max_iter=200, step_size=0.05),
        variables=["context", "head.bias"],
    )
    assert solution.x["context"].shape == (1, 6)
    assert solution.x["head.bias"].shape == (3,)
    before = (model(x)[:, :3] - target).square().sum().item()
    assert solution.value.item() < 0.65 * before
    with torch.no_grad():
        model.context.copy_(solution.x["context"])
        model.head.bias.copy_(solution.x["head.bias"])
    after = (model(x)[:, :3] - target).square().sum()
    torch.testing.assert_close(after, solution.value[0], rtol=1e-6, atol=1e-8)
    for slope in torch.autograd.grad(after, [model.context, model.head.bias]):
        assert float(slope.norm()) < 0.02  # it is an optimum of both


@pytest.mark.parametrize("name", ["tensor", "series"])
def test_joint_and_nested_find_the_same_optimum_in_a_ball(name: str) -> None:
    model, x = NETWORKS[name](seed=3, solver=Anderson(tol=1e-9)), rand(8, 5, seed=1)
    target = rand(3, seed=9)

    def objective(y: Tensor) -> Tensor:
        return (y - 2 * target).square().sum(1)

    best = projected_gradient(model, x, objective, radius=0.7)
    for method in (Joint(max_iter=100), Nested(max_iter=40)):
        solution = optimize_input(model, x, objective, method=method, constraint=L2Ball(0.7))
        torch.testing.assert_close(solution.value, best, rtol=2e-3, atol=1e-4)


def projected_gradient(
    model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], radius: float
) -> Tensor:
    """Values by plain projected gradient with exact gradients: another way to the optimum."""
    d = torch.zeros_like(x)
    best = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for k in range(150):
        v = (x + d).requires_grad_()
        loss = objective(model(v))
        best = torch.minimum(best, loss.detach())
        (g,) = torch.autograd.grad(loss.sum(), v)
        step = radius * 0.5 * 0.96**k
        d = d - step * g / g.norm(dim=1, keepdim=True)
        d = d * (radius / d.norm(dim=1, keepdim=True)).clamp(max=1)
    return best


# Alone and in a batch ---------------------------------------------------------------------------

CONSTRAINTS = {
    "free": None,
    "box": Box(-0.8, 0.8),
    "l2": L2Ball(0.5),
    "linf in a box": Intersection(LinfBall(0.2), Box(-0.9, 0.9)),
    "l1": L1Ball(1.0),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
# every method with every constraint on one network, and a few on each of the others
COMBINATIONS = [
    *(("tensor", method, constraint) for method in METHODS for constraint in CONSTRAINTS),
    *((name, "joint", constraint) for name in list(NETWORKS)[1:] for constraint in ("free", "l2")),
    *((name, "nested", "box") for name in list(NETWORKS)[1:]),
    ("series", "joint", "box"),
]
every_combination = pytest.mark.parametrize(("name", "method", "constraint"), COMBINATIONS)
SOME = [0, 7, 20, 63]


def mixed_batch(n: int = 64) -> Tensor:
    """Easy and hard rows; a few are far out, where tanh saturates."""
    x = (0.3 * rand(n, 5, seed=1)).clamp(-0.9, 0.9)
    x[::7] *= 0.01
    return x


@every_combination
def test_a_row_alone_and_in_a_batch_of_64(name: str, method: str, constraint: str) -> None:
    model, x, targets = NETWORKS[name](seed=1), mixed_batch(), rand(64, 3, seed=2)

    def run(rows: Any) -> Solution:
        return optimize_input(
            model,
            x[rows],
            lambda y: (y - targets[rows]).square().sum(1),
            method=METHODS[method],
            constraint=CONSTRAINTS[constraint],
        )

    together = run(slice(None))
    for i in SOME:
        alone = run([i])
        torch.testing.assert_close(alone.x, together.x[[i]], rtol=0, atol=1e-8)
        torch.testing.assert_close(alone.value, together.value[[i]], rtol=1e-7, atol=1e-8)
        assert alone.status.tolist() == together.status[[i]].tolist()
        assert alone.stats.vjps.tolist() == together.stats.vjps[[i]].tolist()
        if isinstance(METHODS[method], Joint):  # a nested batch pays for being compacted
            assert alone.stats.f_evals.tolist() == together.stats.f_evals[[i]].tolist()


def test_settling_does_not_depend_on_the_batch() -> None:
    """Problems that reach the tolerance of the loop sooner and later."""
    model = Ridge()
    x = rand(16, 6, seed=4) * torch.logspace(-3, 2, 16, dtype=torch.float64)[:, None]
    method = Joint(max_iter=100, step_size=1 / model.curvature(), tol=1e-4)
    together = optimize_input(model, x, model.objective(seed=3), method=method)
    for i in (0, 7, 15):
        alone = optimize_input(model, x[[i]], model.objective(seed=3), method=method)
        assert int(alone.stats.iterations) < 100
        torch.testing.assert_close(alone.x, together.x[[i]], rtol=0, atol=1e-8)
        assert alone.stats.iterations.tolist() == together.stats.iterations[[i]].tolist()
        assert alone.stats.f_evals.tolist() == together.stats.f_evals[[i]].tolist()


@every_method
def test_stopping_early_does_not_depend_on_the_batch(method: Any) -> None:
    model, x, targets = Net(seed=1), mixed_batch(), rand(64, 3, seed=2)
    level = 0.9

    def run(rows: Any) -> Solution:
        def distance(y: Tensor) -> Tensor:
            return (y - targets[rows]).square().sum(1)

        return optimize_input(
            model,
            x[rows],
            distance,
            method=method,
            constraint=L2Ball(0.5),
            stop=lambda y: distance(y) < level,
        )

    together = run(slice(None))
    assert {bool(together.value[i] < level) for i in SOME} == {True, False}
    for i in SOME:
        alone = run([i])
        torch.testing.assert_close(alone.x, together.x[[i]], rtol=0, atol=1e-8)
        torch.testing.assert_close(alone.value, together.value[[i]], rtol=1e-7, atol=1e-8)
        assert alone.stats.iterations.tolist() == together.stats.iterations[[i]].tolist()


@pytest.mark.parametrize(
    "constraint", [None, L2Ball(0.7), LinfBall(0.3)], ids=["free", "l2", "linf"]
)
@every_method
def test_five_rows_that_share_a_variable(method: Any, constraint: Any) -> None:
    """64 problems of five rows, interleaved: each as if it were alone."""
    model, x = Context(seed=1), rand(320, 4, seed=1)
    targets = rand(320, 3, seed=2)
    groups = torch.arange(64).repeat(5)

    def run(rows: Tensor, index: Tensor | None) -> Solution:
        def objective(y: Tensor) -> Tensor:
            fit = (y[:, :3] - targets[rows]).square().sum(1)
            return fit + 0.1 * y[:, 3:].square().sum(1)

        return optimize_input(
            model,
            x[rows],
            objective,
            method=method,
            constraint=constraint,
            variables=["context"],
            groups=index,
        )

    together = run(torch.arange(320), groups)
    assert together.x["context"].shape == (64, 6)
    for p in SOME:
        alone = run((groups == p).nonzero().squeeze(1), None)
        assert alone.x["context"].shape == (1, 6)
        torch.testing.assert_close(
            alone.x["context"][0], together.x["context"][p], rtol=0, atol=1e-8
        )
        torch.testing.assert_close(alone.value, together.value[[p]], rtol=1e-7, atol=1e-8)
        assert alone.status.tolist() == together.status[[p]].tolist()


@every_constraint
def test_values_agree_in_float32(constraint: Any) -> None:
    model = Net(seed=1, solver=Anderson(tol=1e-6, max_iter=100)).float()
    x, targets = mixed_batch().float(), rand(64, 3, seed=2).float()
    method = Joint(max_iter=100)  # settled: on the way a rounding may decide what is taken back

    def run(rows: Any) -> Tensor:
        return optimize_input(
            model,
            x[rows],
            lambda y: (y - targets[rows]).square().sum(1),
            constraint=constraint,
            method=method,
        ).value

    together = run(slice(None))
    for i in SOME:
        torch.testing.assert_close(run([i]), together[[i]], rtol=1e-3, atol=1e-3)


class Conditional(nn.Module):
    """``(h(z*), x)`` of a network whose input is ``shift + scale · x``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([self.net(shift + scale * x), x], dim=1)


def conditions(rows: int) -> list[Tensor]:
    return [rand(rows, 5, seed=21), rand(rows, 1, seed=22).exp()]


@pytest.mark.parametrize(
    "method", [Joint(max_iter=100, tol=1e-10), Nested(max_iter=300, step_size=0.05)]
)
def test_what_else_the_model_is_given_stands_still(method: Any) -> None:
    model, x, more = Conditional(), torch.zeros(4, 5).double(), conditions(4)
    kept = [t.clone() for t in more]
    together = optimize_input(model, x, squared, given=more, method=method)
    torch.testing.assert_close(more, kept, rtol=0, atol=0)
    output = independent_output(model.net, more[0] + more[1] * together.x)
    value = squared(output) + squared(together.x)
    torch.testing.assert_close(together.value, value, rtol=1e-6, atol=1e-9)
    assert (value < squared(independent_output(model.net, more[0]))).all()
    for i in range(4):
        row = [t[i : i + 1] for t in more]
        alone = optimize_input(model, x[i : i + 1], squared, given=row, method=method)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-7, atol=1e-9)


def test_gradients_reach_what_the_model_is_given() -> None:
    model, x, target = Conditional(), torch.zeros(2, 5).double(), rand(2, 5, seed=23)

    def found(more: list[Tensor]) -> Tensor:
        solution = optimize_input(
            model,
            x,
            squared,
            given=more,
            differentiable=True,
            method=Joint(max_iter=200, tol=1e-11),
        )
        return (solution.x * target).sum()

    more = conditions(2)
    gradients = torch.autograd.grad(found([t.requires_grad_() for t in more]), more)
    for k, index in enumerate([(1, 0), (0, 0)]):
        values = []
        for step in (1e-4, -1e-4):
            moved = conditions(2)
            moved[k][index] += step
            values.append(found(moved).item())
        expected = (values[0] - values[1]) / 2e-4
        assert gradients[k][index].item() == pytest.approx(expected, rel=1e-4)


def test_parameters_of_a_model_that_is_given_more() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Context()

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            out: Tensor = self.inner(x + shift)
            return out

    model, x, shift = Shifted(), rand(4, 4, seed=1), rand(4, 4, seed=2)
    groups, options = torch.tensor([0, 1, 1, 0]), {"method": Joint(max_iter=20)}
    found = optimize_input(
        model, x, squared, given=(shift,), variables=["inner.context"], groups=groups, **options
    )
    expected = optimize_input(
        model.inner, x + shift, squared, variables=["context"], groups=groups, **options
    )
    torch.testing.assert_close(found.x["inner.context"], expected.x["context"])
    torch.testing.assert_close(found.value, expected.value)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        (torch.zeros(2, 1), TypeError, "a tuple or list of tensors, .* got tensor"),
        ([1.0], TypeError, r"got \[1.0\]"),
        (iter([torch.zeros(2, 1)]), TypeError, "a tuple or list of tensors"),
        (None, TypeError, "got None"),
        ([torch.zeros(3, 1)], ValueError, r"a row per sample, \(2, ...\), got \(3, 1\)"),
        ([torch.zeros(())], ValueError, "a row per sample"),
    ],
)
def test_bad_given(more: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        optimize_input(Conditional(), torch.zeros(2, 5).double(), squared, given=more)


def test_groups_of_one_row_are_rows() -> None:
    """With every row a problem of its own, a context per row is an input per row."""
    model, x = Context(seed=1), rand(6, 4, seed=1)

    def objective(y: Tensor) -> Tensor:
        return y[:, :3].square().sum(1)

    class AsInput(nn.Module):
        def forward(self, both: Tensor) -> Tensor:
            rows, context = both[:, :4], both[:, 4:]
            z = model.equilibrium(model.encoder(rows) + context)
            return torch.cat([model.head(z), context], dim=1)

        def modules(self) -> Any:
            return iter([self, *model.modules()])

    by_name = optimize_input(
        model, x, objective, variables=["context"], groups=torch.arange(6), constraint=L2Ball(0.5)
    )
    by_input = optimize_input(
        AsInput(),
        torch.cat([x, torch.zeros(6, 6).double()], dim=1),
        objective,
        constraint=L2Ball(0.5, mask=torch.arange(10) >= 4),
    )
    torch.testing.assert_close(by_name.x["context"], by_input.x[:, 4:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(by_name.value, by_input.value)


# Honest values ----------------------------------------------------------------------------------


@every_combination
def test_value_and_output_are_those_of_an_independent_solve(
    name: str, method: str, constraint: str
) -> None:
    loose = Anderson(tol=3e-2, max_iter=100)
    model, x = NETWORKS[name](seed=2, solver=loose), mixed_batch(16)
    target = rand(3, seed=3)

    def objective(y: Tensor) -> Tensor:
        return (y - target).square().sum(1)

    solution = optimize_input(
        model, x, objective, method=METHODS[method], constraint=CONSTRAINTS[constraint]
    )
    output = independent_output(model, solution.x)
    torch.testing.assert_close(solution.output, output, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(solution.value, objective(output), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        own = model(solution.x)
    torch.testing.assert_close(solution.stats.model_output, own, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(solution.stats.model_value, objective(own), rtol=1e-9, atol=1e-10)
    assert float(solution.stats.z_residual.max()) <= 1e-9
    if CONSTRAINTS[constraint] is not None:
        x = CONSTRAINTS[constraint].bind(x).project(x)  # where it starts
    start = objective(independent_output(model, x))
    assert bool((solution.value <= start * (1 + 1e-6) + 1e-7).all())
    assert not solution.output.requires_grad
    assert not solution.x.requires_grad


def test_the_state_is_that_of_the_tight_solve() -> None:
    for name, make in NETWORKS.items():
        model, x = make(solver=Anderson(tol=1e-2)), rand(3, 5, seed=1)
        solution = optimize_input(model, x, squared, constraint=L2Ball(0.2))
        states: list[Any] = []
        for layer in (m for m in model.modules() if isinstance(m, Equilibrium)):
            layer.register_forward_hook(lambda m, a, out, seen=states: seen.append(out))
        independent_output(model, solution.x)
        expected = states[0] if len(states) == 1 else tuple(states)
        torch.testing.assert_close(solution.z, expected, rtol=1e-6, atol=1e-7, msg=name)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    rate=st.sampled_from([0.3, 0.9, 0.99]),
    step=st.sampled_from([0.01, 1.0, 20.0]),
    steps=st.integers(1, 4),
    warmup=st.integers(1, 3),
    norm=st.sampled_from([L1Ball, L2Ball, LinfBall]),
)
def test_never_worse_than_the_start(
    seed: int, rate: float, step: float, steps: int, warmup: int, norm: Any
) -> None:
    """Slow cells, a step that is far too long, one step only: the start is the fallback."""
    model = LinearNet(inputs=5, n=8, outputs=3, rate=rate, seed=seed)
    x = rand(6, 5, seed=seed + 1)
    target = independent_output(model, x) + 0.05 * rand(6, 3, seed=seed + 2)  # x is nearly optimal

    def objective(y: Tensor) -> Tensor:
        return (y - target).square().sum(1)

    method = Joint(max_iter=steps, step_size=step, warmup=warmup)
    solution = optimize_input(
        model,
        x,
        objective,
        method=method,
        constraint=norm(1.0),
        verify=Anderson(max_iter=500, tol=1e-10),
    )
    start = objective(independent_output(model, x, steps=6000))
    assert bool((solution.value <= start * (1 + 1e-5) + 1e-8).all())


def test_costs_are_those_that_happened() -> None:
    """Everything but the final verification, whatever was evaluated to choose the answer."""
    for step in (0.5, 50.0):  # the long one makes other candidates worth a look
        for method in (
            Joint(max_iter=12, step_size=step),
            Nested(max_iter=4, step_size=step),
            Nested(max_iter=4, step_size=step, warm_start=True, solver=Anderson(max_iter=2)),
        ):
            model, x = Net(seed=5, rate=0.95, solver=Anderson(tol=1e-6)), rand(1, 5, seed=1)
            target = model(x).detach() + 0.05
            model.equilibrium.cell = spy = Spy(model.equilibrium.cell)
            with count_evaluations() as counter:
                solution = optimize_input(
                    model,
                    x,
                    lambda y, goal=target: (y - goal).square().sum(1),
                    method=method,
                    constraint=L2Ball(1.0),
                )
            happened = spy.total
            spy.rows.clear()
            with torch.no_grad():
                model(solution.x)
            # the verification is one call of the model and a tight solve from where it ended
            verification = float(solution.stats.verification_f_evals.sum())
            assert spy.total < verification < 2 * spy.total
            assert float(solution.stats.f_evals.sum()) == happened - verification
            # one row: the counter sees the same, never twice
            assert counter.f_evals == float(solution.stats.f_evals.sum())
            assert counter.vjps == float(solution.stats.vjps.sum())


@pytest.mark.parametrize(
    "method",
    [
        Joint(max_iter=12),
        Joint(max_iter=12, state_steps=1),
        Nested(max_iter=4),
        Nested(max_iter=4, warm_start=True),
    ],
)
@pytest.mark.parametrize("constraint", [None, L2Ball(1.0)])
def test_costs_of_several_layers_are_the_sum_of_theirs(method: Any, constraint: Any) -> None:
    model, x = Series(solver=Anderson(tol=1e-6)), rand(1, 5, seed=1)
    spies = [Spy(layer.cell) for layer in (model.first, model.second)]
    model.first.cell, model.second.cell = spies
    with count_evaluations() as counter:
        solution = optimize_input(model, x, squared, method=method, constraint=constraint)
    happened = sum(spy.total for spy in spies)
    stats = solution.stats
    assert float((stats.f_evals + stats.verification_f_evals).sum()) == happened
    assert counter.f_evals == float(stats.f_evals.sum())
    assert float(stats.vjps.sum()) % 2 == 0  # a product passes both layers
    for spy in spies:
        spy.rows.clear()
    joint = joint_solution(model, x, squared, method=method, constraint=constraint)
    assert float(joint.f_evals.sum()) == sum(spy.total for spy in spies)


def test_vjps_are_those_that_happened() -> None:
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

    model, x = Net(), rand(1, 5, seed=1)
    model.equilibrium.cell = Cell(8, 0.7, seed=2)
    for method in (
        Joint(max_iter=9, adjoint_warmup=0),
        Joint(max_iter=9, adjoint_warmup=20),
        Joint(max_iter=9),
        Nested(max_iter=3),
        Nested(max_iter=3, warm_start=True),
    ):
        products = 0
        solution = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.5))
        assert float(solution.stats.vjps.sum()) == products
        if isinstance(method, Joint):
            # one an iteration, the head's gradient needs none, and those of the adjoint's warm-up
            assert products == 9 + min(9, method.adjoint_warmup)


def test_iterations_cost_what_they_should() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    solution = optimize_input(
        model,
        x,
        squared,
        method=Joint(max_iter=20, state_steps=2, warmup=3),
        constraint=L2Ball(0.5),
    )
    assert solution.stats.iterations.tolist() == [20] * 4
    assert solution.stats.vjps.tolist() == [23] * 4
    assert bool((solution.stats.f_evals <= 3 + 39 + 200).all())
    assert bool((solution.stats.f_evals >= 40).all())
    assert set(solution.stats.summary()) >= {"f_evals", "vjps", "iterations", "z_residual"}


# Status -----------------------------------------------------------------------------------------


@every_method
@every_network
def test_radius_zero_is_no_improvement(name: str, method: Any) -> None:
    model, x = NETWORKS[name](), rand(5, 5, seed=1)
    solution = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.0))
    assert torch.equal(solution.x, x)
    assert statuses(solution) == {Status.NO_IMPROVEMENT}
    assert "NO_IMPROVEMENT" in solution.report()


def test_an_unfinished_verification_says_so() -> None:
    model, x = Net(rate=0.95, solver=Anderson(tol=1e-2)), rand(3, 5, seed=1)
    solution = optimize_input(
        model, x, squared, constraint=L2Ball(0.3), verify=Anderson(max_iter=2, tol=1e-12)
    )
    assert statuses(solution) == {Status.NOT_VERIFIED}
    assert "do not trust this value" in solution.report()
    assert float(solution.stats.z_residual.min()) > 1e-12


def test_a_cell_without_a_fixed_point_is_not_verified() -> None:
    model, x = Net(), rand(3, 5, seed=1)
    model.equilibrium = Equilibrium(Elementwise(lambda z, u: z * z + z + 1 + u.square()))
    solution = optimize_input(model, x, squared, constraint=L2Ball(0.3))
    assert statuses(solution) == {Status.NOT_VERIFIED}
    assert bool(torch.isfinite(solution.x).all())


def test_a_loose_layer_disagrees() -> None:
    """The model's own solver stops long before the fixed point."""
    model = LinearNet(inputs=5, n=8, outputs=3, rate=0.95, solver=Picard(max_iter=2, tol=0.0))
    x = rand(4, 5, seed=1)
    solution = optimize_input(model, x, lambda y: -squared(y), constraint=L2Ball(0.3))
    assert statuses(solution) == {Status.DISAGREEMENT}
    with torch.no_grad():
        own = -squared(model(solution.x))
    torch.testing.assert_close(solution.stats.model_value, own)
    assert float((own - solution.value).abs().min()) > 1e-2


def test_disagreement_is_judged_by_the_sample() -> None:
    """Rows whose solve is easy agree; the others do not."""

    class Cell(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return u[:, :1] * z + u

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.equilibrium = Equilibrium(Cell(), solver=Picard(max_iter=12, tol=0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.equilibrium(x)

    x = torch.tensor([[0.1, 1.0, 2.0], [0.95, 1.0, 2.0], [-0.2, 1.0, 0.0]]).double()
    solution = optimize_input(
        Gate(), x, squared, constraint=L2Ball(0.01), verify=Anderson(max_iter=300, tol=1e-9)
    )
    found = [Status(int(s)) for s in solution.status]
    assert found == [Status.CONVERGED, Status.DISAGREEMENT, Status.CONVERGED]


@every_method
def test_an_objective_that_is_nan(method: Any) -> None:
    """For one row: that one says so and stays at its start, the others do not notice."""
    model, x = Net(), rand(4, 5, seed=1)

    def broken(y: Tensor) -> Tensor:
        return squared(y) * torch.tensor([1.0, 1.0, torch.nan, 1.0])

    solution = optimize_input(model, x, broken, method=method, constraint=L2Ball(0.5))
    clean = optimize_input(model, x, squared, method=method, constraint=L2Ball(0.5))
    assert Status(int(solution.status[2])) == Status.NONFINITE
    assert torch.equal(solution.x[2], x[2])
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(solution.x[others], clean.x[others], rtol=0, atol=1e-10)
    assert solution.status[others].tolist() == clean.status[others].tolist()


@every_method
def test_a_cell_that_is_nan(method: Any) -> None:
    """For one row: never a NaN in x, never CONVERGED; the others do not notice."""

    def cell(z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + u) + torch.where(u[:, :1] > 50, torch.nan, 0.0)

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.equilibrium = Equilibrium(Elementwise(cell))

        def forward(self, x: Tensor) -> Tensor:
            return self.equilibrium(x)

    x = rand(4, 5, seed=1)
    x[2, 0] = 100.0
    solution = optimize_input(Direct(), x, squared, method=method, constraint=L2Ball(0.5))
    assert Status(int(solution.status[2])) == Status.NONFINITE
    assert bool(torch.isfinite(solution.x).all())
    others = torch.tensor([0, 1, 3])
    clean = optimize_input(Direct(), x[others], squared, method=method, constraint=L2Ball(0.5))
    torch.testing.assert_close(solution.x[others], clean.x, rtol=0, atol=1e-8)
    assert statuses(clean) == {Status.CONVERGED}
    assert bool((solution.status[others] == clean.status).all())


# Nothing of the caller's is changed ---------------------------------------------------------------


class Busy(nn.Module):
    """Dropout, batch statistics, frozen and trained parameters, mixed modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)
        self.net = Net(seed=1)
        self.dropout = nn.Dropout(0.4)
        self.still = nn.BatchNorm1d(3, dtype=torch.float64)
        self.fail_at = -1
        self.calls = 0
        self.modes: set[bool] = set()
        self.net.encoder.bias.requires_grad_(False)
        for k, p in enumerate(self.parameters()):
            if k % 2 and p.requires_grad:
                p.grad = torch.full_like(p, 3.0)
        self.train()
        self.still.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the cell broke")
        self.modes.add(self.dropout.training)
        return self.still(self.net(self.dropout(self.norm(x))))


def snapshot(model: nn.Module, *tensors: Tensor) -> list[Any]:
    """Everything of the caller's that could be changed."""
    seen: list[Any] = [torch.get_rng_state().tolist()]
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        seen.append((name, id(p), p.requires_grad, p.detach().tolist(), grad))
    seen.extend((name, id(b), b.tolist()) for name, b in model.named_buffers())
    seen.extend((name, m.training) for name, m in model.named_modules())
    seen.extend((name, sorted(m.__dict__)) for name, m in model.named_modules())
    seen.extend((id(t), t.requires_grad, t.grad, t.tolist()) for t in tensors)
    return seen


@pytest.mark.filterwarnings("ignore:training_mode=True with BatchNorm")
@pytest.mark.parametrize("training_mode", [False, True])
@pytest.mark.parametrize("fault", ["none", "cell", "cell later", "objective", "stop", "callback"])
@every_method
def test_nothing_of_the_callers_is_changed(method: Any, fault: str, training_mode: bool) -> None:
    model, x = Busy(), rand(4, 5, seed=1).requires_grad_()
    target, radius = rand(4, 3, seed=2), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    mask = torch.tensor([True, True, False, True, True])
    model.fail_at = {"cell": 1, "cell later": 4}.get(fault, -1)

    def fail(part: str) -> None:
        if fault == part and model.calls > 3:
            raise RuntimeError(f"the {part} broke")

    def objective(y: Tensor) -> Tensor:
        fail("objective")
        return (y - target).square().sum(1)

    def stop(y: Tensor) -> Tensor:
        fail("stop")
        return y[:, 0] > 100

    before = snapshot(model, x, target, radius, mask)

    def run() -> Solution:
        return optimize_input(
            model,
            x,
            objective,
            method=method,
            constraint=L2Ball(radius, mask=mask),
            training_mode=training_mode,
            stop=stop,
            callback=lambda progress: fail("callback"),
        )

    if fault == "none":
        run()
        assert model.modes == {training_mode}
    else:
        with pytest.raises(RuntimeError, match="broke"):
            run()
    assert snapshot(model, x, target, radius, mask) == before


def test_named_parameters_are_left_as_they_were() -> None:
    model, x = Context(), rand(4, 4, seed=1)
    model.context.grad = torch.ones_like(model.context)
    before = snapshot(model, x)
    optimize_input(model, x, squared, variables=["context"], constraint=L2Ball(0.5))
    optimize_input(
        model,
        x,
        squared,
        variables=["context"],
        groups=torch.tensor([0, 0, 1, 1]),
        constraint=L2Ball(0.5),
    )
    assert snapshot(model, x) == before


def test_the_result_shares_no_memory_with_the_input() -> None:
    model, x = Net(), rand(3, 5, seed=1)
    for rows in (3, 0):
        solution = optimize_input(model, x[:rows], squared, constraint=L2Ball(0.0))
        solution.x.add_(1.0)
    for method in (Joint(max_iter=1), Nested(max_iter=1)):  # the former ends where it begins
        optimize_input(model, x, squared, method=method).x.add_(1.0)
    joint_solution(model, x, squared, method=Joint(max_iter=1)).x.add_(1.0)
    torch.testing.assert_close(x, rand(3, 5, seed=1))
    model, rows = Context(), rand(3, 4, seed=1)
    solution = optimize_input(model, rows, squared, variables=["context"], constraint=L2Ball(0.0))
    solution.x["context"].add_(1.0)
    assert not bool(model.context.any())


def test_the_same_call_gives_the_same_result() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    first = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    torch.manual_seed(123)
    second = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.value, second.value)


def test_two_threads_do_not_meet() -> None:
    model = Net()
    xs = [rand(4, 5, seed=s) for s in range(4)]

    def run(x: Tensor) -> Tensor:
        return optimize_input(model, x, squared, constraint=L2Ball(0.5)).x

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, xs))
    for x, got in zip(xs, together, strict=True):
        assert torch.equal(got, run(x))


def test_threads_take_turns_at_the_flags_of_a_model() -> None:
    """The second comes while the first is at work, and would see its flags."""
    model, x = Busy(), rand(4, 5, seed=1)
    before = snapshot(model, x)
    at_work, joined, done = (threading.Event() for _ in range(3))

    def first(y: Tensor) -> Tensor:
        if not at_work.is_set():
            at_work.set()
            joined.wait(0.5)  # in vain where they take turns
        return squared(y)

    def second(y: Tensor) -> Tensor:
        joined.set()
        done.wait(5)
        return squared(y)

    def run(objective: Any) -> Tensor:
        # a wrapper of its own, as an attack object makes one, around a model that all share
        return optimize_input(nn.Sequential(model), x, objective, constraint=L2Ball(0.5)).x

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, first)
        at_work.wait(5)
        other = pool.submit(run, second)
        one.result()
        done.set()
        assert torch.equal(one.result(), other.result())
    assert snapshot(model, x) == before
    assert model.modes == {False}


class Meddling(nn.Module):
    """Counts its calls in a buffer, also in eval mode, and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)
        self.net = Net()

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x.detach()
        for t in (x, *given):
            t.sub_(0.5).mul_(2)
        return self.net(x)


class Shifted(nn.Module):
    """The same without changing anything."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * (x - 0.5))


@every_method
def test_a_model_that_changes_what_it_is_given(method: Any) -> None:
    model, x, condition = Meddling(), rand(4, 5, seed=1), rand(4, 2, seed=2)
    before = snapshot(model, x, condition)
    got = optimize_input(model, x, squared, method=method, given=[condition])
    assert snapshot(model, x, condition) == before
    assert model.cache is None
    expected = optimize_input(Shifted(model.net), x, squared, method=method)
    torch.testing.assert_close(got.x, expected.x)


def test_what_was_made_in_inference_mode_is_taken() -> None:
    model = Net()
    with torch.inference_mode():
        x, condition = rand(4, 5, seed=1), rand(4, 5, seed=2)
    ordinary = optimize_input(model, rand(4, 5, seed=1), squared)
    assert torch.equal(optimize_input(model, x, squared).x, ordinary.x)
    optimize_input(model, x, squared, constraint=L2Ball(0.1, center=condition * 0 + x))
    assert bool(torch.isfinite(joint_solution(model, x, squared).x).all())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="joint_solution needs grad"):
        joint_solution(model, x, squared)


def test_settings_that_require_grad_leave_no_graph() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    radius, step = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 1.0))
    for solve in (optimize_input, joint_solution):
        for constraint in (L2Ball(radius), LinfBall(radius)):
            method = Joint(max_iter=5, step_size=step)
            solution = solve(model, x, squared, constraint=constraint, method=method)
            assert not solution.x.requires_grad


def test_inside_no_grad() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    expected = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    with torch.no_grad():
        quiet = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    assert torch.equal(quiet.x, expected.x)
    assert not torch.is_inference(quiet.x)


def test_an_optimisation_inside_the_objective() -> None:
    """The inner one has a mode of its own and gives the outer one its back."""
    outer, inner, x = Net(seed=1), Net(seed=2), rand(2, 5, seed=1)
    reference = optimize_input(outer, x, squared, method=Joint(max_iter=5), constraint=L2Ball(0.5))

    def objective(y: Tensor) -> Tensor:
        optimize_input(inner, x, squared, method=Joint(max_iter=2), constraint=L2Ball(0.1))
        return squared(y)

    got = optimize_input(outer, x, objective, method=Joint(max_iter=5), constraint=L2Ball(0.5))
    assert torch.equal(got.x, reference.x)


class Slowly(nn.Module):
    """``z = −0.8 z + x``, which over-relaxed steps leave, then ``z = 0.1 z + 10 z₁``."""

    class Linear(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = rate

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return self.rate * z + u

    def __init__(self) -> None:
        super().__init__()
        self.first = Equilibrium(self.Linear(-0.8))
        self.second = Equilibrium(self.Linear(0.1))
        self.head = linear(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(10 * self.first(x)) / 10)


def test_a_later_layer_does_not_hide_that_an_earlier_one_is_over_relaxed() -> None:
    residuals: list[float] = []
    optimize_input(
        Slowly(),
        rand(8, 5, seed=1),
        squared,
        method=Joint(max_iter=40),
        constraint=L2Ball(0.5),
        callback=lambda progress: residuals.append(float(progress.z_residual.max())),
    )
    assert residuals[-1] < 0.05


# Training mode ----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """:class:`Net` with dropout before it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.dropout = Net(seed=1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))


@pytest.mark.parametrize("step", [1.0, 30.0])
@every_method
def test_training_mode_keeps_one_dropout_mask(method: Any, step: float) -> None:
    """The verified value is that of the mask that the generator's present state draws."""
    model, x = Noisy().train(), rand(8, 5, seed=1)
    method = replace(method, step_size=step)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    solution = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), training_mode=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(squared(model(solution.x)), solution.value, rtol=1e-6, atol=1e-8)
    torch.set_rng_state(state)
    start = squared(model(x))
    assert bool((solution.value <= start + 1e-8).all())
    torch.set_rng_state(state)
    again = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), training_mode=True
    )
    assert torch.equal(again.x, solution.x)
    torch.manual_seed(8)
    other = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), training_mode=True
    )
    assert not torch.equal(other.x, solution.x)


@pytest.mark.parametrize(
    "method", [Joint(max_iter=30), Nested(max_iter=15, warm_start=True)], ids=["joint", "warm"]
)
def test_random_numbers_in_a_cell_and_after_it_are_the_same_in_every_pass(method: Any) -> None:
    model = Net(seed=1)
    cell, drawn = model.equilibrium.cell, []

    class Scaled(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return cell(z, u) * (0.8 + 0.4 * torch.rand_like(z))

    def draw(*_: object) -> None:
        drawn.append(float(torch.rand(())))

    model.equilibrium.cell = Scaled()
    model.head.register_forward_pre_hook(draw)
    residuals: list[float] = []
    optimize_input(
        model,
        rand(8, 5, seed=1),
        squared,
        method=method,
        constraint=L2Ball(0.5),
        training_mode=True,
        callback=lambda progress: residuals.append(float(progress.z_residual.median())),
    )
    assert residuals[-1] < 1e-2
    loop = drawn[1 : len(residuals) + 1]
    assert len(set(loop)) == 1


def test_training_mode_warns_of_batch_statistics() -> None:
    model, x = Busy(), rand(4, 5, seed=1)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with pytest.warns(UserWarning, match="BatchNorm in train mode"):
        optimize_input(model, x, squared, constraint=L2Ball(0.1), training_mode=True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    model.norm.eval()
    optimize_input(model, x, squared, constraint=L2Ball(0.1), training_mode=True)  # no warning


# stop and callback --------------------------------------------------------------------------------


@every_method
def test_stop_saves_what_is_left(method: Any) -> None:
    model, x, target = Net(seed=1), mixed_batch(16), rand(3, seed=2)

    def objective(y: Tensor) -> Tensor:
        return (y - target).square().sum(1)

    def run(stop: Any) -> Solution:
        return optimize_input(model, x, objective, method=method, constraint=L2Ball(0.5), stop=stop)

    full = run(None)
    easy = run(lambda y: objective(y) < 1e9)
    never = run(lambda y: objective(y) < -1.0)
    assert torch.equal(easy.x, x)  # held from the first evaluation
    assert easy.stats.iterations.tolist() == [4] * 16
    assert bool((easy.stats.vjps < full.stats.vjps).all())
    torch.testing.assert_close(never.x, full.x, rtol=0, atol=1e-12)
    assert never.stats.f_evals.tolist() == full.stats.f_evals.tolist()
    level = float((0.5 * (objective(full.output) + objective(independent_output(model, x)))).mean())
    half = run(lambda y: objective(y) < level)
    hit = half.value < level
    assert bool(hit.any())
    cheaper = half.stats.iterations < full.stats.iterations
    assert bool((half.value[cheaper] < level * 1.05).all())
    assert bool(cheaper.any())


@every_method
def test_callback_sees_every_step(method: Any) -> None:
    model, x = Net(), rand(3, 5, seed=1)
    seen: list[Any] = []
    solution = optimize_input(
        model, x, squared, method=method, constraint=L2Ball(0.5), callback=seen.append
    )
    assert [p.iteration for p in seen] == list(range(method.max_iter))
    assert solution.stats.iterations.tolist() == [method.max_iter] * 3
    assert torch.equal(seen[0].v, x)
    last = seen[-1]
    assert last.v.shape == last.gradient.shape == (3, 5)
    assert last.loss.shape == last.z_residual.shape == (3,)
    assert not last.loss.requires_grad
    assert float(last.loss.sum()) < float(seen[0].loss.sum())


# Method arguments -------------------------------------------------------------------------------


def test_step_sizes_per_problem() -> None:
    model, x = Net(), rand(3, 5, seed=1)
    steps = torch.tensor([0.0, 1.0, 2.0]).double()
    mixed = optimize_input(model, x, squared, method=Joint(step_size=steps), constraint=L2Ball(0.5))
    assert torch.equal(mixed.x[0], x[0])
    for i in (1, 2):
        one = optimize_input(
            model,
            x[i : i + 1],
            squared,
            method=Joint(step_size=float(steps[i])),
            constraint=L2Ball(0.5),
        )
        torch.testing.assert_close(one.x, mixed.x[i : i + 1], rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match=r"step_size must hold one value or one per problem \(3\)"):
        optimize_input(
            model, x, squared, method=Joint(step_size=torch.ones(2)), constraint=L2Ball(0.5)
        )


@pytest.mark.parametrize("make", [Joint, partial(Nested, warm_start=True)])
@pytest.mark.parametrize("iterations", [1, 4, 40])
def test_steps_in_a_ball_fall_from_twice_the_radius(make: Any, iterations: int) -> None:
    x = rand(3, 5, seed=1)
    feasible = L2Ball(0.5).bind(x)
    lengths = torch.cat(make(max_iter=iterations).steps(feasible, x), dim=1)
    assert torch.all(lengths[:, 0] == 1.0)
    if iterations > 1:
        assert torch.allclose(lengths[:, -1], x.new_tensor(0.8 / iterations))
        assert bool((lengths.diff(dim=1) < 0).all())


def test_one_state_step_may_be_damped_but_is_not_over_relaxed() -> None:
    model, x = Net(seed=1), rand(6, 5, seed=2)

    def end(state_steps: int, relaxation: float) -> Tensor:
        method = Joint(max_iter=5, state_steps=state_steps, relaxation=relaxation)
        return optimize_input(model, x, squared, method=method, constraint=L2Ball(0.5)).x

    assert torch.equal(end(1, 1.5), end(1, 1.0))
    assert not torch.equal(end(1, 0.5), end(1, 1.0))
    assert not torch.equal(end(2, 1.5), end(2, 1.0))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Joint(max_iter=0), "max_iter must be at least 1, got 0"),
        (lambda: Nested(warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: Joint(step_size=-1.0), "step_size must be finite and not negative, got -1"),
        (lambda: Joint(final_step_size=math.nan), "final_step_size must be finite and not neg"),
        (lambda: Joint(relaxation=2.0), r"relaxation must be in \(0, 2\), got 2"),
        (lambda: Joint(relaxation=0.0), r"relaxation must be in \(0, 2\), got 0"),
        (lambda: Joint(state_steps=0), "state_steps must be at least 1"),
        (lambda: Joint(adjoint_warmup=-1), "adjoint_warmup must be at least 0, got -1"),
        (lambda: Joint(acceleration=-1), "acceleration must be at least 0, got -1"),
    ],
)
def test_bad_arguments_of_the_methods(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_unknown_keywords_raise() -> None:
    for kind in (Joint, Nested):
        with pytest.raises(TypeError, match="iterations"):
            kind(iterations=3)


# Bad input --------------------------------------------------------------------------------------


class NoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(5, 3, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_x_that_is_not_finite(bad: float) -> None:
    x = rand(4, 5, seed=1)
    x[2, 3] = bad
    with pytest.raises(ValueError, match=r"x holds NaN or Inf \(first in sample 2\)"):
        optimize_input(Net(), x, squared)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_x_that_is_not_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"floating point, got {dtype}.*x\.float\(\)"):
        optimize_input(Net(), torch.ones(2, 5, dtype=dtype), squared)


def test_x_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match="x must be one tensor, got list"):
        optimize_input(Net(), [[1.0] * 5], squared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch first, \(batch, \.\.\.\), got shape \(5,\)"):
        optimize_input(Net(), rand(5, seed=1), squared)


@pytest.mark.parametrize("shape", [(0, 5), (0, 1, 8, 8)])
def test_an_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    solution = optimize_input(Net(), x, squared, constraint=L2Ball(0.5))
    assert solution.x.shape == shape
    assert solution.x is not x
    assert solution.value.shape == solution.status.shape == (0,)
    assert solution.stats.f_evals.shape == solution.stats.vjps.shape == (0,)
    assert solution.report() == ""
    assert solution.stats.summary() == {}


def test_a_batch_of_one_and_images() -> None:
    x = rand(1, 5, seed=1).reshape(1, 1, 5, 1)
    solution = optimize_input(Net(), x, squared, constraint=L2Ball(0.5))
    assert solution.x.shape == (1, 1, 5, 1)
    flat = optimize_input(Net(), x.flatten(1), squared, constraint=L2Ball(0.5))
    assert torch.equal(solution.x.flatten(1), flat.x)


def test_a_model_without_a_layer() -> None:
    with pytest.raises(ValueError, match=r"no equilibrium layer.*Put jiio_plugins\.Equilibrium"):
        optimize_input(NoLayer(), rand(2, 5, seed=1), squared)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        optimize_input(lambda x: x, rand(2, 5, seed=1), squared)  # type: ignore[arg-type]


def test_a_cell_of_another_output_shape() -> None:
    model = Net()
    model.equilibrium = Equilibrium(Elementwise(lambda z, u: z[:, :4]))
    with pytest.raises(ValueError, match=r"shape \(2, 4\).* shape \(2, 8\)"):
        optimize_input(model, rand(2, 5, seed=1), squared)


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda y: y.square().sum(), r"\(\)"),
        (lambda y: y.square(), r"\(4, 3\)"),
        (lambda y: y.square().sum(1)[:2], r"\(2,\)"),
        (lambda y: y.square().sum(1, keepdim=True), r"\(4, 1\)"),
        (lambda y: 3.0, "float"),
        (lambda y: None, "NoneType"),
    ],
)
def test_an_objective_of_another_shape(objective: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"shape \(4,\), got {got}; use reduction='none'"):
        optimize_input(Net(), rand(4, 5, seed=1), objective)


@pytest.mark.parametrize(
    ("objective", "error", "words"),
    [
        (lambda y: y.argmax(1), TypeError, "real floating-point values, got torch.int64"),
        (lambda y: torch.view_as_complex(y[:, :2].contiguous()), TypeError, "take .abs"),
        (lambda y: squared(y.detach()), ValueError, "the objective has no gradient"),
        (lambda y: torch.zeros(4), ValueError, "does not use the model's output"),
    ],
)
def test_an_objective_without_a_gradient(
    objective: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        optimize_input(Net(), rand(4, 5, seed=1), objective)


def test_a_model_without_a_gradient() -> None:
    class Shut(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    x = rand(4, 5, seed=1)
    with pytest.raises(ValueError, match="the objective has no gradient"):
        optimize_input(Shut(), x, squared)
    found = optimize_input(Detached(), x, squared)
    assert "whether the model detaches x" in found.report()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        optimize_input(Net(), x, squared)


def test_what_is_no_tensor() -> None:
    x = rand(4, 5, seed=1)
    with pytest.raises(TypeError, match="several inputs go in as one"):
        optimize_input(Net(), (x, x), squared)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor of booleans, one per row, got bool"):
        optimize_input(Net(), x, squared, stop=lambda _: True)  # type: ignore[arg-type, return-value]
    listed: Any = [0, 0, 1, 1]
    with pytest.raises(TypeError, match="tensor of integers, got list"):
        optimize_input(Net(), x, squared, variables=["head.bias"], groups=listed)
    flags = torch.tensor([False, False, True, True])
    with pytest.raises(ValueError, match=r"one integer per row, shape \(4,\), got torch.bool"):
        optimize_input(Net(), x, squared, variables=["head.bias"], groups=flags)
    with pytest.raises(TypeError, match="a list of names, got the string 'head'"):
        optimize_input(Net(), x, squared, variables="head")
    with pytest.raises(TypeError, match=r"max_iter must be an integer, got 2\.5"):
        Joint(max_iter=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tol must not be negative"):
        Joint(tol=-1.0)


def test_unknown_variables() -> None:
    x = rand(4, 4, seed=1)
    with pytest.raises(ValueError, match=r"\['contxt'\] given, there are context, encoder"):
        optimize_input(Context(), x, squared, variables=["contxt"])
    with pytest.raises(ValueError, match="an empty list given"):
        optimize_input(Context(), x, squared, variables=[])


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (torch.tensor([0, 0, 1]), r"shape \(4,\), got torch.int64 \(3,\)"),
        (torch.tensor([0.0, 0.0, 1.0, 1.0]), r"got torch.float32 \(4,\)"),
        (torch.tensor([[0, 0, 1, 1]]), r"shape \(4,\)"),
        (torch.tensor([0, 0, 2, 2]), r"without gaps, got \[0, 2\]"),
        (torch.tensor([-1, 0, 0, 1]), r"without gaps, got \[-1, 0, 1\]"),
        (torch.tensor([1, 1, 1, 1]), r"without gaps, got \[1\]"),
    ],
)
def test_bad_groups(groups: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optimize_input(Context(), rand(4, 4, seed=1), squared, variables=["context"], groups=groups)


def test_groups_need_variables_and_room_for_them() -> None:
    x, groups = rand(4, 4, seed=1), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="it needs variables="):
        optimize_input(Context(), x, squared, groups=groups)
    with pytest.raises(ValueError, match=r"leading dimension of 1.*head\.weight does not"):
        optimize_input(Context(), x, squared, groups=groups, variables=["context", "head.weight"])


def test_settings_of_a_wrong_kind() -> None:
    x = rand(2, 5, seed=1)
    with pytest.raises(TypeError, match=r"method must be Joint\(\.\.\.\) or Nested"):
        optimize_input(Net(), x, squared, method="joint")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verify must be Anderson"):
        optimize_input(Net(), x, squared, verify=1e-5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"constraint must be an L2Ball.*got float"):
        optimize_input(Net(), x, squared, constraint=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword"):
        optimize_input(Net(), x, squared, iterations=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="radius must be finite and not negative"):
        optimize_input(Net(), x, squared, constraint=L2Ball(-0.1))
    with pytest.raises(ValueError, match="mask has shape"):
        optimize_input(Net(), x, squared, constraint=L2Ball(0.1, mask=torch.ones(4)))


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


def test_any_output_the_objective_understands() -> None:
    """A dict with nested tuples, not a tensor."""

    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.net(x)
            return {"y": y, "parts": (y[:, :1], [y[:, 1:]])}

    x = rand(4, 5, seed=1)
    plain = optimize_input(Net(), x, squared, constraint=L2Ball(0.5))
    rich = optimize_input(Rich(), x, lambda out: squared(out["y"]), constraint=L2Ball(0.5))
    torch.testing.assert_close(rich.x, plain.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rich.output["parts"][1][0], plain.output[:, 1:])


class Ordered(OrderedDict[str, Any]):
    """A dict of a class of its own."""


@dataclass
class Record:
    """One tensor under a name."""

    y: Tensor


class Pair(NamedTuple):
    """Two of them."""

    y: Tensor
    total: Tensor


@pytest.mark.parametrize(
    ("pack", "get"),
    [
        (lambda y: y, lambda out: out),
        (lambda y: Record(y), lambda out: out.y),
        (lambda y: Pair(y, y.sum()), lambda out: out.y),
        (lambda y: Ordered(y=y, mean=y.mean(), table=y.new_zeros(3, 2)), lambda out: out["y"]),
    ],
)
def test_an_output_of_any_kind_is_that_of_the_returned_x(pack: Any, get: Any) -> None:
    """Also where some rows fall back to their start, and what is no tensor by rows."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Any:
            return pack(self.net(x))

    def objective(out: Any) -> Tensor:
        return squared(get(out))

    x = rand(8, 5, seed=1)
    wild = Joint(max_iter=1, step_size=20.0)
    found = optimize_input(Packed(), x, objective, method=wild, constraint=L2Ball(5.0))
    fallen = (found.x == x).flatten(1).all(1)
    assert bool(fallen.any())
    assert not bool(fallen.all())
    with torch.no_grad():
        expected = Packed()(found.x)
    for output in (found.output, found.stats.model_output):
        assert type(output) is type(expected)
        torch.testing.assert_close(get(output), get(expected), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(objective(output), found.value, rtol=1e-6, atol=1e-7)
    if isinstance(expected, (Pair, Ordered)):
        names = ("total",) if isinstance(expected, Pair) else ("mean", "table")
        for name in names:
            own, other = (
                getattr(out, name) if isinstance(out, Pair) else out[name]
                for out in (found.output, expected)
            )
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Picard, Broyden])
def test_any_verifier(kind: Any) -> None:
    model, x, solver = Net(), rand(4, 5, seed=1), kind(max_iter=500, tol=1e-9)
    usual = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    other = optimize_input(model, x, squared, constraint=L2Ball(0.5), verify=solver)
    torch.testing.assert_close(other.value, usual.value, rtol=1e-7, atol=1e-8)


def test_a_starting_point_outside_the_set_is_brought_in() -> None:
    model, x = Net(), 3 * rand(4, 5, seed=1)
    solution = optimize_input(model, x, squared, constraint=Box(-0.5, 0.5))
    assert float(solution.x.abs().max()) <= 0.5
    center = torch.zeros(4, 5).double()
    solution = optimize_input(model, x, squared, constraint=L2Ball(0.5, center))
    assert float(solution.x.norm(dim=1).max()) <= 0.5 * (1 + 1e-6)


# Cells that are slow to settle ------------------------------------------------------------------


class Sluggish(nn.Module):
    """``z -> z + d (c(z, u) − z)``: the fixed point of c, approached at the rates ``1 − d``."""

    def __init__(self, d: Tensor, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("d", d)
        self.cell = cell

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return z + self.d * ((u if self.cell is None else self.cell(z, u)) - z)


SLOW = {
    "tanh": Sluggish(torch.full((64,), 0.02).double(), TanhCell(64, 0.8, 2)),
    "spread": Sluggish(torch.logspace(-2, -1, 64).double()),
    "two rates": Sluggish(torch.tensor([0.01] * 8 + [0.5] * 56).double()),
}


@pytest.mark.parametrize("tol", [1e-4, 1e-9])  # the latter is the verification's
@pytest.mark.parametrize(
    "method", [Joint(), Nested(max_iter=4), Nested(max_iter=4, warm_start=True)]
)
@pytest.mark.parametrize("constraint", [None, L2Ball(0.3), LinfBall(0.1)])
@pytest.mark.parametrize("cell", SLOW.values(), ids=SLOW)
def test_no_sample_of_a_slow_cell_is_worse_than_its_start(
    cell: nn.Module, constraint: Any, method: Any, tol: float
) -> None:
    """Its residual says little of how far off the start's running loss is."""
    model = Equilibrium(cell, solver=Anderson(max_iter=500, tol=tol))
    x = rand(8, 64, seed=1)
    with torch.no_grad():
        target = model(x) + 0.01 * rand(8, 64, seed=2)

    def objective(z: Tensor) -> Tensor:
        return (z - target).square().sum(1)

    start = optimize_input(model, x, objective, constraint=L2Ball(0.0)).value
    found = optimize_input(model, x, objective, constraint=constraint, method=method)
    assert bool((found.value <= start * (1 + 1e-5)).all())
