"""Intervals against published values, paired differences, JSON and print."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import binomtest

from jiio_plugins.evaluation import (
    Finding,
    Interval,
    RobustnessReport,
    paired_difference,
    paired_shares,
    wilson,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes, trials)
    assert interval == pytest.approx((successes / trials, low, high), abs=6e-5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_that_of_scipy(case: tuple[int, int]) -> None:
    ours = wilson(*case)
    theirs = binomtest(*case).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


@pytest.mark.parametrize("case", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses(case: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(*case)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + first) + [False] * (second + neither)
    b = [True] * both + [False] * first + [True] * second + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe, Statistics in Medicine 17 (1998) 2635
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland et al., Statistics in Medicine 33 (2014) 2850
    ],
)
def test_paired_published(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    assert paired_shares(*pairs(*cells))[1:] == pytest.approx((low, high), abs=6e-4)


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any))
def test_paired_properties(cells: tuple[int, int, int, int]) -> None:
    a, b = pairs(*cells)
    ab, ba = paired_shares(a, b), paired_shares(b, a)
    assert ab.low <= ab.value <= ab.high
    assert (-ba.value, -ba.high, -ba.low) == pytest.approx(tuple(ab), abs=1e-12)


def test_pairing_is_what_makes_it_short() -> None:
    same = paired_shares(*pairs(500, 12, 8, 480))
    one, other = wilson(512, 1000), wilson(508, 1000)
    independent = (one.high - one.low + other.high - other.low) / 2**0.5
    assert same.high - same.low < independent / 4


def report(robust: list[bool], **kwargs: Any) -> RobustnessReport:
    n = len(robust)
    share = wilson(sum(robust), n)
    values: dict[str, Any] = {
        "eps": 0.5,
        "norm": float("inf"),
        "images": n,
        "tolerance": 1e-5,
        "skip_broken": True,
        "clean": wilson(n, n),
        "accuracy": share,
        "agreed_accuracy": share,
        "model_accuracy": share,
        "converged_accuracy": share,
        "attacks": (),
        "left_out": {},
        "unverified": 0,
        "warnings": (),
        "checks": {"residual": float("nan")},
        "correct": (True,) * n,
        "robust": tuple(robust),
        "broken_by": (None,) * n,
        "worst_loss": (0.0,) * n,
        "seconds": 1.0,
        "fingerprint": "same",
        "worst": torch.zeros(n, 1),
    }
    return RobustnessReport(**{**values, **kwargs})


def test_paired_difference_of_reports() -> None:
    a, b = pairs(36, 12, 2, 0)
    assert paired_difference(report(a), report(b)) == paired_shares(a, b)
    assert paired_difference(report(a), report(b), clean=True).value == 0


def test_paired_difference_over_seeds() -> None:
    a, b = pairs(50, 8, 2, 40)
    one = paired_difference([report(a)], [report(b)])
    three = paired_difference([report(a)] * 3, [report(b)] * 3)
    assert three.value == pytest.approx(one.value)
    # the same images three times over are no more images: as long an interval as for one seed
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)
    mixed = paired_difference([report(a), report(b)], [report(b), report(a)])
    assert mixed.value == 0
    assert mixed.low < 0 < mixed.high


def test_paired_difference_refuses() -> None:
    one = report([True, False])
    for other in (replace(one, eps=0.25), replace(one, norm=2.0), replace(one, fingerprint="x")):
        with pytest.raises(ValueError, match="same images and the same ball"):
            paired_difference(one, other)
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([one, one], [one])
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_shares([True, False], [True, False, True])


def test_json_and_print(tmp_path: Path) -> None:
    warned = report([True, False], warnings=(Finding("steps", "they do not help"),))
    warned.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["norm"] == "inf"
    assert read["checks"] == {"residual": None}
    assert read["accuracy"] == warned.accuracy._asdict()
    assert read["robust"] == [True, False]
    assert "worst" not in read
    assert "warning (steps): they do not help" in str(warned)
    assert "no warning" in str(report([True]))
    assert "robust accuracy 50.0 % [" in str(warned)
    assert "robust accuracy at most 50.0 % [" in str(replace(warned, unverified=1))
    assert str(Interval(0.5, 0.25, 0.75)) == "50.0 % [25.0, 75.0]"
