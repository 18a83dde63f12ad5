"""The nearest points by sorting, against bisection, and at the ends of the number range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from jiio_plugins import Box, Intersection, L1Ball, L2Ball
from jiio_plugins.utils.nearest import nearest_l1, nearest_l2

if TYPE_CHECKING:
    from collections.abc import Callable


def by_bisection(size: Tensor, room: Tensor, radius: float, norm: int) -> Tensor:
    """One row's nearest point: the multiplier is halved in until nothing changes any more."""

    def at(level: float) -> Tensor:
        shrunk = size * level if norm == 2 else (size - level).clamp(min=0)
        return torch.minimum(shrunk, room)

    def inside(level: float) -> bool:
        return float(torch.linalg.vector_norm(at(level), ord=norm)) <= radius

    none = 1.0 if norm == 2 else 0.0  # where nothing is taken from the sizes
    if inside(none):
        return at(none)
    good, bad = (0.0, none) if norm == 2 else (float(size.max()), none)
    while True:
        middle = math.sqrt(good * bad) if norm == 2 and good else (good + bad) / 2
        if middle in (good, bad):
            return at(good)
        good, bad = (middle, bad) if inside(middle) else (good, middle)


class Rows(NamedTuple):
    size: Tensor
    room: Tensor
    radius: Tensor


@st.composite
def rows(draw: st.DrawFn, largest: float) -> Rows:
    """Rows of sizes with ties and zeros, entries at their bound, and radii down to 0."""
    n, count = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    some = st.one_of(st.sampled_from([0.0, 1.0, 1.0, largest]), st.floats(1e-6, largest))
    share = st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0, 1))
    size = [draw(st.lists(some, min_size=n, max_size=n)) for _ in range(count)]
    room = [draw(st.lists(share, min_size=n, max_size=n)) for _ in range(count)]
    radius = _float64([[draw(st.sampled_from([0.0, 1e-3, 1.0, 5.0]))] for _ in range(count)])
    return Rows(_float64(size), _float64(room) * radius, radius)


def _float64(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


NEAREST: dict[int, Callable[..., Tensor]] = {1: nearest_l1, 2: nearest_l2}
every_norm = pytest.mark.parametrize("norm", NEAREST)


# How far a row may be off. In an L2 ball what is left for the rest where entries have met their
# rooms is a difference of squares, whose root has half the digits.
def off(radius: float, size: Tensor, norm: int) -> float:
    return 3e-8 * radius if norm == 2 else 1e-9 * radius + 1e-15 * float(size.max())


@every_norm
@settings(max_examples=300)
@given(data=st.data())
def test_it_is_what_bisection_finds(norm: int, data: st.DataObject) -> None:
    case = data.draw(rows(1e3))
    got = NEAREST[norm](*case)
    for k, (size, room, radius) in enumerate(zip(*case, strict=True)):
        want = by_bisection(size, room, float(radius), norm)
        torch.testing.assert_close(got[k], want, rtol=1e-9, atol=off(float(radius), size, norm))
        assert float(torch.linalg.vector_norm(got[k], ord=norm)) <= float(radius) * (1 + 1e-12)


@settings(max_examples=200)
@given(rows(1e30))
def test_huge_sizes_share_a_ball(case: Rows) -> None:
    got = nearest_l2(*case)
    for k, (size, room, radius) in enumerate(zip(*case, strict=True)):
        want = by_bisection(size, room, float(radius), 2)
        torch.testing.assert_close(got[k], want, rtol=1e-9, atol=off(float(radius), size, 2))


@every_norm
@settings(max_examples=200)
@given(data=st.data())
def test_it_is_inside_whatever_the_sizes(norm: int, data: st.DataObject) -> None:
    size, room, radius = data.draw(rows(1e150))
    got = NEAREST[norm](size, room, radius)
    assert bool((got >= 0).all())
    assert bool((got <= room).all())
    length = torch.linalg.vector_norm(got, ord=norm, dim=1, keepdim=True)
    assert bool((length <= radius * (1 + 1e-9)).all())


@every_norm
def test_every_row_meets_the_box_first(norm: int) -> None:
    """Sizes that meet their rooms one after another, each at its own multiplier."""
    n = 500
    room = torch.logspace(-6, 0, n, dtype=torch.float64)[None]
    size = torch.logspace(6, -1, n, dtype=torch.float64)[None]
    for radius in (1e-4, 0.1, 1.0, 3.0, 100.0):
        limit = torch.tensor([[radius]], dtype=torch.float64)
        got = NEAREST[norm](size, room.clamp(max=radius), limit)
        want = by_bisection(size[0], room[0].clamp(max=radius), radius, norm)
        torch.testing.assert_close(got[0], want, rtol=1e-8, atol=off(radius, size, norm))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ball", [L1Ball(1.0), L2Ball(1.0)])
def test_a_row_that_is_not_finite_does_not_come_out_finite(
    ball: L1Ball | L2Ball, wrong: float
) -> None:
    x = torch.zeros(3, 5)
    feasible = Intersection(ball, Box(-0.5, 2.0)).bind(x)
    v = torch.linspace(-1, 3, 15).reshape(3, 5)
    want = feasible.project(v)
    v[1, 2] = wrong
    got = feasible.project(v)
    assert not bool(torch.isfinite(got[1]).all())
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("ball", [L1Ball, L2Ball])
def test_entries_that_all_lie_at_the_box_stay_there(ball: type[L1Ball | L2Ball]) -> None:
    x = torch.ones(2, 6)
    feasible = Intersection(ball(0.5), Box(0.0, 1.0)).bind(x)
    assert torch.equal(feasible.project(x + 1e6), x)
