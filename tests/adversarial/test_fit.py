"""The training loop: what it reaches, what it puts back, what it says of bad input."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from jiio_plugins import Joint, count_evaluations
from jiio_plugins.adversarial.batches import TensorBatches
from jiio_plugins.adversarial.fit import FitSettings, fit_adversarially
from jiio_plugins.adversarial.judged import finished, judged_rows, validate
from jiio_plugins.utils import checkpoint
from jiio_plugins.utils.signals import Interrupted
from tests.adversarial.helpers import TRAINING, assert_equal_weights, build, data, train

if TYPE_CHECKING:
    from pathlib import Path


def test_training_makes_the_network_more_robust() -> None:
    model = build()
    history = train(model, epochs=8, judged=7, validation=data("test", 100))
    assert len(history) == 8
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["validation_robust"] > history[0]["validation_robust"] + 0.2
    assert history[-1]["validation_clean"] >= history[-1]["validation_robust"]
    seen = {"loss", "residual", "seen_robust", "seen_clean"}
    assert history[0].keys() >= seen | {"clean", "robust", "unverified", "astray"}


def test_a_cell_without_fixed_points_is_warned_of_at_once_and_once() -> None:
    model = build()
    with torch.no_grad():
        for weight in model.equilibrium.parameters():
            weight *= 3
    training = replace(TRAINING, method=Joint(max_iter=1, warmup=1), jacobian_weight=0.0)
    with pytest.warns(RuntimeWarning, match="in epoch 1") as caught:
        train(model, epochs=1, judged=7, training=training)
    messages = [str(warning.message) for warning in caught]
    assert "of 7 judged training images" in messages[0]
    assert sum("did not converge" in message for message in messages) == 1
    assert sum("mean relative residual" in message for message in messages) == 1
    assert all("raise jacobian_weight" in message for message in messages)


def test_accuracies_are_what_the_steps_see_corrected_by_rows_judged_where_the_epoch_ends() -> None:
    model = build()
    history = train(model, epochs=1, judged=5, optimizer=torch.optim.SGD(model.parameters(), lr=0))
    batches = list(TensorBatches(*data(), 16).epoch(0))
    steps = [TRAINING(model, x, y) for x, y in batches]
    judged = judged_rows(model, steps[-1], *batches[-1], most=5)
    for name in ("clean", "robust"):
        seen = torch.cat([getattr(step, name) for step in steps]).double().mean().item()
        assert history[0][f"seen_{name}"] == pytest.approx(seen)
        gain = (judged[name].double() - judged[f"there_{name}"].double()).mean().item()
        assert history[0][name] == pytest.approx(min(max(seen + gain, 0), 1))
    assert history[0]["unverified"] == judged["unverified"].double().mean().item()


def test_the_finished_model_is_judged_on_training_images_whatever_its_weights() -> None:
    model = build()
    x, y = data()
    history = train(model, epochs=5, judged=len(x), patience=2, validation=data("test", 20))
    expected = validate(model, TRAINING, x, y)
    found = {name: history[-1][f"final_{name}"] for name in expected}
    assert found == pytest.approx(expected)
    assert not any(name.startswith("final") for epoch in history[:-1] for name in epoch)


def test_batches_that_can_be_drawn_but_once_are_not_drawn_again() -> None:
    stream = TensorBatches(*data(), 16).epoch(0)

    class Once(TensorBatches):
        def skip(self, batches: int) -> None:
            raise NotImplementedError

        def epoch(self, index: int, skip: int = 0) -> Any:
            yield from stream

    (epoch,) = train(build(), batches=Once, epochs=1, judged=9)
    assert "robust" in epoch
    assert "final_robust" not in epoch


def test_a_list_of_batches_is_judged_from_its_beginning() -> None:
    class Listed(TensorBatches):
        def epoch(self, index: int, skip: int = 0) -> Any:
            return list(super().epoch(index, skip))

    model = build()
    (epoch,) = train(model, batches=Listed, epochs=1, judged=5)
    drawn = [torch.cat(t)[:13] for t in zip(*TensorBatches(*data(), 16).epoch(0), strict=True)]
    assert epoch["final_robust"] == validate(model, TRAINING, *drawn, batch_size=16)["robust"]


def test_a_model_that_cannot_be_judged_in_the_end_has_been_trained() -> None:
    class Ends(TensorBatches):
        drawn = 0

        def epoch(self, index: int, skip: int = 0) -> Any:
            Ends.drawn += 1
            if Ends.drawn > 2:
                raise OSError("the disk is gone")
            return super().epoch(index, skip)

    with pytest.warns(RuntimeWarning, match="has ended, but .* could not be judged: OSError"):
        history = train(build(), batches=Ends, epochs=2, judged=5)
    assert len(history) == 2


def test_a_loss_of_probabilities_gets_probabilities_in_the_end() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -(labels * logits.log_softmax(1)).sum(1)

    model, (x, y) = build(), data(count=10)
    soft = torch.nn.functional.one_hot(y, 10).float()
    found, count = finished(model, replace(TRAINING, loss=loss), [(x, soft)], 10, 9)
    assert (found, count) == (validate(model, TRAINING, x[:9], y[:9], batch_size=10), 9)


def test_a_signal_while_the_finished_model_is_judged_ends_the_training(tmp_path: Path) -> None:
    class Signals(TensorBatches):
        drawn = 0

        def epoch(self, index: int, skip: int = 0) -> Any:
            Signals.drawn += 1
            if Signals.drawn > 1:
                signal.raise_signal(signal.SIGTERM)
            return super().epoch(index, skip)

    options: dict[str, Any] = {"epochs": 1, "judged": 5, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(Interrupted, match="all epochs are done, and in"):
        train(build(), batches=Signals, **options)
    (epoch,) = train(build(), resume=True, **options)
    assert "final_robust" in epoch


def test_labels_that_a_loss_ignores_are_not_judged_in_the_end() -> None:
    model = build()
    x, y = data()
    none = TensorBatches(x, torch.full_like(y, -100), 16)
    assert finished(model, TRAINING, none.epoch(0), 10, 9) == ({}, 0)
    some = torch.where(torch.arange(len(y)) < 3, y, 255)
    metrics, count = finished(model, TRAINING, [(x, some)], 10, 9)
    assert count == 3
    assert metrics == validate(model, TRAINING, x[:3], y[:3])


def test_what_is_judged_changes_nothing_and_is_counted() -> None:
    models, costs, drawn = [], [], []
    for judged in (0, 2):
        models.append(build(dropout=0.5))
        torch.manual_seed(0)
        with count_evaluations() as counter:
            train(models[-1], epochs=1, judged=judged)
        costs.append([counter.f_evals, counter.vjps, counter.verification_f_evals > 0])
        drawn.append(torch.get_rng_state())
    with count_evaluations() as counter:  # of the finished model
        x, y = (torch.cat(t) for t in zip(*TensorBatches(*data(), 16).epoch(0), strict=True))
        validate(models[1], TRAINING, x[:13], y[:13], batch_size=16)
    assert costs[1] == [costs[0][0] + counter.f_evals, costs[0][1] + counter.vjps, True]
    assert not costs[0][2]
    assert torch.equal(*drawn)
    assert_equal_weights(*models)


def test_flags_and_gradients_come_back_and_the_bar_tells_what_is_seen_from_what_is_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = build().eval()
    train(model, epochs=1, judged=2, verbose=True)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    shown = capsys.readouterr().err
    words = ("loss=", "residual=", "seen_clean=", "seen_robust=", " clean=", " robust=")
    assert all(word in shown for word in (*words, "unverified="))


@pytest.mark.filterwarnings("ignore:in epoch:RuntimeWarning")  # of the harm
def test_early_stopping_puts_the_best_weights_back() -> None:
    model, lr = build(), 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    # from the third epoch on the steps only do harm
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 2 else -20.0)
    seen: list[float] = []
    history = fit_adversarially(
        model,
        TRAINING,
        optimizer,
        TensorBatches(*data(), 16),
        FitSettings(epochs=20, patience=2, judged=0, verbose=False),
        validation=data("test", 100),
        scheduler=scheduler,
    )
    seen = [epoch["validation_robust"] for epoch in history]
    best = seen.index(max(seen))
    assert len(history) == best + 3 < 20
    alone = build()
    optimizer = torch.optim.SGD(alone.parameters(), lr=lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 2 else -20.0)
    fit_adversarially(
        alone,
        TRAINING,
        optimizer,
        TensorBatches(*data(), 16),
        FitSettings(epochs=best + 1, verbose=False),
        scheduler=scheduler,
    )
    assert_equal_weights(model, alone)


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"epochs": 0}, ValueError, "epochs must be"),
        ({"patience": 0}, ValueError, "patience must be"),
        ({"patience": 2}, ValueError, "needs validation"),
        ({"scheduler_interval": "batch"}, ValueError, "scheduler_interval"),
        ({"checkpoint_every": 2}, ValueError, "needs checkpoint="),
        ({"resume": True}, ValueError, "needs checkpoint="),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"restart_every": 0}, ValueError, "restart_every must be"),
        ({"restart_every": 1.5}, TypeError, "restart_every must be an integer"),
        ({"judged": -1}, ValueError, "judged must be at least 0"),
        ({"validation_batch": 0}, ValueError, "validation_batch must be at least 1"),
        ({"checkpoint": "run.pt", "checkpoint_every": 0}, ValueError, "checkpoint_every must be"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(build(), **options)


def test_a_scheduler_or_optimizer_of_something_else() -> None:
    model, other = build(), build()
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    batches = TensorBatches(*data(), 16)

    def fit(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        settings = FitSettings(epochs=1, verbose=False)
        fit_adversarially(model, TRAINING, optimizer, batches, settings, scheduler=scheduler)

    kept = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="another optimizer"):
        fit(mine, lr_scheduler.StepLR(theirs, 1))
    with pytest.raises(TypeError, match="scheduler must be"):
        fit(mine, "cosine")
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fit(theirs, None)
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_training_before_it_spoils_anything(
    tmp_path: Path,
) -> None:
    model, path = build(), tmp_path / "run.pt"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(model, optimizer=optimizer, checkpoint=path, checkpoint_every=1)
    assert checkpoint.read(path)["progress"]["step"] == 1


def test_a_loader_is_told_what_to_do() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    with pytest.raises(TypeError, match=r"give TensorBatches\(x, y, batch_size\)"):
        train(build(), batches=lambda *_: loader)
