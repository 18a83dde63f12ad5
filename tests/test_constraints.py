"""Projections against references of another kind, and what must hold of every point returned."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import brentq, minimize
from torch import Tensor

from jiio_plugins import Box, Intersection, L1Ball, L2Ball, LinfBall
from tests.helpers import rand

BALLS = {1.0: L1Ball, 2.0: L2Ball, math.inf: LinfBall}
every_norm = pytest.mark.parametrize("norm", BALLS)


# References -------------------------------------------------------------------------------------


def reference(
    d: np.ndarray, low: np.ndarray, high: np.ndarray, norm: float, radius: float
) -> np.ndarray:
    """Projection of ``d`` on ``{low ≤ δ ≤ high, ‖δ‖_p ≤ radius}``, ``low ≤ 0 ≤ high``.

    By the one multiplier λ of the ball: δ minimises ``½‖δ − d‖² + λ · penalty(δ)`` in the box, and
    λ is the root of ``‖δ(λ)‖_p = radius``.
    """
    if norm == math.inf:
        return np.clip(d, np.maximum(low, -radius), np.minimum(high, radius))

    def at(level: float) -> np.ndarray:
        shrunk = d / (1 + level) if norm == 2 else np.sign(d) * np.maximum(np.abs(d) - level, 0)
        return np.clip(shrunk, low, high)

    def excess(level: float) -> float:
        return float(np.linalg.norm(at(level), ord=norm) - radius)

    if excess(0.0) <= 0:
        return at(0.0)
    top = 1.0
    while excess(top) > 0:
        top *= 10
        if top > 1e18:  # radius 0
            return np.zeros_like(d)
    return at(brentq(excess, 0.0, top, xtol=1e-15, rtol=1e-15, maxiter=1000))


def brute_force(
    d: np.ndarray, low: np.ndarray, high: np.ndarray, norm: float, radius: float
) -> np.ndarray:
    """The same by a general solver for constrained minimisation."""
    n = len(d)
    if norm == 2:
        ball = {"type": "ineq", "fun": lambda p: radius**2 - p @ p, "jac": lambda p: -2 * p}
        found = minimize(
            lambda p: (p - d) @ (p - d),
            np.zeros(n),
            jac=lambda p: 2 * (p - d),
            method="SLSQP",
            bounds=list(zip(low, high, strict=True)),
            constraints=[ball],
            options={"ftol": 1e-15, "maxiter": 500},
        )
        return found.x

    # L1: δ = p − q with p, q ≥ 0
    def gap(pq: np.ndarray) -> np.ndarray:
        return pq[:n] - pq[n:] - d

    ball = {"type": "ineq", "fun": lambda pq: radius - pq.sum(), "jac": lambda pq: -np.ones(2 * n)}
    found = minimize(
        lambda pq: gap(pq) @ gap(pq),
        np.zeros(2 * n),
        method="SLSQP",
        jac=lambda pq: np.concatenate([2 * gap(pq), -2 * gap(pq)]),
        bounds=[(0, h) for h in high] + [(0, -lo) for lo in low],
        constraints=[ball],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return found.x[:n] - found.x[n:]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_the_reference_agrees_with_brute_force(norm: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = rng.normal(size=4) * 2
    low, high = -rng.uniform(0, 1.5, 4), rng.uniform(0, 1.5, 4)
    radius = rng.uniform(0.2, 2.0)
    np.testing.assert_allclose(
        reference(d, low, high, norm, radius), brute_force(d, low, high, norm, radius), atol=2e-6
    )


# Random sets ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A set, a point outside it, and the same as plain arrays."""

    norm: float
    x: Tensor
    radius: Tensor
    mask: Tensor | None
    box: tuple[Tensor, Tensor] | None
    point: Tensor

    @property
    def constraint(self) -> Intersection:
        """The set as a user writes it."""
        ball = BALLS[self.norm](self.radius, mask=self.mask)
        return Intersection(ball) if self.box is None else Intersection(ball, Box(*self.box))

    def limits(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Bounds on δ = x − x₀ in ``row``."""
        n = self.x[row].numel()
        low, high = np.full(n, -np.inf), np.full(n, np.inf)
        if self.box is not None:
            center = self.x[row].double().numpy().ravel()
            low = self.box[0].expand_as(self.x)[row].double().numpy().ravel() - center
            high = self.box[1].expand_as(self.x)[row].double().numpy().ravel() - center
        if self.mask is not None:
            keep = self.mask.expand_as(self.x)[row].numpy().ravel()
            low, high = np.where(keep, low, 0), np.where(keep, high, 0)
        return low, high


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Case:
    rows, shape = draw(st.integers(1, 3)), draw(st.sampled_from([(1,), (3,), (7,), (1, 3, 4)]))
    seed = draw(st.integers(0, 2**20))
    norm = draw(st.sampled_from(list(BALLS)))
    x = torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    radius = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0]), min_size=rows, max_size=rows)),
        dtype=torch.float64,
    )
    box = None
    kind = draw(st.sampled_from(["none", "numbers", "tensors", "tight"]))
    if kind == "numbers":
        box = (torch.zeros(()).double(), torch.ones(()).double())
    elif kind == "tensors":
        box = (x[0].clamp(max=0) - rand(*shape, seed=seed + 1).abs(), 1 + x[0])
    elif kind == "tight":  # much of x sits at a bound
        x = (1.5 * x - 0.25).clamp(0, 1)
        box = (torch.zeros(()).double(), torch.ones(()).double())
    mask = None
    if draw(st.booleans()):
        mask = rand(*draw(st.sampled_from([shape, x.shape])), seed=seed + 2) > -0.3
    reach = 10.0 ** draw(st.integers(-2, 3))
    point = x + reach * rand(*x.shape, seed=seed + 3)
    if box is not None:
        box = (box[0].to(dtype), box[1].to(dtype))
    return Case(norm, x.to(dtype), radius.to(dtype), mask, box, point.to(dtype))


def project(case: Case, point: Tensor) -> Tensor:
    feasible = case.constraint.bind(case.x)
    return feasible.project(point.reshape(len(point), -1)).reshape(point.shape)


def assert_inside(case: Case, got: Tensor) -> None:
    """Ball to ε(1 + 1e-6) plus the rounding of x itself, box and mask exactly."""
    assert got.dtype == case.x.dtype
    delta = (got.double() - case.x.double()).flatten(1)
    n = delta.shape[1]
    size = torch.linalg.vector_norm(delta, ord=case.norm, dim=1)
    epsilon = 2.0**-23 if got.dtype == torch.float32 else 2.0**-52
    rounding = epsilon * got.double().abs().flatten(1).amax(1) * n ** (1 / case.norm)
    assert bool((size <= case.radius.double() * (1 + 1e-6) + rounding).all())
    if case.box is not None:
        assert bool((got >= case.box[0]).all())
        assert bool((got <= case.box[1]).all())
    if case.mask is not None:
        assert torch.equal(torch.where(case.mask, case.x, got), case.x)


@settings(max_examples=150)
@given(cases())
def test_projection_agrees_with_the_reference(case: Case) -> None:
    got = project(case, case.point)
    for row in range(len(case.x)):
        d = (case.point[row] - case.x[row]).numpy().ravel()
        want = reference(d, *case.limits(row), case.norm, float(case.radius[row]))
        delta = (got[row] - case.x[row]).numpy().ravel()
        np.testing.assert_allclose(delta, want, atol=1e-8 * max(1, float(case.radius[row])))


@settings(max_examples=100)
@given(cases(), st.integers(0, 2**16))
def test_projection_is_the_nearest_point(case: Case, seed: int) -> None:
    """``⟨v − P(v), y − P(v)⟩ ≤ 0`` for every y in the set: no reference needed."""
    got = project(case, case.point)
    for row in range(len(case.x)):
        low, high = case.limits(row)
        rng = np.random.default_rng(seed)
        y = np.clip(rng.normal(size=(50, len(low))) * 3, low, high)
        size = np.linalg.norm(y, ord=case.norm, axis=1, keepdims=True)
        y *= np.minimum(1, float(case.radius[row]) / np.maximum(size, 1e-300))
        d = (case.point[row] - case.x[row]).numpy().ravel()
        p = (got[row] - case.x[row]).numpy().ravel()
        assert float(((y - p) @ (d - p)).max()) <= 1e-9 * (1 + d @ d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60)
@given(data=st.data())
def test_projected_points_are_inside(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    assert_inside(case, project(case, case.point))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60)
@given(data=st.data())
def test_projecting_twice_changes_nothing(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    once = project(case, case.point)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(project(case, once), once, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(project(case, case.x), case.x, rtol=0, atol=0)


@given(cases())
def test_points_inside_stay(case: Case) -> None:
    """A point well inside the set is not moved at all."""
    inner = case.x + 0.4 * (project(case, case.point) - case.x)
    torch.testing.assert_close(project(case, inner), inner, rtol=1e-13, atol=1e-14)


@given(cases(), st.integers(0, 2**16))
def test_every_row_is_projected_by_itself(case: Case, seed: int) -> None:
    together = project(case, case.point)
    for row in range(len(case.x)):
        one = slice(row, row + 1)
        mask = case.mask
        if mask is not None and mask.ndim == case.x.ndim:
            mask = mask[one]
        alone = case._replace(
            x=case.x[one], radius=case.radius[one], mask=mask, point=case.point[one]
        )
        torch.testing.assert_close(project(alone, alone.point), together[one], rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", [784, 3072])
@every_norm
def test_images_in_float32(norm: float, n: int) -> None:
    """At image size: inside, and as near as the float64 projection."""
    x = torch.rand(4, n, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    radius = {1.0: 12.0, 2.0: 1.0, math.inf: 8 / 255}[norm]
    box = (torch.zeros(()), torch.ones(()))
    point = x + 0.2 * rand(4, n, seed=1, dtype=torch.float32)
    case = Case(norm, x, torch.full((4,), radius), None, box, point)
    got = project(case, point)
    assert_inside(case, got)
    for row in range(4):
        d = (point[row].double() - x[row].double()).numpy()
        want = reference(d, *case.limits(row), norm, radius)
        np.testing.assert_allclose(
            got[row].double().numpy() - x[row].double().numpy(), want, atol=1e-5
        )


def test_many_entries_that_meet_the_box_one_after_another() -> None:
    """Each round of clipping frees room that lets the next entry reach the box."""
    n = 200
    room = torch.logspace(-3, 0, n, dtype=torch.float64)[None]
    d = rand(1, n, seed=1).abs() * torch.logspace(3, -3, n, dtype=torch.float64)
    x = torch.zeros(1, n, dtype=torch.float64)
    for radius in (0.05, 0.5, 1.0, 2.0, 4.0):
        got = Intersection(L2Ball(radius), Box(-1.0, room)).bind(x).project(d)
        want = reference(d[0].numpy(), np.full(n, -1.0), room[0].numpy(), 2.0, radius)
        np.testing.assert_allclose(got[0].numpy(), want, atol=1e-7)


# Random starts ----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(cases(), st.integers(0, 2**16))
def test_samples_are_inside(case: Case, seed: int) -> None:
    feasible = case.constraint.bind(case.x)
    got = feasible.sample(torch.Generator().manual_seed(seed)).reshape(case.x.shape)
    assert bool(torch.isfinite(got).all())
    assert_inside(case, got)
    again = feasible.sample(torch.Generator().manual_seed(seed)).reshape(case.x.shape)
    assert torch.equal(got, again)


@every_norm
def test_samples_fill_the_ball(norm: float) -> None:
    """In three dimensions half the volume lies beyond ``2^(−1/3)`` of the radius."""
    x = torch.zeros(4000, 3, dtype=torch.float64)
    points = BALLS[norm](2.0).bind(x).sample(torch.Generator().manual_seed(0))
    size = torch.linalg.vector_norm(points, ord=norm, dim=1)
    assert float((size > 2 * 0.5 ** (1 / 3)).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(points.mean(0).abs().max()) < 0.1
    signs = (points > 0).double().mean(0)
    assert float((signs - 0.5).abs().max()) < 0.04


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_samples_use_the_whole_radius_under_a_mask(norm: float) -> None:
    x = torch.zeros(500, 100, dtype=torch.float64)
    mask = torch.arange(100) < 3
    points = BALLS[norm](1.0, mask=mask).bind(x).sample(torch.Generator().manual_seed(0))
    size = torch.linalg.vector_norm(points, ord=norm, dim=1)
    assert float(size.median()) > 0.7
    assert float(points[:, 3:].abs().max()) == 0


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_do_not_depend_on_how_many_there_are(norm: float, dtype: torch.dtype) -> None:
    x = torch.zeros(6, 50, dtype=dtype)
    some, all_ = (torch.Generator().manual_seed(0) for _ in range(2))
    for _ in range(2):  # the second start too
        few = BALLS[norm](1.0).bind(x[:1]).sample(some)
        many = BALLS[norm](1.0).bind(x).sample(all_)
        assert few.dtype == dtype
        assert torch.equal(few, many[:1])
        assert len(many.unique(dim=0)) == 6


def test_samples_of_a_box() -> None:
    x = torch.zeros(2000, 2)
    points = Box(-1.0, 3.0).bind(x).sample(torch.Generator().manual_seed(0))
    assert float(points.mean()) == pytest.approx(1.0, abs=0.1)
    for unbounded in (Box(-torch.inf, 1.0), Box(0.0, torch.inf)):
        with pytest.raises(ValueError, match="needs a ball or a bounded box"):
            unbounded.bind(x).sample()


# Directions -------------------------------------------------------------------------------------


@every_norm
def test_the_direction_descends_and_has_length_one(norm: float) -> None:
    feasible = BALLS[norm](1.0).bind(torch.zeros(5, 12, dtype=torch.float64))
    g = rand(5, 12, seed=1)
    d = feasible.descent_direction(g, feasible.center)
    size = torch.linalg.vector_norm(d, ord=norm, dim=1)
    torch.testing.assert_close(size, torch.ones_like(size))
    dual = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]
    steepest = -torch.linalg.vector_norm(g, ord=dual, dim=1)  # at 12 entries L1 moves one
    torch.testing.assert_close((g * d).sum(1), steepest)


@every_norm
def test_the_direction_of_a_zero_gradient_is_zero(norm: float) -> None:
    feasible = BALLS[norm](1.0).bind(torch.zeros(2, 6))
    assert torch.equal(
        feasible.descent_direction(torch.zeros(2, 6), feasible.center), torch.zeros(2, 6)
    )


@every_norm
def test_the_direction_leaves_the_mask_alone(norm: float) -> None:
    mask = torch.tensor([True, False, True, False])
    feasible = BALLS[norm](1.0, mask=mask).bind(torch.zeros(2, 4))
    d = feasible.descent_direction(torch.tensor([[1.0, 9.0, -2.0, 9.0]] * 2), feasible.center)
    assert float(d[:, ~mask].abs().max()) == 0
    assert float(d[:, mask].abs().max()) > 0


def test_a_direction_blocked_by_the_box_takes_no_length() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]])
    feasible = Intersection(L2Ball(1.0), Box(0.0, 1.0)).bind(x)
    d = feasible.descent_direction(torch.tensor([[5.0, 1.0, -5.0]]), x)
    torch.testing.assert_close(d, torch.tensor([[0.0, -1.0, 0.0]]))


def test_without_a_ball_the_direction_is_the_negative_gradient() -> None:
    g = rand(2, 3, seed=1)
    feasible = Box(-1.0, 1.0).bind(torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(feasible.descent_direction(g, feasible.center), -g)


# What is accepted -------------------------------------------------------------------------------


def test_a_center_of_its_own() -> None:
    x = torch.zeros(2, 3)
    center = torch.tensor([1.0, 2.0, 3.0])
    feasible = L2Ball(0.5, center).bind(x)
    got = feasible.project(x)
    torch.testing.assert_close((got - center).norm(dim=1), torch.full((2,), 0.5))
    torch.testing.assert_close(got, (1 - 0.5 / 14**0.5) * center.expand(2, 3))


def test_the_center_is_a_copy() -> None:
    x = torch.zeros(1, 2)
    feasible = L2Ball(1.0).bind(x)
    x += 5
    assert torch.equal(feasible.center, torch.zeros(1, 2))


def test_several_boxes_and_cubes_meet() -> None:
    x = torch.full((1, 2), 0.5)
    sets = [Box(0.0, 1.0), LinfBall(0.3), Box(torch.tensor([0.4, 0.0]), 0.7), L2Ball(5.0)]
    feasible = Intersection(*sets).bind(x)
    assert feasible.norm == 2
    below, above = torch.full((1, 2), -9.0), torch.full((1, 2), 9.0)
    torch.testing.assert_close(feasible.project(below), torch.tensor([[0.4, 0.2]]))
    torch.testing.assert_close(feasible.project(above), torch.tensor([[0.7, 0.7]]))
    listed = Intersection([Box(0.0, 1.0), LinfBall(0.3)], L2Ball(5.0)).bind(x)
    nested = Intersection(Intersection(Box(0.0, 1.0), L2Ball(5.0)), LinfBall(0.3)).bind(x)
    for feasible in (listed, nested):
        torch.testing.assert_close(feasible.project(below), torch.full((1, 2), 0.2))


def test_masks_of_any_type() -> None:
    x = torch.zeros(2, 3)
    for mask in (
        torch.tensor([1, 0, 1]),
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([[True, False, True]] * 2),
    ):
        got = LinfBall(1.0, mask=mask).bind(x).project(torch.full((2, 3), 3.0))
        assert got.tolist() == [[1.0, 0.0, 1.0]] * 2


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("constraint", "match"),
    [
        (L2Ball(-1.0), "radius must be finite and not negative, got -1"),
        (L1Ball(math.nan), "radius must be finite and not negative, got nan"),
        (LinfBall(math.inf), "radius must be finite and not negative, got inf"),
        (L2Ball(torch.tensor([1.0, -1.0])), "radius must be finite and not negative"),
        (L2Ball(torch.ones(3)), r"one value per sample, shape \(2,\), got shape \(3,\)"),
        (L2Ball(torch.ones(2, 1)), r"one value per sample, shape \(2,\), got shape \(2, 1\)"),
        (L2Ball(1.0, mask=torch.ones(4)), r"mask has shape \(4,\).*\(2, 3\)"),
        (L2Ball(1.0, torch.zeros(5)), r"center has shape \(5,\).*\(2, 3\)"),
        (L2Ball(1.0, torch.tensor([0.0, math.nan, 0.0])), "center holds NaN or Inf"),
        (Box(1.0, 0.0), "Box needs lower <= upper, got 1.0 and 0.0"),
        (Box(math.nan, 0.0), "Box needs lower <= upper"),
        (Box(torch.zeros(4), 1.0), r"lower has shape \(4,\).*\(2, 3\)"),
        (Box(0.0, torch.ones(3, 3)), r"upper has shape \(3, 3\).*\(2, 3\)"),
        (Intersection(L2Ball(1.0), Box(0.5, 1.0)), "centre of the ball lies outside the box"),
        (
            Intersection(L2Ball(1.0, mask=torch.zeros(3)), Box(0.5, 1.0)),
            "centre of the ball lies outside the box",
        ),
        (
            Intersection(L2Ball(1.0), LinfBall(0.1, torch.full((3,), 0.05), mask=torch.ones(3))),
            "a ball with a mask must have the centre of the other ball",
        ),
        (Intersection(LinfBall(0.1), Box(0.5, 1.0)), "no point in common"),
        (Intersection(Intersection(L2Ball(5.0)), L1Ball(0.1)), "at most one L1Ball or L2Ball"),
        (Intersection(Box(0.0, 1.0), Box(2.0, 3.0)), "no point in common"),
    ],
)
def test_bad_sets(constraint: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        constraint.bind(ZEROS)


def test_bad_intersections() -> None:
    with pytest.raises(ValueError, match=r"at most one L1Ball or L2Ball.* got 2"):
        Intersection(L2Ball(1.0), L1Ball(1.0))
    for nothing in ((), ([],), (3.0,), ("L2",)):
        with pytest.raises(TypeError):
            Intersection(*nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("radius", lambda c: L2Ball(c)),
        ("center", lambda c: L1Ball(0.1, c)),
        ("mask", lambda c: LinfBall(0.1, mask=c)),
        ("lower", lambda c: Box(c, 1.0)),
        ("upper", lambda c: Box(0.0, c)),
    ],
)
def test_complex_numbers_are_not_cut_to_their_real_part(name: str, build: Any) -> None:
    x = torch.zeros(2, 4)
    for number in (torch.ones((), dtype=torch.complex64), np.ones((), dtype=np.complex128)):
        with pytest.raises(TypeError, match=rf"{name} must be real, got .*complex"):
            build(number).bind(x)
    if name != "mask":
        with pytest.raises(TypeError, match=rf"{name} must be a number or a tensor, got 1j"):
            build(1j).bind(x)


def test_a_mask_with_nan() -> None:
    with pytest.raises(ValueError, match="mask holds NaN"):
        L2Ball(0.1, mask=torch.tensor([1.0, math.nan, 0.0, 1.0])).bind(torch.zeros(2, 4))
