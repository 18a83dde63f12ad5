"""A trained classifier to attack, and a small untrained one where only the mechanics matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import ConvDEQClassifier, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from art.estimators.classification import PyTorchClassifier

SHAPE = (1, 8, 8)


def classifier_of(model: nn.Module, **options: Any) -> PyTorchClassifier:
    # not above: pytest wants this file also where ART is not installed
    from art.estimators.classification import PyTorchClassifier

    options = {"clip_values": (0.0, 1.0), "device_type": "cpu", **options}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, 10, **options)


@pytest.fixture(scope="session")
def make_classifier() -> Callable[..., PyTorchClassifier]:
    """``make_classifier(model, **options of PyTorchClassifier)``."""
    return classifier_of


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Eight test images and their classes, all classified correctly."""
    images, labels = load_digits("test")
    return images[:8].numpy(), labels[:8].numpy()


@pytest.fixture(scope="session")
def trained() -> PyTorchClassifier:
    return classifier_of(load_pretrained("digits"))


def small_model(seed: int = 0) -> ConvDEQClassifier:
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = ConvDEQClassifier(channels=4, groups=2)
    torch.set_rng_state(generator_state)
    return model.eval()


@pytest.fixture
def small() -> PyTorchClassifier:
    """Untrained, and new for every test, which may change it."""
    return classifier_of(small_model())


@pytest.fixture(scope="session")
def shared_small() -> PyTorchClassifier:
    """Untrained, for tests that only look."""
    return classifier_of(small_model())
