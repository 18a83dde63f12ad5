"""``attack``: what it returns lies in the set, is what it says, and is as strong as can be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Broyden,
    Joint,
    Nested,
    Solution,
    Stats,
    Status,
    attack,
    attack_objective,
    count_evaluations,
    is_adversarial,
    solve_fixed_point,
)
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import load_pretrained
from tests.cases import LOSSES, NORMS, every_loss, every_norm
from tests.helpers import Net, independent_output, rand


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = load_digits("test")
    return load_pretrained("digits"), x[:12], y[:12]


def assert_inside(
    x: Tensor,
    start: Tensor,
    norm: float,
    eps: float | Tensor,
    *,
    box: bool = True,
    mask: Tensor | None = None,
) -> None:
    """Ball to ε(1 + 1e-6) plus the rounding of x itself; box and mask exactly."""
    delta = (x.double() - start.double()).flatten(1)
    size = torch.linalg.vector_norm(delta, ord=norm, dim=1)
    unit = 2.0**-23 if x.dtype == torch.float32 else 2.0**-52
    rounding = unit * x.abs().max().double() * delta.shape[1] ** (1 / norm)
    radius = torch.as_tensor(eps).double()
    assert bool((size <= radius * (1 + 1e-6) + rounding).all())
    if box:
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
    if mask is not None:
        assert torch.equal(torch.where(mask.bool(), start, x), start)


def tight_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits by another solver, beyond the verification's tolerance.

    Not by plain iteration: at some adversarial images it ends in a cycle.
    """
    old = model.equilibrium.solver
    try:
        model.equilibrium.solver = Broyden(max_iter=300, tol=1e-6)
        with torch.no_grad():
            return model(x)
    finally:
        model.equilibrium.solver = old


# On a trained classifier ------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
@every_loss
@every_norm
def test_digits(digits: Any, norm: float, loss: Any, targeted: bool) -> None:
    model, x, y = digits
    labels = (y + 1) % 10 if targeted else y
    solution = attack(
        model,
        x,
        labels,
        norm=norm,
        eps=NORMS[norm],
        loss=loss,
        targeted=targeted,
        lower=0.0,
        upper=1.0,
        method=Joint(max_iter=20),
    )
    assert_inside(solution.x, x, norm, NORMS[norm])
    logits = tight_logits(model, solution.x)
    objective = attack_objective(loss, labels, targeted)
    # a value is verified whether or not the search followed the gradient to its end
    done = solution.converged | (solution.status == Status.GRADIENT_UNSETTLED)
    # under so much noise the search finds images at which the cell has no fixed point to be found
    u = model.encoder(solution.x)
    start = model.equilibrium.initial_state(u)
    alone = solve_fixed_point(
        lambda z: model.equilibrium.cell(z, u), start, Anderson(max_iter=200, tol=1e-5)
    )
    unverified = solution.status == Status.NOT_VERIFIED
    assert not bool((alone.converged & unverified).any())
    assert int((done | ~alone.converged).sum()) >= 11
    assert int(done.sum()) >= 10
    torch.testing.assert_close(solution.value[done], objective(logits)[done], rtol=1e-2, atol=1e-2)
    clean = objective(tight_logits(model, x))
    assert bool((solution.value <= clean + 1e-3).all())
    # success is what model(x) says and what the tight solve says
    with torch.no_grad():
        own = model(solution.x).argmax(1)
    fooled = [(p == labels) if targeted else (p != labels) for p in (own, logits.argmax(1))]
    told = is_adversarial(solution, labels, targeted)
    assert torch.equal(told[done], (fooled[0] & fooled[1])[done])
    if targeted:
        assert float(solution.value.mean()) < float(clean.mean())
    else:
        assert float(is_adversarial(solution, labels).float().mean()) > 0.9


