"""On a CUDA device: no host synchronisation inside the loops, and the CPU's results."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from jiio_plugins import (
    Anderson,
    Box,
    Broyden,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    Picard,
    attack,
    is_adversarial,
    optimize_input,
    solve_fixed_point,
)
from jiio_plugins.data.classification import load_digits
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import ParameterVariable, Variable
from jiio_plugins.models import load_pretrained
from tests.cases import NETWORKS, PLAIN_NETWORKS, squared
from tests.helpers import PROBLEMS, Context, Net, rand

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONSTRAINTS = {
    "free": None,
    "box": Box(-0.8, 0.8),
    "l2": L2Ball(0.5),
    "l2 in a box": Intersection(L2Ball(0.5), Box(-0.9, 0.9)),
    "l1 in a box": Intersection(L1Ball(1.0), Box(-0.9, 0.9)),
    "linf in a box": Intersection(LinfBall(0.2), Box(-0.9, 0.9)),
}
every_network = pytest.mark.parametrize("name", PLAIN_NETWORKS)
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    old = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(old)


def started(problem: Problem) -> None:
    """Let the libraries allocate what they allocate once."""
    Joint(max_iter=2).run(problem)
    problem.solve(problem.v_start)


def test_the_debug_mode_sees_a_synchronisation() -> None:
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device="cuda").sum().item()


@every_constraint
@every_network
def test_the_joint_loop_never_waits(name: str, constraint: Any) -> None:
    model, x = NETWORKS[name]().cuda().eval(), (0.3 * rand(16, 5, seed=1)).clamp(-0.9, 0.9).cuda()
    variable = Variable(model.requires_grad_(False), x)
    problem = Problem(variable, squared, constraint)
    started(problem)
    with no_synchronisation():
        result = Joint(max_iter=12).run(problem, stop=lambda y: y[:, 0] > 100)
    assert bool(torch.isfinite(result.v).all())


def test_the_joint_loop_over_groups_never_waits() -> None:
    model, x = Context().cuda().eval().requires_grad_(False), rand(20, 4, seed=1).cuda()
    groups = torch.arange(4).repeat(5).cuda()
    variable = ParameterVariable(model, x, ["context"], groups)
    for constraint in (None, L2Ball(0.5)):
        problem = Problem(variable, squared, constraint)
        started(problem)
        with no_synchronisation():
            Joint(max_iter=12).run(problem)


def test_the_joint_loop_on_digits_never_waits() -> None:
    x = load_digits("test")[0][:16].cuda()
    model = load_pretrained("digits").cuda().requires_grad_(False)
    ball = Intersection(L2Ball(1.0), Box(0.0, 1.0))
    problem = Problem(Variable(model, x), lambda y: -y.logsumexp(1), ball)
    started(problem)
    with no_synchronisation():
        Joint(max_iter=8).run(problem)


@pytest.mark.parametrize("norm", [2, torch.inf])
def test_a_captured_loop_is_the_same(norm: float) -> None:
    x = load_digits("test")[0][:16].cuda()
    model = load_pretrained("digits").cuda().requires_grad_(False)
    ball = Intersection(L2Ball(1.0) if norm == 2 else LinfBall(0.1), Box(0.0, 1.0))
    found = []
    for capture in (False, True):
        problem = Problem(Variable(model, x), lambda y: -y.logsumexp(1), ball)
        method = Joint(max_iter=20, max_state_steps=2, capture=capture)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that it cannot be captured
            found.append((method.run(problem), problem))
    (plain, one), (captured, other) = found
    torch.testing.assert_close(captured.loss_best, plain.loss_best, rtol=1e-5, atol=1e-5)
    assert torch.equal(other.vjps, one.vjps)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()])
@every_network
def test_a_plain_call_never_waits(name: str, solver: Any) -> None:
    model, x = NETWORKS[name](solver=solver).cuda(), rand(16, 5, seed=1).cuda()
    with torch.no_grad():
        model(x)
        with no_synchronisation():
            model(x)


def test_forward_and_backward_never_wait() -> None:
    model, x = Net(solver=Anderson(tol=1e-8)).cuda(), rand(16, 5, seed=1).cuda().requires_grad_()
    model(x).sum().backward()
    with no_synchronisation():
        model(x).sum().backward()


# Agreement --------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("kind", [Anderson, Broyden])
def test_solvers_agree_with_the_cpu(problem: Any, kind: Any) -> None:
    solver = kind(max_iter=problem.budget, tol=problem.tol)
    cpu = solve_fixed_point(problem.f, problem.z0, solver)
    cell, u, z0 = copy.deepcopy(problem.cell).cuda(), problem.u.cuda(), problem.z0
    z0 = tuple(t.cuda() for t in z0) if isinstance(z0, tuple) else z0.cuda()
    gpu = solve_fixed_point(lambda z: cell(z, u), z0, solver)
    assert gpu.status.tolist() == cpu.status.tolist()
    tolerance = 4 * problem.tol * min(problem.condition, 1e6)
    parts = zip(gpu.z, cpu.z, strict=True) if isinstance(z0, tuple) else [(gpu.z, cpu.z)]
    for on_gpu, on_cpu in parts:
        torch.testing.assert_close(
            on_gpu.cpu()[cpu.converged], on_cpu[cpu.converged], rtol=tolerance, atol=tolerance
        )


@every_network
def test_gradients_agree_with_the_cpu(name: str) -> None:
    x = rand(6, 5, seed=1)
    grads = []
    for device in ("cpu", "cuda"):
        model = NETWORKS[name]().to(device)
        v = x.to(device).requires_grad_()
        grads.append(
            [
                g.cpu()
                for g in torch.autograd.grad(squared(model(v)).sum(), [v, *model.parameters()])
            ]
        )
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-10)


@every_constraint
@every_network
@pytest.mark.parametrize("method", [Joint(), Nested(solver=Anderson(tol=1e-5))])
def test_optimize_input_agrees_with_the_cpu(name: str, constraint: Any, method: Any) -> None:
    x, target = (0.3 * rand(16, 5, seed=1)).clamp(-0.9, 0.9), rand(3, seed=2)
    results = []
    for device in ("cpu", "cuda"):
        goal = target.to(device)
        model = NETWORKS[name](seed=1).to(device)
        results.append(
            optimize_input(
                model,
                x.to(device),
                lambda y, goal=goal: (y - goal).square().sum(1),
                method=method,
                constraint=constraint,
            )
        )
    cpu, gpu = results
    torch.testing.assert_close(gpu.x.cpu(), cpu.x, rtol=0, atol=1e-7)
    torch.testing.assert_close(gpu.value.cpu(), cpu.value, rtol=1e-6, atol=1e-8)
    assert gpu.status.tolist() == cpu.status.tolist()
    torch.testing.assert_close(gpu.stats.vjps.cpu(), cpu.stats.vjps)


def test_an_attack_on_digits_agrees_with_the_cpu() -> None:
    x, y = load_digits("test")
    x, y = x[:8].double(), y[:8]
    results = []
    for device in ("cpu", "cuda"):
        model = load_pretrained("digits").double().to(device)
        results.append(
            attack(model, x.to(device), y.to(device), norm=2, eps=1.0, lower=0.0, upper=1.0)
        )
    cpu, gpu = results
    assert gpu.x.device.type == "cuda"
    torch.testing.assert_close(gpu.value.cpu(), cpu.value, rtol=1e-3, atol=1e-3)
    assert is_adversarial(gpu, y.cuda()).tolist() == is_adversarial(cpu, y).tolist()


def test_the_callers_generators_are_left_alone() -> None:
    model, x = Net().cuda(), rand(4, 5, seed=1).cuda()
    states = (torch.get_rng_state(), torch.cuda.get_rng_state())
    optimize_input(model, x, squared, constraint=L2Ball(0.5), training_mode=True)
    attack(model, x, torch.tensor([0, 1, 2, 0]).cuda(), norm=2, eps=0.1, random_starts=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


def test_autocast() -> None:
    net, x = Net(solver=Anderson(tol=1e-2)).float().cuda(), rand(4, 5, seed=1).float().cuda()
    for dtype in (torch.float16, torch.bfloat16):
        v = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=dtype):
            loss = net(v).float().square().sum()
            solution = optimize_input(
                net, x, lambda y: y.float().square().sum(1), constraint=L2Ball(0.5)
            )
        loss.backward()
        assert bool(torch.isfinite(v.grad).all())
        assert bool(torch.isfinite(solution.x).all())
        assert solution.x.dtype == torch.float32
