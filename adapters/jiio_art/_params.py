"""The checks behind ``JIIOAttack(...)`` and ``set_params``, with ART's kinds of errors."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from jiio_plugins.equilibrium import check_solver
from jiio_plugins.losses import LOSSES, check_output, too_few_classes
from jiio_plugins.methods import Method

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier


def check_params(attack: Any) -> None:
    """Check every parameter of an attack.

    Raises:
        TypeError, ValueError: a bad parameter. The message says what is accepted.
        NotImplementedError: the classifier has preprocessing that is not written in PyTorch.
    """
    _check_classifier(attack.estimator)
    if attack.norm not in (1, 2, math.inf, "inf"):
        raise ValueError(f'norm must be 1, 2, np.inf or "inf", got {attack.norm!r}')
    _check_sizes(attack.eps, attack.eps_step)
    for name, least in (("num_random_init", 0), ("batch_size", 1), ("seed", 0)):
        check_count(name, getattr(attack, name), least)
    if attack.max_iter is not None:
        check_count("max_iter", attack.max_iter, 1)
    for name in ("targeted", "random_eps", "early_stop", "verbose"):
        if not isinstance(getattr(attack, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(attack, name)!r}")
    if attack.loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {attack.loss!r}")
    problem = too_few_classes(attack.loss, attack.estimator.nb_classes, attack.targeted)
    if problem:
        raise ValueError(problem)
    for name in ("method", "retry"):
        value = getattr(attack, name)
        if value is not None and not isinstance(value, Method):
            raise TypeError(f"{name} must be Joint(...) or Nested(...), got {value!r}")
    check_output(attack.output)
    if not isinstance(attack.verify, bool):
        check_solver(attack.verify, "verify")
    if attack.autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"autocast must be torch.bfloat16, torch.float16 or None, got {attack.autocast!r}"
        )


def check_trainable(classifier: PyTorchClassifier, attack: Any) -> None:
    """Check that an attack can be the adversary in a training.

    Args:
        classifier: what is to be trained.
        attack: a :class:`JIIOAttack`.

    Raises:
        TypeError, ValueError: it cannot. The message says what is accepted.
        NotImplementedError: a targeted attack.
    """
    if attack.estimator is not classifier:
        raise ValueError(
            "the attack is bound to another classifier than the one to be trained: build it with "
            "JIIOAttack(classifier, ...)"
        )
    check_params(attack)
    if attack.targeted:
        raise NotImplementedError("adversarial training with a targeted attack: untargeted only")
    if attack.num_random_init > 1:
        raise ValueError(
            "the attack must have num_random_init 0 or 1 for training, which makes one search for "
            f"every image, got {attack.num_random_init}"
        )
    for name in ("eps", "eps_step"):
        if isinstance(getattr(attack, name), np.ndarray):
            raise ValueError(f"{name} of the attack must be a number for training, got an array")
    for name, wanted in (
        ("random_eps", False),
        ("loss", "cross-entropy"),
        ("early_stop", False),
        ("retry", None),
    ):
        value = getattr(attack, name)
        if value != wanted:
            raise ValueError(
                f"the attack must have {name}={wanted!r} for training, which makes one search of "
                f"the same length for every image, got {value!r}"
            )
    if not isinstance(classifier.loss, nn.CrossEntropyLoss):
        raise TypeError(
            "the classifier's loss must be nn.CrossEntropyLoss, got "
            f"{type(classifier.loss).__name__}"
        )


def _check_classifier(classifier: Any) -> None:
    if not classifier.all_framework_preprocessing:
        raise NotImplementedError(
            "the classifier's preprocessing must be written in PyTorch, as JIIO differentiates "
            "through it: use the ...PyTorch version of the defence, or attack the classifier "
            "without it"
        )


def _check_sizes(eps: Any, eps_step: Any) -> None:
    _check_size("eps", eps, positive=False)
    if eps_step is None:
        return
    _check_size("eps_step", eps_step, positive=True)
    if isinstance(eps, np.ndarray) != isinstance(eps_step, np.ndarray):
        raise TypeError(
            "eps and eps_step must both be numbers or both be arrays, got "
            f"{type(eps).__name__} and {type(eps_step).__name__}"
        )
    if np.shape(eps) != np.shape(eps_step):
        raise ValueError(
            f"eps and eps_step must have the same shape, got {np.shape(eps)} and "
            f"{np.shape(eps_step)}"
        )


def _check_size(name: str, value: Any, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, np.ndarray)):
        raise TypeError(f"{name} must be a number or a NumPy array, got {type(value).__name__}")
    array = np.asarray(value, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any() or (positive and (array == 0).any()):
        sign = "positive" if positive else "not negative"
        raise ValueError(f"{name} must be finite and {sign}, got {value}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless a number is an integer, not below a least one.

    Args:
        name: what the message calls it.
        value: what was given.
        least: smallest integer accepted.

    Raises:
        TypeError: no integer.
        ValueError: one below the least.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
