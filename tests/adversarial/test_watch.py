"""What is judged of a training's steps, and when it is said that something looks wrong."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from jiio_plugins import Anderson
from jiio_plugins.adversarial.judged import corrected, judged_rows
from jiio_plugins.adversarial.step import AdversarialTraining
from jiio_plugins.adversarial.watch import Watch
from tests.helpers import Net, rand

Y = torch.tensor([0, 2, 1, 2])
FINE = {"clean": 0.9, "robust": 0.8, "unverified": 0.0, "astray": 0.02}


def test_judged_rows_are_those_of_the_model_at_image_and_example() -> None:
    model, x = Net(seed=3).train(), rand(4, 5, seed=1)
    step = AdversarialTraining(norm=2, eps=0.5, ratio=0.75)(model, x, Y)
    rows = judged_rows(model, step, x, Y, most=9)
    assert model.training
    assert {name: len(t) for name, t in rows.items()} == dict.fromkeys(rows, 3)
    with torch.no_grad():
        assert torch.equal(rows["clean"], (model(x).argmax(1) == Y)[:3])
        assert torch.equal(rows["robust"], (model(step.solution.x).argmax(1) == Y)[:3])
    assert not bool(rows["unverified"].any())
    assert torch.equal(rows["astray"], step.robust != rows["robust"])
    assert torch.equal(rows["there_robust"], step.robust)
    assert len(judged_rows(model, step, x, Y, most=2)["clean"]) == 2
    for labels in (torch.eye(3, dtype=torch.float64)[Y], torch.where(Y == 2, -100, Y)):
        some = judged_rows(model, step, x, labels, most=3)
        kept = [0, 1, 2] if labels.ndim == 2 else [0, 2]
        assert torch.equal(some["robust"], rows["robust"][kept])
    assert not judged_rows(model, step, x, rand(4, 5, 2, seed=1), most=3)


def test_a_model_that_answers_before_it_has_converged_is_astray() -> None:
    model, x = Net(seed=3, rate=0.95), rand(4, 5, seed=1)
    step = AdversarialTraining(norm=2, eps=0.5)(model, x, Y)
    model.equilibrium.solver = Anderson(max_iter=1)  # the model's own answers
    wrong = judged_rows(model, step, x, Y, most=4)
    with torch.no_grad():
        assert not bool((wrong["robust"] & (model(step.solution.x).argmax(1) != Y)).any())
    with torch.no_grad():
        for p in model.equilibrium.cell.parameters():
            p *= 30
    assert bool(judged_rows(model, step, x, Y, most=4)["unverified"].all())


def test_the_sample_corrects_what_was_seen_of_all() -> None:
    means = {"seen_robust": 0.9, "there_robust": 0.8, "robust": 0.3, "clean": 0.5}
    assert corrected(means) == {"seen_robust": 0.9, "robust": pytest.approx(0.4), "clean": 0.5}
    assert corrected({"seen_clean": 0.1, "there_clean": 0.9, "clean": 0.3})["clean"] == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unverified": 0.2}, "did not converge for 20% of 100 judged"),
        ({"astray": 0.3}, "disagree on 30% of 100 judged .* by solves 80%"),
        ({"robust": 0.7, "clean": 0.5}, "70% of 100 judged .* of the images themselves 50%"),
    ],
)
def test_each_thing_is_said_once(change: dict[str, float], words: str) -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.judged(1, FINE, 100)
        watch.judged(1, {**FINE, **change}, 4)  # of four images it says nothing
    with pytest.warns(RuntimeWarning, match=f"in epoch 2 .*{words}.* raise jacobian_weight"):
        watch.judged(2, {**FINE, **change}, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.judged(3, {**FINE, **change}, 100)


def test_validation_that_falls() -> None:
    watch = Watch()
    history: list[dict[str, Any]] = [
        {"validation_clean": c, "validation_robust": r}
        for c, r in ((0.5, 0.3), (0.9, 0.7), (0.89, 0.62), (0.9, 0.55))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(1, 4):
            watch.validation(history[:k], 500)
        watch.validation(history, 20)
    with pytest.warns(RuntimeWarning, match="in epoch 4 the robust .* is 55%, after 70% before"):
        watch.validation(history, 500)
