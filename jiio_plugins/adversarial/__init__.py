"""Adversarial training: one step for any training loop, and a loop."""

from jiio_plugins.adversarial.batches import Batches, TensorBatches
from jiio_plugins.adversarial.fit import (
    FitSettings,
    StepInterval,
    fit_adversarially,
)
from jiio_plugins.adversarial.judged import Metrics, validate
from jiio_plugins.adversarial.step import (
    CARRIED_METHOD,
    CARRIED_REFINE,
    TRAINING_METHOD,
    AdversarialStep,
    AdversarialTraining,
)

__all__ = [
    "CARRIED_METHOD",
    "CARRIED_REFINE",
    "TRAINING_METHOD",
    "AdversarialStep",
    "AdversarialTraining",
    "Batches",
    "FitSettings",
    "Metrics",
    "StepInterval",
    "TensorBatches",
    "fit_adversarially",
    "validate",
]
