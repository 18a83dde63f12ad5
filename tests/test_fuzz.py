"""A few random calls, each held against what is known; and checks that see what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.fuzzing import checks, drawn
from benchmarks.fuzzing.calls import ENGINE, HOSTS
from jiio_plugins import L2Ball, Solution, Status

if TYPE_CHECKING:
    from benchmarks.fuzzing.calls import Call
    from benchmarks.fuzzing.ways import Found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [*ENGINE, *HOSTS])
def test_a_random_call_of_each_kind(how: str) -> None:
    calls = (drawn(7, number) for number in range(1000))
    call = next(c for c in calls if c.how == how and not c.expected and len(c.x) < 4)
    assert checks.check(call, again=False) == []


def some_call(how: str = "optimize") -> Call:
    calls = (drawn(0, number, hosts=False) for number in range(1000))
    return next(
        call
        for call in calls
        if call.how == how
        and call.expected is None
        and call.model.kind == "tanh"
        and call.model.rate < 0.9
        and call.x.dtype == torch.float64
        and len(call.x) > 2
        and not call.options
    )


def of(found: Found, **changes: Any) -> Found:
    """With another solution."""
    assert isinstance(found.solution, Solution)
    return replace(found, solution=replace(found.solution, **changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: replace(found, x=found.x + 3), "further from the centre"),
        (lambda found: replace(found, x=found.x * math.nan), "NaN or Inf"),
        (lambda found: of(found, value=found.solution.value + 0.1), "a value called CONVERGED is"),
        (
            lambda found: of(
                found, z=torch.ones(len(found.x), 6), value=found.solution.value.clone()
            ),
            "CONVERGED at a residual",
        ),
        (
            lambda found: of(found, value=found.solution.value * math.nan),
            "the status does not say so",
        ),
        (
            lambda found: of(
                found, stats=replace(found.solution.stats, z_residual=torch.ones(len(found.x)))
            ),
            "CONVERGED above the tolerance",
        ),
    ],
)
def test_a_wrong_answer_is_seen(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = replace(some_call(), eps=0.1, norm=2.0, box=None, method=None)
    found = checks.make(call)
    assert found.solution is not None
    found = of(found, status=torch.full_like(found.solution.status, Status.CONVERGED))
    monkeypatch.setattr(checks, "make", lambda _: change(found))
    assert any(words in wrong for wrong in checks.check(call, again=False))


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = some_call("training")
    found = checks.make(call)
    assert found.gradient is not None
    monkeypatch.setattr(checks, "make", lambda _: replace(found, gradient=1.1 * found.gradient))
    assert "a gradient is" in checks.check(call, again=False)[0]


def test_a_call_that_does_what_it_must_not_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call, make = some_call(), checks.make

    def meddle(call: Call) -> Found:
        torch.rand(1)
        call.model.train(not call.model.training)
        found = make(call)
        return replace(found, x=found.x.roll(1, 0) if call.model.training else found.x)

    monkeypatch.setattr(checks, "make", meddle)
    wrong = checks.check(call, again=True)
    assert "the caller's state was changed" in wrong
    assert any("another x" in one for one in wrong)
    monkeypatch.setattr(checks, "make", make)
    call.options = {"constraint": L2Ball(-1.0)}
    assert "without a cause" in checks.check(call, again=False)[0]
    call.expected = "nothing of the kind"
    assert "does not speak of" in checks.check(call, again=False)[0]
    call.options = {}
    assert "no error" in checks.check(call, again=False)[0]


def test_an_error_at_the_second_time_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call, make, calls = some_call(), checks.make, []

    def once(call: Call) -> Found:
        calls.append(call)
        if len(calls) > 1:
            raise IndexError("what was kept is gone")
        return make(call)

    monkeypatch.setattr(checks, "make", once)
    wrong = checks.check(call, again=True)
    assert any("second time, an error: IndexError: what was kept" in one for one in wrong)
    assert any("alone, an error: IndexError: what was kept" in one for one in wrong)


def test_a_noisy_call_does_not_depend_on_those_before() -> None:
    calls = (drawn(0, number, hosts=False) for number in range(1000))
    number = next(n for n, c in enumerate(calls) if c.model.kind == "noisy" and not c.expected)
    found = []
    for _ in range(2):
        found.append(checks.make(drawn(0, number, hosts=False)))
        torch.rand(1)
    assert torch.equal(found[0].tensors[0], found[1].tensors[0])


def test_noise_is_trusted_only_where_nobody_hears_it() -> None:
    calls = (drawn(0, number, hosts=False) for number in range(1000))
    call = next(
        c for c in calls if c.how == "optimize" and c.model.kind == "noisy" and len(c.x) > 1
    )
    call = replace(call, given=(), expected=None, eps=None, box=None)
    rows, dtype = len(call.x), call.x.dtype
    status = torch.full((rows,), int(Status.CONVERGED))
    found = of(checks.make(call), status=status, z=torch.zeros(rows, 6, dtype=dtype))
    assert found.solution is not None
    assert checks.heard(call, call.x, found.solution).all()
    with torch.no_grad():  # every entry at the end of tanh
        call.model.context.fill_(100.0)
    assert not checks.heard(call, call.x, found.solution).any()