@every_norm
def test_a_stronger_attack_has_a_lower_value(digits: Any, norm: float) -> None:
    model, x, y = digits
    means = [
        float(
            attack(
                model,
                x,
                y,
                norm=norm,
                eps=scale * NORMS[norm],
                lower=0.0,
                upper=1.0,
                method=Joint(max_iter=15),
            ).value.mean()
        )
        for scale in (0.0, 0.1, 0.3, 1.0)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 1.0


def test_epsilon_and_mask_per_sample(digits: Any) -> None:
    model, x, y = digits
    eps = torch.linspace(0, 1.5, len(x))
    mask = torch.zeros_like(x)
    mask[:, :, 2:6, 2:6] = 1
    for m in (mask, mask.bool(), mask[0]):
        for norm in (1.0, 2.0, math.inf):
            solution = attack(
                model,
                x,
                y,
                norm=norm,
                eps=eps,
                mask=m,
                lower=0.0,
                upper=1.0,
                method=Joint(max_iter=8),
            )
            assert_inside(solution.x, x, norm, eps, mask=m.expand_as(x))
            assert torch.equal(solution.x[0], x[0])
            assert Status(int(solution.status[0])) == Status.NO_IMPROVEMENT
            moved = (solution.x - x).flatten(1).abs().amax(1)
            assert bool((moved[4:] > 0.01).all())


def test_verified_values_do_not_depend_on_the_batch() -> None:
    """In float32 the paths drift apart by rounding, and one of these rows may find another basin.

    The values of all others may not differ.
    """
    x, y = load_digits("test")
    x, y, model, differ = x[:64], y[:64], load_pretrained("digits"), 0
    for norm, eps in ((2.0, 0.7), (math.inf, 0.08)):
        together = attack(model, x, y, norm=norm, eps=eps, lower=0.0, upper=1.0)
        for i in range(0, 64, 3):
            alone = attack(model, x[[i]], y[[i]], norm=norm, eps=eps, lower=0.0, upper=1.0)
            assert_inside(alone.x, x[[i]], norm, eps)
            one = together.value[[i]]
            if not torch.allclose(alone.value, one, rtol=1e-3, atol=1e-3):
                differ += 1
                torch.testing.assert_close(alone.value, one, rtol=0.2, atol=0.0)
    assert differ <= 1


def test_success_needs_both_judgements() -> None:
    """The model's own answer and the tight solve's: one alone is not enough."""
    right, wrong = [3.0, 0.0], [0.0, 3.0]
    none = torch.zeros(4)
    stats = Stats(none, none, none, none, model_output=torch.tensor([right, wrong, right, wrong]))
    solution = Solution(
        none, none, none, none, none, stats, torch.tensor([right, right, wrong, wrong])
    )
    labels = torch.zeros(4, dtype=torch.long)
    assert is_adversarial(solution, labels).tolist() == [False, False, False, True]
    assert is_adversarial(solution, 1 - labels, targeted=True).tolist() == [False] * 3 + [True]


# Random starts and early stop -------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """A random classifier of five numbers in [0, 1], and the classes it sees."""
    model = Net(seed=4, outputs=4, solver=Anderson(tol=1e-7 if dtype == torch.float64 else 1e-5))
    x = torch.rand(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        model.head.bias -= model(x).mean(0)  # every class is seen
        labels = model(x).argmax(1)
    return model.to(dtype), x.to(dtype), labels


@every_norm
def test_random_starts_keep_the_best(norm: float) -> None:
    model, x, y = small()
    eps = {1.0: 0.2, 2.0: 0.15, math.inf: 0.08}[norm]

    def run(starts: int) -> Solution:
        return attack(
            model,
            x,
            y,
            norm=norm,
            eps=eps,
            lower=0.0,
            upper=1.0,
            random_starts=starts,
            method=Joint(max_iter=5, gap_tol=0.0),
        )

    one, four = run(1), run(4)
    hit_one, hit_four = is_adversarial(one, y), is_adversarial(four, y)
    assert bool((hit_four | ~hit_one).all())
    open_still = ~hit_one & ~hit_four
    assert bool((four.value <= one.value + 1e-9)[open_still].all())
    assert 0 < int(hit_one.sum()) < 16
    # what succeeded is not tried again, and the rest pays for every start
    checked = one.stats.f_evals + one.stats.verification_f_evals  # it decides who starts again
    assert torch.equal(four.stats.f_evals[hit_one], checked[hit_one])
    assert four.stats.iterations[~hit_four].tolist() == [20.0] * int((~hit_four).sum())
    # and where a gradient is in doubt, for the look at it
    spent, least = four.stats.vjps[~hit_four], 4 * one.stats.vjps[~hit_four]
    assert bool(((least <= spent) & (spent < 2 * least)).all())
    assert_inside(four.x, x, norm, eps)
    objective = attack_objective("cross-entropy", y)
    torch.testing.assert_close(
        four.value, objective(independent_output(model, four.x)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("starts", [0, 2])
def test_retry_is_for_those_that_have_not_succeeded(starts: int) -> None:
    model, x, y = small()
    common: dict[str, Any] = {"norm": 2, "eps": 0.15, "lower": 0.0, "upper": 1.0}
    common |= {"random_starts": starts, "method": Joint(max_iter=2, step_size=0.2, gap_tol=0.0)}
    once = attack(model, x, y, **common)
    with count_evaluations() as counter:
        twice = attack(model, x, y, retry=Joint(max_iter=20, gap_tol=0.0), **common)
    hit = is_adversarial(once, y)
    assert 0 < int(hit.sum()) < len(x)
    assert torch.equal(twice.x[hit], once.x[hit])
    assert bool((twice.value <= once.value + 1e-9).all())
    assert int(is_adversarial(twice, y).sum()) > int(hit.sum())
    assert bool((twice.stats.iterations == once.stats.iterations + 20 * ~hit).all())
    # verification chose the samples, so it is paid for
    for name in ("f_evals", "vjps"):
        spent = getattr(once.stats, name) + getattr(once.stats, f"verification_{name}")
        assert torch.equal(getattr(twice.stats, name)[hit], spent[hit])
    assert counter.f_evals == pytest.approx(float(twice.stats.f_evals.sum()))
    assert counter.vjps == pytest.approx(float(twice.stats.vjps.sum()))
    assert counter.verification_f_evals == pytest.approx(0.0)
    assert_inside(twice.x, x, 2.0, 0.15)


def test_random_starts_with_steps_per_sample() -> None:
    """A later start is for those samples only that have not succeeded, and so are its steps."""
    model = load_pretrained("digits")
    x, y = (t[:6] for t in load_digits("test"))
    eps = torch.tensor([0.01, 0.8, 0.01, 0.8, 0.01, 0.8])  # the small ones fail, and start again
    method = Joint(max_iter=8, step_size=torch.linspace(0.5, 1.0, 6))
    found = attack(
        model, x, y, norm=2, eps=eps, lower=0.0, upper=1.0, random_starts=3, method=method
    )
    assert float(found.stats.f_evals[0]) > float(found.stats.f_evals[1])
    assert is_adversarial(found, y).any()


def test_a_ball_that_holds_the_whole_box_is_told() -> None:
    model, x, y = small()
    common: dict[str, Any] = {"lower": 0.0, "upper": 1.0, "method": Joint(max_iter=2)}
    with pytest.warns(UserWarning, match="eps is 8 where the box is 1 wide, so that every image"):
        attack(model, x, y, norm=math.inf, eps=8, **common)
    attack(model, x, y, norm=math.inf, eps=1.0, **common)
    attack(model, x, y, norm=2, eps=8, **common)


def test_random_starts_are_reproducible_and_leave_the_generator_alone() -> None:
    model, x, y = small()
    common: dict[str, Any] = {"norm": 2, "eps": 0.2, "random_starts": 2}
    state = torch.get_rng_state()
    first, second = (attack(model, x, y, **common) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert torch.equal(torch.get_rng_state(), state)
    seeded = attack(model, x, y, generator=torch.Generator().manual_seed(5), **common)
    assert not torch.equal(seeded.x, first.x)
    again = attack(model, x, y, generator=torch.Generator().manual_seed(5), **common)
    assert torch.equal(seeded.x, again.x)


def test_costs_of_random_starts_are_counted() -> None:
    model, x, y = small()
    with count_evaluations() as counter:
        solution = attack(model, x, y, norm=2, eps=0.01, random_starts=3)
    assert not bool(is_adversarial(solution, y).all())
    assert counter.f_evals == pytest.approx(float(solution.stats.f_evals.sum()))
    assert counter.vjps == pytest.approx(float(solution.stats.vjps.sum()))


@pytest.mark.parametrize("method", [Joint(), Nested()])
def test_early_stop_saves_cost_and_loses_no_success(digits: Any, method: Any) -> None:
    model, x, y = digits
    common: dict[str, Any] = {
        "norm": 2,
        "eps": 1.5,
        "lower": 0.0,
        "upper": 1.0,
        "method": method,
    }
    full, early = (attack(model, x, y, early_stop=stop, **common) for stop in (False, True))
    assert bool((is_adversarial(early, y) | ~is_adversarial(full, y)).all())
    assert float(early.stats.vjps.sum()) < 0.8 * float(full.stats.vjps.sum())
    assert bool((early.stats.iterations <= full.stats.iterations).all())
    assert_inside(early.x, x, 2.0, 1.5)


# The set ----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    norm=st.sampled_from(list(NORMS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    eps=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0]), min_size=16, max_size=16),
    use_mask=st.booleans(),
    targeted=st.booleans(),
    loss=st.sampled_from(LOSSES),
    box=st.booleans(),
    starts=st.sampled_from([0, 0, 2]),
    early=st.booleans(),
    step=st.sampled_from([None, 0.3, 25.0]),
    nested=st.booleans(),
)
def test_what_is_returned_is_in_the_set(
    norm: float,
    dtype: torch.dtype,
    eps: list[float],
    use_mask: bool,
    targeted: bool,
    loss: Any,
    box: bool,
    starts: int,
    early: bool,
    step: float | None,
    nested: bool,
) -> None:
    model, x, y = small(dtype)
    mask = torch.tensor([1, 1, 0, 1, 0]) if use_mask else None
    radius = torch.tensor(eps, dtype=dtype)
    kind = Nested if nested else Joint
    solution = attack(
        model,
        x,
        (y + 1) % 4 if targeted else y,
        norm=norm,
        eps=radius,
        loss=loss,
        targeted=targeted,
        mask=mask,
        random_starts=starts,
        early_stop=early,
        lower=0.0 if box else None,
        upper=1.0 if box else None,
        method=kind(max_iter=4, step_size=step),
    )
    assert solution.x.dtype == dtype
    assert bool(torch.isfinite(solution.x).all())
    assert_inside(
        solution.x, x, norm, radius, box=box, mask=None if mask is None else mask.expand_as(x)
    )


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": torch.tensor([0, 1, 4])}, ValueError, "has 4 classes.*got 0 … 4"),
        ({"labels": torch.tensor([0, -1, 2])}, ValueError, "got -1 … 2"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"one class per sample \(3\), got 2"),
        ({"labels": torch.tensor([[0], [1], [2]])}, TypeError, r"shape \(batch,\).*\(3, 1\)"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "integers.*torch.float32"),
        ({"labels": torch.tensor([True, False, True])}, TypeError, "integers.*torch.bool"),
        ({"norm": 3}, ValueError, "norm must be 1, 2 or inf, got 3"),
        ({"eps": -0.1}, ValueError, "not negative, got -0.1"),
        ({"eps": math.nan}, ValueError, "not negative, got nan"),
        ({"eps": torch.ones(2)}, ValueError, r"shape \(3,\), got shape \(2,\)"),
        ({"eps": torch.ones(3, 5)}, ValueError, r"shape \(3,\), got shape \(3, 5\)"),
        ({"mask": torch.ones(4)}, ValueError, r"mask has shape \(4,\)"),
        ({"loss": "hinge"}, ValueError, "cross-entropy, dlr, margin, got 'hinge'"),
        ({"random_starts": -1}, ValueError, "random_starts must be an integer, not negative"),
        ({"random_starts": 1.5}, ValueError, "random_starts must be an integer, .* got 1.5"),
        ({"labels": [0, 1, 2]}, TypeError, "labels must be a tensor of class indices, got list"),
        ({"labels": torch.tensor(0)}, TypeError, r"shape \(batch,\), got torch.int64 \(\)"),
        ({"retry": 40}, TypeError, "retry must be Joint"),
        ({"lower": 0.5, "upper": 1.0}, ValueError, r"within the box \[0.5, 1.0\], got values from"),
        ({"lower": 1.0, "upper": 0.0}, ValueError, "box"),
        ({"x": torch.full((3, 5), math.nan)}, ValueError, "x holds NaN or Inf"),
        ({"x": torch.ones(3, 5, dtype=torch.uint8)}, TypeError, "floating point"),
        ({"method": "pgd"}, TypeError, "method must be Joint"),
        ({"verify": 3}, TypeError, "verify must be Anderson"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model, x, y = small()
    arguments: dict[str, Any] = {"x": x[:3], "labels": y[:3], "norm": 2, "eps": 0.1} | change
    with pytest.raises(error, match=match):
        attack(model, **arguments)


def test_a_model_without_logits() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sum(1)

    with pytest.raises(ValueError, match=r"logits of shape \(2, classes\), .* got \(2,\)"):
        attack(Scalar(), rand(2, 5, seed=1), torch.tensor([0, 1]), norm=2, eps=0.1)


def test_labels_from_inference_mode_and_eps_that_requires_grad() -> None:
    model, x, y = small()
    expected = attack(model, x[:3], y[:3], norm=2, eps=0.1)
    with torch.inference_mode():
        labels, images = y[:3].clone(), x[:3].clone()
    eps = torch.tensor(0.1, dtype=x.dtype, requires_grad=True)
    got = attack(model, images, labels, norm=2, eps=eps)
    assert torch.equal(got.x, expected.x)
    assert not got.x.requires_grad


def test_edge_batches() -> None:
    model, x, y = small()
    for starts in (0, 2):
        none = attack(
            model, x[:0], y[:0], norm=2, eps=0.1, lower=0.0, upper=1.0, random_starts=starts
        )
        assert none.x.shape == (0, 5)
        assert none.value.shape == (0,)
        assert is_adversarial(none, y[:0]).shape == (0,)
        one = attack(model, x[:1], y[:1].int(), norm=2, eps=0.1, random_starts=starts)
        assert one.x.shape == (1, 5)
    with pytest.raises(ValueError, match="one value per sample"):
        attack(model, x[:0], y[:0], norm=2, eps=torch.ones(3))


def test_nothing_of_the_callers_is_changed(digits: Any) -> None:
    model, x, y = digits
    model.train()
    try:
        images, labels = x.clone(), y.clone()
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        attack(model, x, y, norm=2, eps=0.5, method=Joint(max_iter=2), random_starts=2)
        assert model.training
        assert all(m.training for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert torch.equal(x, images)
        assert torch.equal(y, labels)
        for name, p in model.state_dict().items():
            assert torch.equal(p, weights[name])
    finally:
        model.eval()
