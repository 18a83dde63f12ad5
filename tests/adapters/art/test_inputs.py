"""Labels and images in any form, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier, SklearnClassifier
from art.exceptions import EstimatorError
from torch import nn

from jiio_art import JIIOAttack
from tests.adapters.art.helpers import Digits, assert_inside, attack_on

if TYPE_CHECKING:
    from collections.abc import Callable


def test_labels_in_any_form(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, max_iter=3)
    result = attack.generate(x, y)
    one_hot = np.eye(10)[y]
    for form in (
        one_hot,
        one_hot.astype(np.float32),
        y[:, None],
        y.astype(float),
        y.tolist(),
        None,
    ):
        np.testing.assert_array_equal(result, attack.generate(x, form))
    assert not np.array_equal(result, attack.generate(x, (y + 1) % 10))


def test_images_of_any_type(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, max_iter=3)
    result = attack.generate(x, y)
    for form in (x.astype(np.float64), x.tolist(), torch.tensor(x), np.asfortranarray(x)):
        again = attack.generate(form, y)
        assert again.dtype == np.float32
        np.testing.assert_array_equal(result, again)
    binary = np.round(x).astype(np.uint8)
    np.testing.assert_array_equal(
        attack.generate(binary, y), attack.generate(binary.astype(np.float32), y)
    )
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(result, attack.generate(read_only, y))
    with pytest.raises(TypeError, match="x, y and mask, got anything, x_init too"):
        attack.generate(x, y, x_init=x, anything=1)


@pytest.mark.parametrize("y", [None, np.zeros((0,)), np.zeros((0, 10))])
def test_empty_batch(trained: PyTorchClassifier, y: Any) -> None:
    attack = attack_on(trained)
    result = attack.generate(np.zeros((0, 1, 8, 8)), y)
    assert result.shape == (0, 1, 8, 8)
    assert result.dtype == np.float32
    assert attack.solution.f_evals.shape == (0,)
    assert attack.solution.success.dtype == bool
    assert attack.solution.report() == ""


def test_batch_of_one(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained)
    assert_inside(attack.generate(x[:1], y[:1]), x[:1], 2, 1.0)
    assert attack.solution.success.tolist() == [True]


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"norm": 3}, ValueError, "norm must be 1, 2"),
        ({"norm": "two"}, ValueError, "norm must be 1, 2"),
        ({"eps": -0.1}, ValueError, "eps must be finite and not negative"),
        ({"eps": np.nan}, ValueError, "eps must be finite"),
        ({"eps": np.array([0.1, -0.1])}, ValueError, "not negative"),
        ({"eps": [0.1]}, TypeError, "eps must be a number or a NumPy array, got list"),
        ({"eps": True}, TypeError, "got bool"),
        ({"eps": 0.1, "eps_step": 0.0}, ValueError, "eps_step must be finite and positive"),
        ({"eps": 0.1, "eps_step": np.ones(3)}, TypeError, "both be numbers or both be arrays"),
        ({"eps": np.ones(2), "eps_step": np.ones(3)}, ValueError, "same shape"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"max_iter": 2.5}, TypeError, "max_iter must be an integer"),
        ({"num_random_init": -1}, ValueError, "num_random_init must be at least 0"),
        ({"num_random_init": True}, TypeError, "num_random_init must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"targeted": 1}, ValueError, "targeted must be True or False"),
        ({"verbose": "no"}, ValueError, "verbose must be True or False"),
        ({"loss": "hinge"}, ValueError, "loss must be one of cross-entropy"),
        ({"method": "joint"}, TypeError, "method must be Joint"),
        ({"autocast": torch.int8}, ValueError, "autocast must be torch.bfloat16"),
        ({"summary_writer": 3}, ValueError, "summary_writer"),
    ],
)
def test_bad_parameters(
    shared_small: PyTorchClassifier, options: dict[str, Any], error: type, match: str
) -> None:
    if "summary_writer" not in options:  # ART opens the writer before it checks the argument
        attack = attack_on(shared_small)
        with pytest.raises(error, match=match):
            attack.set_params(**{"eps": 1.0, **options})
    with pytest.raises(error, match=match):
        attack_on(shared_small, **options)


@pytest.mark.parametrize(
    ("classes", "options", "match"),
    [
        (2, {"loss": "dlr"}, "needs 3 classes or more, the model has 2"),
        (3, {"loss": "dlr", "targeted": True}, "needs 4 classes or more, the model has 3"),
    ],
)
def test_too_few_classes_for_a_loss(classes: int, options: dict[str, Any], match: str) -> None:
    model, loss = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(model, loss, (1, 8, 8), classes, clip_values=(0.0, 1.0))
    with pytest.raises(ValueError, match=match):
        attack_on(classifier, **options)


def _changed(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x[3, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda x, y: {"x": _changed(x, np.nan), "y": y}, "NaN or Inf .first in sample 3"),
        (lambda x, y: {"x": _changed(x, np.inf), "y": y}, "NaN or Inf"),
        (lambda x, y: {"x": x.astype(np.float64) * 1e300, "y": y}, "NaN or Inf"),
        (
            lambda x, y: {"x": _changed(x, 1.01), "y": y},
            "clip_values 0 … 1.*first outside in s.* 3",
        ),
        (lambda x, y: {"x": (x * 255).astype(np.uint8), "y": y}, "clip_values"),
        (lambda x, y: {"x": x[:, 0], "y": y}, r"shape \(n, 1, 8, 8\)"),
        (lambda x, y: {"x": x[0], "y": y[:1]}, r"shape \(n, 1, 8, 8\)"),
        (lambda x, y: {"x": x[..., :6], "y": y}, r"shape \(n, 1, 8, 8\)"),
        (lambda x, y: {"x": np.float32(0.5), "y": y}, "shape"),
        (lambda x, y: {"x": x, "y": y + 5}, "classes 0 … 9"),
        (lambda x, y: {"x": x, "y": -y - 1}, "classes 0 … 9"),
        (lambda x, y: {"x": x, "y": y + 0.5}, "classes 0 … 9"),
        (lambda x, y: {"x": x, "y": np.full(8, np.nan)}, "classes 0 … 9"),
        (lambda x, y: {"x": x, "y": y[:3]}, "y must be one-hot"),
        (lambda x, y: {"x": x, "y": np.eye(11)[y]}, "y must be one-hot"),
        (lambda x, y: {"x": x, "y": np.full((8, 10), np.nan)}, "y holds NaN"),
        (lambda x, y: {"x": x, "y": y, "mask": np.ones((7, 8), bool)}, "mask has shape"),
        (lambda x, y: {"x": x, "y": y, "mask": np.ones((5, 1, 8, 8), bool)}, "mask has shape"),
        (lambda x, y: {"x": x, "y": y, "mask": -np.ones((8, 8))}, "zero or positive"),
        (lambda x, y: {"x": x, "y": y, "mask": np.full((8, 8), np.nan)}, "zero or positive"),
        (lambda x, y: {"x": x, "y": y, "mask": np.ones((8, 8), int)}, "bool or float"),
    ],
)
def test_bad_images_labels_masks(
    shared_small: PyTorchClassifier, digits: Digits, build: Callable[..., Any], match: str
) -> None:
    attack = attack_on(shared_small, max_iter=2)
    with pytest.raises(ValueError, match=match):
        attack.generate(**build(*digits))
    assert attack.solution is None


def test_complex_images_are_not_cut_to_their_real_part(
    shared_small: PyTorchClassifier, digits: Digits
) -> None:
    x, y = digits
    with pytest.raises(TypeError, match="x must be real, got complex64"):
        attack_on(shared_small).generate(x + 0j, y)


@pytest.mark.parametrize("shape", [(7,), (7, 1, 1, 1), (1, 8, 8, 8, 1), (3, 8)])
def test_eps_of_the_wrong_shape(
    shared_small: PyTorchClassifier, digits: Digits, shape: tuple[int, ...]
) -> None:
    attack = attack_on(shared_small, eps=np.ones(shape))
    with pytest.raises(ValueError, match="eps has shape"):
        attack.generate(*digits)


def test_targets_are_needed(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(shared_small, targeted=True, max_iter=2)
    attack.generate(x, y)
    assert attack.solution is not None
    with pytest.raises(ValueError, match="needs the wanted classes"):
        attack.generate(x)
    assert attack.solution is None  # never that of an earlier call


def test_a_model_without_fixed_point(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    plain = make_classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(
        ValueError, match=r"no equilibrium layer.*jiio_plugins\.Equilibrium\(cell\)"
    ):
        attack_on(plain).generate(*digits)


def test_a_classifier_that_is_not_pytorch() -> None:
    svc = pytest.importorskip("sklearn.linear_model").LogisticRegression()
    with pytest.raises(EstimatorError, match="PyTorchEstimator"):
        JIIOAttack(SklearnClassifier(svc))
