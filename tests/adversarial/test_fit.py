"""The training loop: what it reaches, what it puts back, what it says of bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from jiio_plugins import Joint
from jiio_plugins.adversarial.batches import TensorBatches
from jiio_plugins.adversarial.fit import FitSettings, fit_adversarially
from jiio_plugins.utils import checkpoint
from tests.adversarial.helpers import TRAINING, assert_equal_weights, build, data, train

if TYPE_CHECKING:
    from pathlib import Path


def test_training_makes_the_network_more_robust() -> None:
    model = build()
    history = train(model, epochs=8, validation=data("test", 100))
    assert len(history) == 8
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["validation_robust"] > history[0]["validation_robust"] + 0.2
    assert history[-1]["validation_clean"] >= history[-1]["validation_robust"]
    assert {"loss", "robust", "clean", "residual"} <= history[0].keys()


def test_states_that_lag_behind_are_warned_of() -> None:
    model = build()
    with torch.no_grad():
        for weight in model.equilibrium.parameters():
            weight *= 3
    with pytest.warns(RuntimeWarning, match="epoch 1 .* raise jacobian_weight"):
        train(model, epochs=1, training=replace(TRAINING, method=Joint(max_iter=1, warmup=1)))


def test_flags_and_gradients_come_back_and_the_bar_shows_the_four_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = build().eval()
    train(model, epochs=1, verbose=True)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("loss=", "clean=", "robust=", "residual="))


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
        FitSettings(epochs=20, patience=2, verbose=False),
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
