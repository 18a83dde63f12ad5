"""Adversarial training: one step for any training loop, and a loop."""

from jiio_plugins.adversarial.batches import Batches, TensorBatches
from jiio_plugins.adversarial.fit import fit_adversarially
from jiio_plugins.adversarial.step import TRAINING_METHOD, AdversarialStep, AdversarialTraining

__all__ = [
    "TRAINING_METHOD",
    "AdversarialStep",
    "AdversarialTraining",
    "Batches",
    "TensorBatches",
    "fit_adversarially",
]
