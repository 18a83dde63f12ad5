"""One step of adversarial training: its loss, its gradient, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from jiio_plugins import Joint, Nested, count_evaluations, jacobian_penalty
from jiio_plugins.adversarial.step import AdversarialTraining
from tests.helpers import TIGHT, Net, rand

Y = torch.tensor([0, 2, 1, 2])
BOX: dict[str, Any] = {"norm": 2, "eps": 0.5, "jacobian_weight": 0.0}


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("method", [Joint(max_iter=10), Nested(max_iter=10, warm_start=True)])
def test_loss_and_gradient_are_those_at_the_adversarial_examples(norm: float, method: Any) -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1).clamp(-1, 1)
    training = AdversarialTraining(
        **{**BOX, "norm": norm}, lower=-1.0, upper=1.0, method=method, refine=TIGHT
    )
    step = training(model, x, Y)
    found = step.solution.x
    assert float(torch.linalg.vector_norm(found - x, norm, dim=1).max()) <= 0.5 * (1 + 1e-9)
    assert float(found.abs().max()) <= 1
    exact = cross_entropy(model(found), Y)
    torch.testing.assert_close(step.loss, exact, rtol=1e-9, atol=1e-12)
    mine, theirs = flat_gradient(model, step.loss), flat_gradient(model, exact)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    assert bool(exact > cross_entropy(model(x), Y))
    assert torch.equal(step.robust, model(found).argmax(1) == Y)
    assert step.clean is not None
    assert torch.equal(step.clean, model(x).argmax(1) == Y)
    assert step.penalty is None


def test_without_refinement_it_costs_one_evaluation_and_one_vjp_more_than_the_search() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    with count_evaluations() as counter:
        step = AdversarialTraining(**BOX)(model, x, Y)
        step.loss.backward()
    assert counter.f_evals == float(step.solution.f_evals.sum()) + 4
    assert counter.vjps == float(step.solution.vjps.sum()) + 4


def test_trades() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    step = AdversarialTraining(**BOX, trades=3.0, refine=TIGHT)(model, x, Y, generator=generator())
    clean, adversarial = model(x), model(step.solution.x)
    divergence = kl_div(
        log_softmax(adversarial, 1), log_softmax(clean, 1), reduction="batchmean", log_target=True
    )
    exact = cross_entropy(clean, Y) + 3.0 * divergence
    assert bool(divergence > 0.01)
    torch.testing.assert_close(step.loss, exact, rtol=1e-8, atol=1e-11)
    mine, theirs = flat_gradient(model, step.loss), flat_gradient(model, exact)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    assert step.clean is not None
    assert torch.equal(step.clean, clean.argmax(1) == Y)


def test_a_share_of_the_batch_stays_clean() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    step = AdversarialTraining(**BOX, ratio=0.5, refine=TIGHT)(model, x, Y)
    assert torch.equal(step.solution.x[2:], x[2:])
    assert bool(((step.solution.x - x)[:2].norm(dim=1) > 0.4).all())
    assert step.robust.shape == (2,)
    torch.testing.assert_close(
        step.loss, cross_entropy(model(step.solution.x), Y), rtol=1e-9, atol=1e-12
    )


def test_random_starts_follow_the_generator() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    training = AdversarialTraining(**BOX, random_start=True, method=Joint(max_iter=2))
    state = torch.get_rng_state()
    steps = [training(model, x, Y, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(steps[0].solution.x, steps[1].solution.x)
    assert not torch.equal(steps[0].solution.x, steps[2].solution.x)
    assert steps[0].clean is None
    assert torch.equal(state, torch.get_rng_state())


def test_a_search_that_takes_up_an_earlier_one_starts_there() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    training = AdversarialTraining(**BOX, random_start=True)
    first = training(model, x, Y, generator=generator())
    seen: list[Tensor] = []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    second = training.carried()(model, x, Y, start=first.solution.x, generator=generator(1))
    hook.remove()
    torch.testing.assert_close(seen[0].detach(), first.solution.x, rtol=1e-12, atol=1e-12)
    assert second.clean is None
    # at three steps the loss is what the search of seven had found, if not more
    assert bool(second.loss > first.loss - 0.01)
    assert float(second.solution.f_evals.mean()) < 0.8 * float(first.solution.f_evals.mean())
    outside = training(model, x, Y, start=x + 9.0)
    assert float((outside.solution.x - x).norm(dim=1).max()) <= 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("trades", [None, 3.0])
def test_a_step_ahead_is_one_of_eps_along_the_exact_gradient(
    norm: float, trades: float | None
) -> None:
    model, x, at = Net(seed=3), rand(4, 5, seed=1), generator()
    training = AdversarialTraining(
        **{**BOX, "norm": norm},
        trades=trades,
        refine=TIGHT,
        method=Joint(max_iter=1, step_size=0.3),
    )
    step = training(model, x, Y, generator=at, ahead=True)
    assert not step.solution.x.requires_grad
    (7.0 * step.loss).backward()  # as a gradient scaler does
    seen = step.solution.x.clone().requires_grad_()
    search = training.adversary(Y, None if trades is None else model(x).detach())
    (gradient,) = torch.autograd.grad(search(model(seen)).sum(), seen)
    set_ = training.region(x).bind(x)
    exact = seen.detach() + 0.5 * set_.descent_direction(gradient, seen.detach())
    torch.testing.assert_close(step.ahead(), set_.project(exact), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(step.ahead(), step.solution.x)


def test_a_step_ahead_costs_nothing_and_changes_nothing_else() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    gradients, costs = [], []
    for ahead, words in ((False, "ahead=True"), (True, r"call loss\.backward\(\) first")):
        with count_evaluations() as counter:
            step = AdversarialTraining(**BOX, ratio=0.5)(model, x, Y, ahead=ahead)
            with pytest.raises(RuntimeError, match=words):
                step.ahead()
            gradients.append(flat_gradient(model, step.loss))
        costs.append((counter.f_evals, counter.vjps))
    assert costs[0] == costs[1]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(step.ahead()[2:], x[2:])  # not attacked
    step = AdversarialTraining(**BOX, ratio=0.5)(model, x, Y, ahead=True)
    (math.inf * step.loss).backward()  # a scaler's pass that overflowed
    assert torch.equal(step.ahead(), step.solution.x)


def test_state_and_adjoint_are_refined_by_numbers_of_their_own() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    with count_evaluations() as counter:
        step = AdversarialTraining(**BOX, refine=(3, 0))(model, x, Y)
        step.loss.backward()
    assert counter.f_evals == float(step.solution.f_evals.sum()) + 4 * (1 + 3)
    assert bool((step.residual < 0.1 * step.solution.z_residual).all())
    plain = AdversarialTraining(**BOX)(model, x, Y)
    assert torch.equal(plain.residual, plain.solution.z_residual)
    assert counter.vjps == float(step.solution.vjps.sum()) + 4


def test_by_default_a_cell_that_is_easy_pays_no_penalty() -> None:
    x = 0.2 * rand(4, 5, seed=1)
    for rate, easy in ((0.4, True), (2.0, False)):
        model = Net(seed=3, rate=rate)
        plain = AdversarialTraining(**BOX)(model, x, Y)
        training = AdversarialTraining(**{**BOX, "jacobian_weight": None})
        step = training(model, x, Y, generator=generator())
        assert step.penalty is not None
        assert (float(step.penalty) < 0.4) == easy
        paid = (step.penalty - 0.4).clamp(min=0)
        torch.testing.assert_close(step.loss, plain.loss + paid, rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", [0, 4])
def test_the_jacobian_penalty_is_added_and_training_on_it_lowers_it(power: int) -> None:
    model, x = Net(seed=3, rate=0.9), rand(4, 5, seed=1)
    plain = AdversarialTraining(**BOX)(model, x, Y)
    box = {**BOX, "jacobian_weight": 2.0}
    training = AdversarialTraining(
        **box, jacobian_probes=50 if not power else 2, jacobian_power=power
    )
    step = training(model, x, Y, generator=generator())
    assert step.penalty is not None
    with count_evaluations() as counter:
        again = training(model, x, Y, generator=generator())
    probes = training.jacobian_probes
    spent = float(again.solution.vjps.sum()) + 4 * probes * (2 + power)
    assert counter.vjps == spent
    torch.testing.assert_close(step.loss, plain.loss + 2.0 * step.penalty, rtol=1e-9, atol=0)
    if not power:  # near the equilibrium at the image, so of the size that it has there
        layer, u = model.equilibrium, model.encoder(x)
        there = jacobian_penalty(layer.cell, layer(u), u, probes=500, generator=generator())
        assert float(step.penalty) == pytest.approx(float(there.detach()), rel=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for k in range(20):
        optimizer.zero_grad()
        training(model, x, Y, generator=generator(k)).loss.backward()
        optimizer.step()
    after = training(model, x, Y, generator=generator()).penalty
    assert after is not None
    assert float(after) < 0.8 * float(step.penalty)


def test_a_plain_loop_makes_a_network_robust() -> None:
    model, x = Net(seed=3), rand(60, 5, seed=5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    training = AdversarialTraining(norm=2, eps=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    robust, losses = [], []
    for _ in range(30):
        step = training(model, x, y)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        robust.append(float(step.robust.double().mean()))
        losses.append(float(step.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert robust[-1] > robust[0] + 0.2


def test_nothing_of_the_callers_is_changed() -> None:
    model, x = Net(seed=3).train(), rand(4, 5, seed=1)
    state, kept = torch.get_rng_state(), x.clone()
    AdversarialTraining(**BOX)(model, x, Y)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(kept, x)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"norm": 3}, ValueError, "1, 2 or inf"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"eps": math.nan}, ValueError, "eps must be"),
        ({"method": "joint"}, TypeError, "Joint"),
        ({"ratio": 0.0}, ValueError, "ratio must be"),
        ({"ratio": 1.5}, ValueError, "ratio must be"),
        ({"trades": -1.0}, ValueError, "trades must be"),
        ({"jacobian_weight": math.inf}, ValueError, "jacobian_weight must be"),
        ({"jacobian_probes": 0}, ValueError, "jacobian_probes"),
        ({"jacobian_power": -1}, ValueError, "jacobian_power must be at least 0"),
        ({"refine": -1}, ValueError, "refine must be"),
        ({"refine": (1, 2, 3)}, ValueError, "a pair of them"),
        ({"refine": (1, -2)}, ValueError, "a pair of them"),
    ],
)
def test_bad_parameters(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdversarialTraining(**{**BOX, **options})


def test_labels_as_probabilities_and_a_norm_by_its_name() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    steps = [
        AdversarialTraining(**{**BOX, "norm": norm})(model, x, y)
        for norm, y in ((math.inf, Y), ("inf", torch.eye(3, dtype=torch.float64)[Y]))
    ]
    torch.testing.assert_close(steps[0].loss, steps[1].loss)
    assert torch.equal(steps[0].robust, steps[1].robust)


def test_bad_input() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    with pytest.raises(ValueError, match="one entry per sample"):
        AdversarialTraining(**BOX)(model, x, Y[:3])
    with pytest.raises(ValueError, match="within the box"):
        AdversarialTraining(**BOX, lower=0.0, upper=1.0)(model, x, Y)
    with pytest.raises(ValueError, match="one value per row"):
        AdversarialTraining(**BOX, loss=cross_entropy)(model, x, Y)
    for trades in (None, 1.0):
        with pytest.raises(
            ValueError, match=r"logits of shape \(4, 3\): Target 1. is out of bounds"
        ):
            AdversarialTraining(**BOX, trades=trades)(model, x, Y + 11)
    with pytest.raises(TypeError, match="start must be real floating point"):
        AdversarialTraining(**BOX)(model, x, Y, start=x.int())
    for images, labels, error, words in (
        (x[0, 0], Y, ValueError, r"x must be batch first, .* got shape \(\)"),
        (x.numpy(), Y, TypeError, "x must be one tensor, got ndarray"),
        (x, Y[0], ValueError, r"one entry per sample \(4\), got 0"),
        (x, Y.numpy(), TypeError, "labels must be a tensor, got ndarray"),
        (x, Y.double(), TypeError, r"probabilities \(4, 3\), got torch.float64 \(4,\)"),
        (x, Y > 0, TypeError, r"integers \(rows,\), .* got torch.bool \(4,\)"),
    ):
        with pytest.raises(error, match=words):
            AdversarialTraining(**BOX)(model, images, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_are_integers_of_any_size(dtype: torch.dtype) -> None:
    model, x, training = Net(seed=3), rand(4, 5, seed=1), AdversarialTraining(**BOX, refine=(1, 0))
    expected, found = (
        training(model, x, y, generator=torch.Generator().manual_seed(0)) for y in (Y, Y.to(dtype))
    )
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.robust, expected.robust)


def test_probabilities_may_be_of_another_precision() -> None:
    model, x = Net(seed=3), rand(4, 5, seed=1)
    for dtype in (torch.float32, torch.float64):
        step = AdversarialTraining(**BOX)(model, x, torch.eye(3, dtype=dtype)[Y])
        assert step.loss.dtype == torch.float64
