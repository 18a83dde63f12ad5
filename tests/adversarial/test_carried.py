"""Searches that take up earlier ones of the same samples."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Joint, count_evaluations
from jiio_plugins.adversarial.batches import TensorBatches
from jiio_plugins.adversarial.carried import Carried
from jiio_plugins.adversarial.fit import FitSettings, fit_adversarially
from jiio_plugins.adversarial.judged import validate
from jiio_plugins.adversarial.step import TRAINING_METHOD, AdversarialTraining
from tests.adversarial.helpers import (
    TRAINING,
    Bomb,
    StoppedError,
    assert_equal_weights,
    build,
    data,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Recorded(AdversarialTraining):
    """Notes where each search started and what goes on, by label: every sample has its own."""

    starts: dict[int, Tensor | None]
    ends: dict[int, Callable[[], Tensor]]

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, **options: Any) -> Any:
        step = super().__call__(model, x, labels % 10, **options)
        start = options["start"]
        for k, label in enumerate(labels.tolist()):
            self.starts[label] = None if start is None else start[k]
            self.ends[label] = lambda k=k: step.ahead()[k]
        return step


def test_searches_start_where_the_last_ones_of_the_same_samples_ended() -> None:
    options: dict[str, Any] = {"norm": 2, "eps": 0.3, "method": Joint(max_iter=2)}
    fresh, short = Recorded(**options), Recorded(**options)
    starts: dict[int, Tensor | None] = {}
    ends: dict[int, Callable[[], Tensor]] = {}
    for training in (fresh, short):
        object.__setattr__(training, "starts", starts)
        object.__setattr__(training, "ends", ends)
    model, x = build(), data()[0]
    history: list[tuple[dict[int, Tensor | None], dict[int, Tensor]]] = []

    class Watched(TensorBatches):
        def epoch(self, index: int, skip: int = 0) -> Any:
            yield from super().epoch(index, skip)
            history.append((dict(starts), {sample: end() for sample, end in ends.items()}))

    fit_adversarially(
        model,
        fresh,
        torch.optim.SGD(model.parameters(), lr=0.01),
        Watched(x, torch.arange(64), 20, drop_last=True),
        FitSettings(epochs=5, restart_every=3, carried=short, judged=0, verbose=False),
    )
    for epoch, (begun, _) in enumerate(history):
        anew = epoch % 3 == 0
        order = TensorBatches(x, torch.arange(64), 20).order(epoch)[:60].tolist()
        for sample in order:
            start = begun[sample]
            assert (start is None) == anew
            if start is not None:  # the one that an epoch left out starts at its image
                last = history[epoch - 1][1].get(sample, x[sample])
                assert torch.equal(start, last)
    assert any(sample not in history[0][1] for sample in range(64))


def test_carried_searches_are_as_good_for_less() -> None:
    # the penalty costs the same in either
    training = replace(TRAINING, method=TRAINING_METHOD, jacobian_weight=0.0)
    counts = []
    for every in (1, 8):
        model = build()
        before = validate(model, training, *data("test", 100))["robust"]
        with count_evaluations() as counter:
            history = train(model, epochs=8, restart_every=every, training=training)
        counts.append(counter.f_evals + counter.vjps)
        assert validate(model, training, *data("test", 100))["robust"] > before + 0.2
        assert ("seen_clean" in history[-1]) == (every == 1)
    assert counts[1] < 0.7 * counts[0]


class Late(TensorBatches):
    """Batches that end in the middle of the third epoch."""

    def epoch(self, index: int, skip: int = 0) -> Any:
        for k, batch in enumerate(super().epoch(index, skip)):
            if index == 2 and k == 2:
                raise StoppedError
            yield batch


@pytest.mark.parametrize("end", [Bomb, Late])  # Late: in a whole search's epoch, if every is 2
@pytest.mark.parametrize("every", [2, 9])
def test_resumed_with_carried_searches(every: int, end: Callable[..., Any], tmp_path: Path) -> None:
    whole, parts, path = build(), build(), tmp_path / "run.pt"
    training = replace(TRAINING, ratio=0.5, trades=2.0)  # some rows have nothing to take up
    options: dict[str, Any] = {"restart_every": every, "epochs": 4, "training": training}
    expected = train(whole, **options)
    kept = {"checkpoint": path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(StoppedError):
        train(parts, batches=end, **options, **kept)
    with pytest.raises(ValueError, match=f"another restart_every, {every}"):
        train(build(), epochs=4, training=training, **kept)
    fresh = build(seed=7)
    assert train(fresh, **options, **kept) == expected
    assert_equal_weights(whole, fresh)


def test_images_that_were_not_attacked_are_not_taken_up() -> None:
    starts: dict[int, Tensor | None] = {}
    ends: dict[int, Callable[[], Tensor]] = {}
    training = Recorded(norm=2, eps=0.3, ratio=0.5, random_start=True, method=Joint(max_iter=2))
    object.__setattr__(training, "starts", starts)
    object.__setattr__(training, "ends", ends)
    x, y, model = data()[0], torch.arange(64), build()
    fit_adversarially(
        model,
        training,
        torch.optim.SGD(model.parameters(), lr=0.01),
        TensorBatches(x, y, 16),
        FitSettings(epochs=2, restart_every=2, carried=training, verbose=False),
    )
    orders = [TensorBatches(x, y, 16).order(k).split(16) for k in (0, 1)]
    before = {int(n) for rows in orders[0] for n in rows[:8]}
    first = {int(n) for rows in orders[1] for n in rows[:8]}
    new = first - before
    assert new
    for sample in new:  # at random, as the training's own searches start
        start = starts[sample]
        assert start is not None
        assert 0.0 < float((start - x[sample]).norm()) <= 0.3 * (1 + 1e-5)
    assert all(float((ends[n]() - x[n]).norm()) < 1e-6 for n in range(64) if n not in first)


def test_kept_images_of_a_checkpoint_go_where_the_batches_are() -> None:
    """Here from single to double precision, as from the CPU to an accelerator."""
    x, y = data()
    kept = Carried(TensorBatches(x, y, 16), 2, TRAINING)
    rows = TensorBatches(x, y, 16).order(0)[:16]
    kept.keep(0, 0, x[rows], 16)
    other = Carried(TensorBatches(x.double(), y, 16), 2, TRAINING)
    other.load(kept.state())
    other.keep(0, 1, x.double()[:16], 16)
    start = other.start(1, 0, x.double()[:16], torch.Generator())
    assert start is not None
    assert start.dtype == torch.float64
    with pytest.raises(ValueError, match="images of 64 samples, the batches hold 20"):
        Carried(TensorBatches(x[:20], y[:20], 16), 2, TRAINING).load(kept.state())


@pytest.mark.parametrize(
    ("order", "words"), [([3, 1, 2], "every sample once"), (list(range(40)), "it should have 8")]
)
def test_an_order_that_does_not_fit(order: list[int], words: str) -> None:
    class Wrong(TensorBatches):
        def order(self, index: int) -> Any:
            return order

        def epoch(self, index: int, skip: int = 0) -> Any:
            return TensorBatches(*data(), 16).epoch(index, skip)

    with pytest.raises(ValueError, match=words):
        train(build(), batches=Wrong, restart_every=2)


def test_a_carried_step_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="needs restart_every"):
        train(build(), carried=TRAINING)
    with pytest.raises(TypeError, match="must be an AdversarialTraining"):
        train(build(), carried="short", restart_every=2)
    with pytest.raises(ValueError, match="in the ball of the others"):
        train(build(), carried=replace(TRAINING, eps=0.2), restart_every=2)


def test_batches_that_do_not_tell_their_samples_cannot_be_carried() -> None:
    class Loader:
        def __len__(self) -> int:
            return 4

        def epoch(self, index: int, skip: int = 0) -> Any:
            return TensorBatches(*data(), 16).epoch(index, skip)

    train(build(), epochs=1, batches=lambda *_: Loader())
    with pytest.raises(TypeError, match=r"batches that have order\(index\)"):
        train(build(), batches=lambda *_: Loader(), restart_every=2)
