"""A small training that can be stopped, and its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from jiio_plugins import Joint
from jiio_plugins.adversarial.batches import TensorBatches
from jiio_plugins.adversarial.fit import FitSettings, fit_adversarially
from jiio_plugins.adversarial.step import AdversarialTraining
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import ConvDEQClassifier

if TYPE_CHECKING:
    from collections.abc import Callable

TRAINING = AdversarialTraining(norm=2, eps=0.3, lower=0.0, upper=1.0, method=Joint(max_iter=3))
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=40),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "ReduceLROnPlateau max": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 1), lr_scheduler.ExponentialLR(o, 0.7)], [1]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.7)]
    ),
}


class StoppedError(Exception):
    """Stands for whatever ends a training in the middle."""


class Bomb(TensorBatches):
    """Batches that end in the middle of the second epoch."""

    def epoch(self, index: int, skip: int = 0) -> Any:
        for k, batch in enumerate(super().epoch(index, skip)):
            if index == 1 and k == 2:
                raise StoppedError
            yield batch


def data(split: str = "train", count: int = 64) -> tuple[Tensor, Tensor]:
    x, y = load_digits(split)
    return x[:count], y[:count]


def build(dropout: float = 0.0, seed: int = 0, channels: int = 4) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = ConvDEQClassifier(channels=channels, groups=2)
    if dropout:
        model.encoder = nn.Sequential(model.encoder, nn.Dropout2d(dropout))
    return model


def train(
    model: nn.Module,
    *,
    batches: Callable[..., Any] = TensorBatches,
    scheduler: str | None = None,
    training: AdversarialTraining = TRAINING,
    optimizer: torch.optim.Optimizer | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    return fit_adversarially(
        model,
        training,
        optimizer,
        batches(*data(), 16),
        FitSettings(**{"epochs": 3, "judged": 0, "verbose": False, **options}),
        scheduler=None if scheduler is None else SCHEDULERS[scheduler](optimizer),
        validation=validation,
    )


def assert_equal_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
