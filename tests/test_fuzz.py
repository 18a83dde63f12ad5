"""A few random calls, each held against what is known; and a driver that sees what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import fuzz
from jiio_plugins import L2Ball, Status


def test_a_few_random_calls() -> None:
    assert fuzz.run(fuzz.Args(count=12, seed=7))["violations"] == []


def some_call() -> fuzz.Call:
    calls = (fuzz.build(0, number, adapters=False) for number in range(1000))
    return next(
        call
        for call in calls
        if call.how == "optimize"
        and call.model.kind == "tanh"
        and call.model.rate < 0.9
        and len(call.x) > 2
        and call.expected is None
        and call.eps
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: replace(found, x=found.x + 3), "from the centre"),
        (lambda found: replace(found, x=found.x * math.nan), "NaN or Inf"),
        (lambda found: replace(found, value=found.value + 0.1), "a value called CONVERGED is"),
        (lambda found: replace(found, z=found.z + 0.1), "CONVERGED at a residual"),
        (lambda found: replace(found, value=found.value * math.nan), "the status does not say so"),
    ],
)
def test_a_wrong_answer_is_seen(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, make = some_call(), fuzz.Call.make
    assert not fuzz.check(call, again=True)
    found: Any = make(call)
    found = replace(found, status=torch.full_like(found.status, Status.CONVERGED))
    monkeypatch.setattr(fuzz.Call, "make", lambda _: change(found))
    assert any(words in wrong for wrong in fuzz.check(call, again=False))


def test_a_call_that_does_what_it_must_not_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call, make = some_call(), fuzz.Call.make

    def meddle(self: fuzz.Call) -> Any:
        torch.rand(1)
        self.model.train(not self.model.training)
        found = make(self)
        return replace(found, x=found.x.roll(1, 0) if self.model.training else found.x)

    monkeypatch.setattr(fuzz.Call, "make", meddle)
    wrong = fuzz.check(call, again=True)
    assert "the caller's state was changed" in wrong
    assert any("another x" in one for one in wrong)
    monkeypatch.setattr(fuzz.Call, "make", make)
    call.options = {"constraint": L2Ball(-1.0)}
    assert "without a cause" in fuzz.check(call, again=False)[0]
    call.options, call.expected = {"constraint": L2Ball(-1.0)}, "nothing of the kind"
    assert "does not speak of" in fuzz.check(call, again=False)[0]
    call.options = {}
    assert "no error" in fuzz.check(call, again=False)[0]
