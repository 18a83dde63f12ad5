"""The training gradient: against finite differences, and against an exact implicit gradient."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_plugins import (
    Anderson,
    Box,
    Implicit,
    Intersection,
    Joint,
    L2Ball,
    Nested,
    Picard,
    count_evaluations,
    optimize_input,
)
from jiio_plugins.data.classification import load_digits
from jiio_plugins.envelope import JointSolution, envelope_loss, joint_solution
from jiio_plugins.models import load_pretrained
from tests.helpers import TIGHT, Cut, Net, PairNet, Series, rand

if TYPE_CHECKING:
    from collections.abc import Callable

Y = torch.tensor([0, 2, 1, 2])
NETS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: Net(seed=3),
    "skip": lambda: Net(seed=3, skip=True),
    "tuple": lambda: PairNet(seed=4),
    "series": lambda: Series(seed=5),
}
every_net = pytest.mark.parametrize("name", NETS)


def loss_rows(output: Tensor) -> Tensor:
    return cross_entropy(output, Y, reduction="none")


def objective(output: Tensor) -> Tensor:
    return -loss_rows(output)


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    for p in model.parameters():
        p.grad = None
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def solve(model: nn.Module, x: Tensor, radius: float = 0.5, **options: Any) -> JointSolution:
    options = {"method": Joint(max_iter=15), "constraint": L2Ball(radius), **options}
    return joint_solution(model, x, objective, **options)


# The gradient -----------------------------------------------------------------------------------


@every_net
def test_refined_to_the_end_it_is_the_exact_gradient_at_this_x(name: str) -> None:
    model, x = NETS[name](), rand(4, 5, seed=1)
    found = solve(model, x)
    mine = flat_gradient(model, envelope_loss(model, found, objective, refine=TIGHT))
    exact = flat_gradient(model, objective(model(found.x)).mean())
    torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11)


@every_net
def test_after_the_loop_alone_it_is_close_and_each_step_brings_it_closer(name: str) -> None:
    model, x = NETS[name](), rand(4, 5, seed=1)
    found = solve(model, x)
    exact = flat_gradient(model, objective(model(found.x)).mean())
    errors = []
    for refine in (0, 3, 8, 30):
        mine = flat_gradient(model, envelope_loss(model, found, objective, refine=refine))
        errors.append(float((mine - exact).norm() / exact.norm()))
    assert errors[0] < 0.05
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(
    "method", [Joint(max_iter=60, gap_tol=0.0), Nested(max_iter=60, warm_start=True)]
)
def test_the_minimum_has_this_derivative(method: Any) -> None:
    """``d/dθ min_x ℓ`` by finite differences that search for x anew on both sides."""
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x, method=method)
    gradient = flat_gradient(model, envelope_loss(model, found, objective, refine=TIGHT))
    direction = rand(len(gradient), seed=2)
    direction = direction / direction.norm()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    values = []
    for h in (1e-4, -1e-4):
        nn.utils.vector_to_parameters(start + h * direction, model.parameters())
        best = optimize_input(model, x, objective, method=method, constraint=L2Ball(0.5))
        values.append(float(best.value.mean()))
    derivative = (values[0] - values[1]) / 2e-4
    assert derivative == pytest.approx(float(gradient @ direction), rel=2e-3)


def test_what_is_done_to_the_values_afterwards_reaches_the_adjoint() -> None:
    """Sign, scale, weights per sample, and another term on top."""
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x)
    weights = torch.tensor([2.0, -1.0, 0.0, 0.5], dtype=x.dtype)
    for refine in (0, TIGHT):
        rows = [
            flat_gradient(
                model, envelope_loss(model, found, objective, refine=refine, reduction="none")[k]
            )
            for k in range(4)
        ]
        values = envelope_loss(model, found, objective, refine=refine, reduction="none")
        together = flat_gradient(model, -3 * (weights * values).sum())
        expected = -3 * sum(w * g for w, g in zip(weights, rows, strict=True))
        torch.testing.assert_close(together, expected, rtol=1e-8, atol=1e-12)


def test_what_follows_may_send_no_gradient_back() -> None:
    model = Net(seed=3)
    found = solve(model, rand(4, 5, seed=1))
    values = envelope_loss(model, found, objective, reduction="none")
    assert not bool(flat_gradient(model, Cut.apply(values).sum()).any())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: Any) -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x)
    rows = envelope_loss(model, found, objective, reduction="none")
    value = envelope_loss(model, found, objective, reduction=reduction)
    torch.testing.assert_close(value, getattr(rows, reduction)())
    assert rows.shape == (4,)


def test_a_tensor_the_objective_uses_gets_its_gradient() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x)
    scale = torch.tensor(1.5, dtype=x.dtype, requires_grad=True)
    value = envelope_loss(model, found, lambda output: scale * objective(output))
    value.backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad * 1.5, value.detach())


def test_float32_on_the_shipped_digits_classifier() -> None:
    """Cosine to the exact gradient, all batches of 50: the loop alone, and refined."""
    images, labels = load_digits("test")
    model = load_pretrained("digits")
    layer: Any = model.equilibrium
    plain, refined = [], []
    for batch in range(10):
        rows = slice(50 * batch, 50 * batch + 50)
        x, y = images[rows], labels[rows]

        def loss(output: Tensor, y: Tensor = y) -> Tensor:
            return -cross_entropy(output, y, reduction="none")

        ball = Intersection(L2Ball(0.6), Box(0.0, 1.0))
        found = joint_solution(model, x, loss, method=Joint(max_iter=10), constraint=ball)
        layer.solver = Anderson(max_iter=300, tol=1e-6)
        layer.adjoint = Implicit(solver=Anderson(max_iter=300, tol=1e-5))
        exact = flat_gradient(model, loss(model(found.x)).mean())
        plain.append(cosine(exact, flat_gradient(model, envelope_loss(model, found, loss))))
        gradient = flat_gradient(model, envelope_loss(model, found, loss, refine=8))
        refined.append(cosine(exact, gradient))
    assert statistics.median(plain) >= 0.98, plain
    assert statistics.median(refined) >= 0.999, refined


# The loop ---------------------------------------------------------------------------------------


def test_it_is_the_loop_of_optimize_input_without_the_verification() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    with count_evaluations() as counter:
        found = solve(model, x)
    verified = optimize_input(
        model, x, objective, method=Joint(max_iter=15), constraint=L2Ball(0.5)
    )
    assert torch.equal(found.x, verified.x)
    assert torch.equal(found.vjps, verified.stats.vjps)
    assert bool((found.f_evals <= verified.stats.f_evals).all())
    assert counter.f_evals == float(found.f_evals.sum())
    assert counter.vjps == float(found.vjps.sum())
    assert counter.verification_f_evals == 0
    assert float((found.x - x).norm(dim=1).max()) <= 0.5 * (1 + 1e-12)
    assert bool((found.z_residual < 0.1).all())
    assert bool((found.costate_residual < 0.1).all())
    assert found.z.shape == found.costate.shape == (4, 8)
    assert not found.z.requires_grad


def test_the_pass_is_one_evaluation_and_one_vjp_per_sample() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x)
    with count_evaluations() as counter:
        envelope_loss(model, found, objective).backward()
    assert (counter.f_evals, counter.vjps) == (4, 4)
    with count_evaluations() as counter:
        envelope_loss(model, found, objective, refine=Picard(max_iter=3, tol=0.0)).backward()
    assert (counter.f_evals, counter.vjps) == (4 + 12, 4 + 12)


def test_a_solution_can_be_carried_on() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    first = solve(model, x)
    again = joint_solution(
        model,
        x,
        objective,
        method=Joint(max_iter=3, step_size=0.0),
        constraint=L2Ball(0.5),
        start=first,
    )
    torch.testing.assert_close(again.x, first.x, rtol=0, atol=1e-12)
    assert bool((again.z_residual < first.z_residual).all())
    assert bool((again.costate_residual < first.costate_residual).all())
    assert bool((again.f_evals < 10).all())


def test_without_a_warm_up_a_state_to_start_with_is_taken_as_it_is() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    first = solve(model, x)
    method = Joint(max_iter=3, step_size=0.0, state_steps=1, warmup=0)
    counts = {}
    for name, start in (("state", first), ("none", None)):
        found = joint_solution(
            model, x, objective, method=method, constraint=L2Ball(0.5), start=start
        )
        counts[name] = found.f_evals.tolist()
    assert counts == {"state": [3.0] * 4, "none": [4.0] * 4}


def test_steps_on_the_state_do_not_run_the_rest_of_the_network() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    calls = dict.fromkeys(("encoder", "equilibrium.cell", "head"), 0)

    def count_calls(name: str) -> None:
        calls[name] += 1

    for name in calls:
        part = model.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: count_calls(name))
    method = Joint(max_iter=4, state_steps=3, warmup=2)
    found = joint_solution(model, x, objective, method=method, constraint=L2Ball(0.5))
    assert calls == {"encoder": 5, "equilibrium.cell": 2 + 1 + 3 * 3, "head": 5}
    assert found.f_evals.tolist() == [12.0] * 4


def test_a_start_is_projected_on_the_set_around_x() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x, start=x + 10.0)
    assert float((found.x - x).norm(dim=1).max()) <= 0.5 * (1 + 1e-12)


def test_nothing_of_the_callers_is_changed() -> None:
    model, x = Net(seed=3).train(), rand(4, 5, seed=1)
    model.head.weight.requires_grad_(False)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    found = solve(model, x)
    assert all(p.grad is None for p in model.parameters())
    envelope_loss(model, found, objective).backward()
    assert model.training
    assert model.head.weight.grad is None
    assert not model.head.weight.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        assert torch.equal(kept[name], p)


# Bad input --------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    found = solve(model, x)
    with pytest.raises(TypeError, match="method must be Joint"):
        joint_solution(model, x, objective, method="joint")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="constraint must be"):
        joint_solution(model, x, objective, constraint=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no samples"):
        joint_solution(model, x[:0], objective)
    with pytest.raises(ValueError, match="shape of x"):
        solve(model, x, start=x[:2])
    with pytest.raises(TypeError, match="start must be"):
        solve(model, x, start="here")
    with pytest.raises(ValueError, match="state must be of the rows of x, 2, got 4"):
        solve(model, x[:2], state=found.flat)
    with pytest.raises(ValueError, match="reduction must be"):
        envelope_loss(model, found, objective, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refine must be"):
        envelope_loss(model, found, objective, refine=-1)
    with pytest.raises(TypeError, match="joint_solution"):
        envelope_loss(model, x, objective)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one value per row"):
        envelope_loss(model, found, lambda output: objective(output).mean())
    with pytest.raises(ValueError, match="the model and the rows"):
        envelope_loss(PairNet(seed=1), found, objective)
    with pytest.raises(ValueError, match="the model and the rows"):
        envelope_loss(Series(seed=1), found, objective)
    value = envelope_loss(model, found, objective)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(value, list(model.parameters()), create_graph=True)
