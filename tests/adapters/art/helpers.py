"""An attack with short words, and what must hold of its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jiio_art import JIIOAttack

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier

Digits = tuple[np.ndarray, np.ndarray]
EPS = {1: 4.0, 2: 1.0, np.inf: 0.15}


def attack_on(classifier: PyTorchClassifier, **options: Any) -> JIIOAttack:
    return JIIOAttack(classifier, **{"norm": 2, "eps": 1.0, "verbose": False, **options})


def sizes(adversarial: np.ndarray, x: np.ndarray, norm: float) -> np.ndarray:
    delta = adversarial.astype(np.float64) - x.astype(np.float64)
    return np.linalg.norm(delta.reshape(len(x), -1), ord=norm, axis=1)


def assert_inside(adversarial: np.ndarray, x: np.ndarray, norm: float, eps: Any) -> None:
    """In the ball up to the rounding of float32, and in the box [0, 1] exactly."""
    assert adversarial.dtype == np.float32
    assert adversarial.shape == x.shape
    power = 0.0 if norm == np.inf else 1 / norm
    rounding = 2.0**-23 * np.abs(x).max() * x[0].size ** power
    assert (sizes(adversarial, x, norm) <= np.asarray(eps) * (1 + 1e-6) + rounding).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
