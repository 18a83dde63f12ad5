"""``jiio_art.JIIOAttack``: what it finds, what it promises, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoAttack
from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothingPyTorch
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier, SklearnClassifier
from art.exceptions import EstimatorError
from art.metrics import adversarial_accuracy
from art.preprocessing.expectation_over_transformation.pytorch import EoTPyTorch
from art.preprocessing.preprocessing import PreprocessorPyTorch
from art.summary_writer import SummaryWriter
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from jiio_art import AttackRecord, JIIOAttack
from jiio_plugins import Joint, Nested, Status, count_evaluations
from jiio_plugins.models import ConvDEQClassifier, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Callable

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


# what it finds


@pytest.mark.parametrize("norm", [1, 2, np.inf, "inf"])
def test_fools_the_classifier_and_says_what_it_cost(
    trained: PyTorchClassifier, digits: Digits, norm: Any
) -> None:
    x, y = digits
    p = float(norm)
    attack = attack_on(trained, norm=norm, eps=EPS[p], batch_size=5)
    with count_evaluations() as counter:
        adversarial = attack.generate(x, y)
    record = attack.solution
    assert record is not None
    assert (trained.predict(x).argmax(1) == y).all()
    fooled = trained.predict(adversarial).argmax(1) != y
    np.testing.assert_array_equal(record.success, fooled)
    assert fooled.mean() >= 0.75
    assert_inside(adversarial, x, p, EPS[p])
    assert sizes(adversarial, x, p).max() > 0.9 * EPS[p]
    assert all(getattr(record, name).shape == (8,) for name in AttackRecord.__annotations__)
    assert (record.iterations == Joint().max_iter).all()
    products = Joint().max_iter + Joint().adjoint_warmup
    assert counter.vjps == record.vjps.sum() == 8 * products
    assert counter.f_evals == record.f_evals.sum() > record.vjps.sum()
    assert (record.verification_f_evals > 0).all()
    assert (record.status == Status.CONVERGED).all()
    assert (record.z_residual < 1e-4).all()
    assert (record.costate_residual > 0).all()
    assert np.median(record.costate_residual) < 0.5
    assert "8 × CONVERGED" in record.report()
    loss = trained.compute_loss(adversarial, np.eye(10, dtype=np.float32)[y])
    np.testing.assert_allclose(-record.value, loss, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(-record.model_value, loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loss", ["cross-entropy", "dlr", "margin"])
def test_every_loss_reaches_a_target(trained: PyTorchClassifier, digits: Digits, loss: str) -> None:
    x, y = digits
    targets = (y + 1) % 10
    attack = attack_on(trained, eps=2.0, targeted=True, loss=loss)
    adversarial = attack.generate(x, targets)
    assert (trained.predict(adversarial).argmax(1) == targets).mean() >= 0.75
    assert_inside(adversarial, x, 2, 2.0)


def test_early_stop_costs_less(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    whole, early = attack_on(trained), attack_on(trained, early_stop=True)
    whole.generate(x, y)
    early.generate(x, y)
    assert early.solution.success.all()
    assert early.solution.vjps.sum() < 0.5 * whole.solution.vjps.sum()


def test_first_step_and_iterations(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    ours = attack_on(trained, eps=0.8, eps_step=0.4, max_iter=6)
    same = attack_on(trained, eps=0.8, method=Joint(max_iter=6, step_size=0.5))
    other = attack_on(trained, eps=0.8, max_iter=6)
    result = ours.generate(x, y)
    assert (ours.solution.iterations == 6).all()
    np.testing.assert_allclose(result, same.generate(x, y), atol=1e-6)
    assert np.abs(result - other.generate(x, y)).max() > 1e-3


def test_another_method(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, method=Nested(max_iter=9), max_iter=3)
    assert_inside(attack.generate(x[:2], y[:2]), x[:2], 2, 1.0)
    assert (attack.solution.iterations == 3).all()
    assert (attack.solution.vjps > 3).all()  # an adjoint solve takes more than one


def test_retry(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    short = attack_on(trained, eps=0.5, max_iter=2)
    short.generate(x, y)
    both = attack_on(trained, eps=0.5, max_iter=2, retry=Joint(max_iter=10))
    assert_inside(both.generate(x, y), x, 2, 0.5)
    missed = ~short.solution.success
    assert missed.any()
    assert (both.solution.iterations == 2 + 10 * missed).all()
    with pytest.raises(TypeError, match="retry must be Joint"):
        attack_on(trained, retry=40)


def test_the_batch_size_does_not_matter(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    one, many = attack_on(trained, batch_size=3), attack_on(trained, batch_size=8)
    np.testing.assert_allclose(one.generate(x, y), many.generate(x, y), atol=1e-3)
    np.testing.assert_allclose(one.solution.value, many.solution.value, rtol=1e-3, atol=1e-3)


def test_random_starts(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    x, y = np.repeat(x[:1], 4, axis=0), np.repeat(y[:1], 4)
    attack = attack_on(trained, norm=np.inf, eps=0.03, num_random_init=1, batch_size=2, max_iter=2)
    first = attack.generate(x, y)
    np.testing.assert_array_equal(first, attack.generate(x, y))
    assert len(np.unique(first.reshape(4, -1), axis=0)) == 4  # in a batch and between batches
    attack.set_params(seed=1)
    assert not np.array_equal(first, attack.generate(x, y))
    assert_inside(first, x, np.inf, 0.03)


def test_restarts_keep_the_best_of_each_sample(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    one = attack_on(trained, norm=np.inf, eps=0.06, num_random_init=1, max_iter=8)
    three = attack_on(trained, norm=np.inf, eps=0.06, num_random_init=3, max_iter=8)
    one.generate(x, y)
    three.generate(x, y)
    before, after = one.solution, three.solution
    assert not before.success.all()  # else there would be no second start
    assert (after.success >= before.success).all()
    assert (
        after.value[after.success == before.success]
        <= before.value[after.success == before.success] + 1e-6
    ).all()
    assert (after.value < before.value - 1e-3).any()
    # a sample that has succeeded is not started again
    np.testing.assert_array_equal(after.vjps[before.success], before.vjps[before.success])
    assert (after.vjps[~before.success] > before.vjps[~before.success]).all()


# ball and box


@st.composite
def _settings(draw: st.DrawFn) -> dict[str, Any]:
    norm = draw(st.sampled_from([1, 2, np.inf]))
    rows = draw(st.integers(1, 4))
    scale = EPS[norm] * draw(st.floats(0.0, 3.0))
    eps: Any = scale
    if draw(st.booleans()):
        factors = draw(st.lists(st.floats(0.0, 2.0), min_size=rows, max_size=rows))
        shape = draw(st.sampled_from([(rows,), (rows, 1, 1, 1)]))
        eps = scale * np.reshape(factors, shape)
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "float", "per sample"]))
    seed = draw(st.integers(0, 9))
    rng = np.random.default_rng(seed)
    if kind != "none":
        mask = rng.random((rows, 1, 8, 8) if kind == "per sample" else (8, 8)) < 0.5
        mask = mask.astype(np.float32) * 0.7 if kind == "float" else mask
    images = rng.random((rows, 1, 8, 8), dtype=np.float32)
    if draw(st.booleans()):
        images = np.round(images)  # every pixel at a bound of the box
    return {
        "x": images,
        "y": rng.integers(0, 10, rows),
        "mask": mask,
        "norm": norm,
        "eps": eps,
        "targeted": draw(st.booleans()),
        "num_random_init": draw(st.integers(0, 2)),
        "random_eps": draw(st.booleans()),
        "batch_size": draw(st.integers(1, 4)),
        "seed": seed,
        "eps_step": draw(st.sampled_from([None, 0.05])) if np.ndim(eps) == 0 else None,
    }


@given(case=_settings())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_the_result_is_in_ball_and_box(
    shared_small: PyTorchClassifier, case: dict[str, Any]
) -> None:
    x, y, mask = (case.pop(name) for name in ("x", "y", "mask"))
    attack = attack_on(shared_small, max_iter=4, **case)
    adversarial = attack.generate(x, y, mask=mask)
    assert_inside(adversarial, x, case["norm"], np.reshape(case["eps"], -1))
    if mask is not None:
        fixed = np.broadcast_to(mask == 0, x.shape)
        np.testing.assert_array_equal(adversarial[fixed], x[fixed])


def test_the_ball_is_used(shared_small: PyTorchClassifier) -> None:
    """The bounds above would also hold for an attack that does nothing."""
    x = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    eps = np.array([0.1, 0.0, 0.4])
    for norm in (1, 2, np.inf):
        attack = attack_on(shared_small, norm=norm, eps=eps, max_iter=6)
        moved = sizes(attack.generate(x), x, norm)
        np.testing.assert_allclose(moved, eps, rtol=1e-4, atol=1e-7)


def test_array_eps(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    per_sample = np.linspace(0.1, 0.8, 8)
    results = [
        attack_on(shared_small, eps=eps, eps_step=eps / 2, max_iter=5, batch_size=3).generate(x, y)
        for eps in (per_sample, per_sample.reshape(8, 1, 1, 1))
    ]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(sizes(results[0], x, 2), per_sample, rtol=1e-4)
    one = attack_on(shared_small, eps=0.8, eps_step=0.4, max_iter=5).generate(x[7:], y[7:])
    np.testing.assert_allclose(results[0][7:], one, atol=1e-4)


@pytest.mark.parametrize("clipped", [True, False])
def test_linf_takes_an_eps_for_every_pixel(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits, clipped: bool
) -> None:
    x, y = digits
    torch.manual_seed(0)
    classifier = make_classifier(
        ConvDEQClassifier(channels=4, groups=2), clip_values=(0.0, 1.0) if clipped else None
    )
    eps = np.random.default_rng(0).uniform(0, 0.2, (8, 8))
    attack = attack_on(classifier, norm=np.inf, eps=eps, num_random_init=1, max_iter=5)
    moved = np.abs(attack.generate(x, y).astype(np.float64) - x)
    assert (moved <= eps + 1e-7).all()
    assert np.isclose(moved, eps, atol=1e-6).mean() > 0.3
    with pytest.raises(ValueError, match="one value per sample with norm 2"):
        attack_on(classifier, eps=eps).generate(x, y)


def test_random_eps(shared_small: PyTorchClassifier) -> None:
    x = np.full((60, 1, 8, 8), 0.5, dtype=np.float32)
    attack = attack_on(shared_small, eps=0.5, random_eps=True, max_iter=2, batch_size=60)
    drawn = sizes(attack.generate(x), x, 2) / 0.5
    assert attack.eps == 0.5
    assert len(np.unique(drawn.round(6))) > 50
    assert drawn.max() <= 1 + 1e-6
    assert 0.3 < np.median(drawn) < 0.42  # half a normal variable, cut at two deviations: 0.33
    half = attack_on(shared_small, eps=np.full(60, 0.5), random_eps=True, max_iter=2, batch_size=60)
    np.testing.assert_array_equal(half.generate(x), attack.generate(x))


def test_mask(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[0, 2:5, 2:5] = True
    attack = attack_on(shared_small, max_iter=5)
    results = [
        attack.generate(x, y, mask=m)
        for m in (mask, mask.astype(np.float64), np.broadcast_to(mask, x.shape), mask.tolist())
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    changed = (results[0] != x).any(axis=(0, 1))
    np.testing.assert_array_equal(changed, mask[0])
    nothing = attack.generate(x, y, mask=np.zeros((8, 8), dtype=bool))
    np.testing.assert_array_equal(nothing, x)
    two = np.stack([mask, ~mask])
    batched = attack_on(shared_small, max_iter=5, batch_size=1).generate(x[:2], y[:2], mask=two)
    assert (batched[two == 0] == x[:2][two == 0]).all()
    assert ((batched != x[:2]) & two).any(axis=(1, 2, 3)).all()


def test_clip_values(make_classifier: Callable[..., PyTorchClassifier], digits: Digits) -> None:
    x, y = digits
    model = load_pretrained("digits")
    free = attack_on(make_classifier(model, clip_values=None), max_iter=5).generate(x, y)
    assert free.min() < 0
    lower, upper = np.zeros((1, 8, 8)), np.linspace(1, 2, 64).reshape(1, 8, 8)
    arrays = make_classifier(model, clip_values=(lower, upper))
    result = attack_on(arrays, eps=3.0, max_iter=5).generate(x, y)
    assert (result >= 0).all()
    assert (result <= upper.astype(np.float32)).all()
    assert result.max() > 1


# labels and images


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
    np.testing.assert_array_equal(result, attack.generate(read_only, y, x_init=x, anything=1))


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


# preprocessing


class Normalised(nn.Module):
    def __init__(self, model: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


def test_eps_is_in_the_units_of_the_image(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    model = Normalised(load_pretrained("digits"), -1.0, 2.0)  # undoes what ART does before it
    outside = make_classifier(model, preprocessing=(0.5, 0.5))
    inside = make_classifier(Normalised(model, 0.5, 0.5))
    result = attack_on(outside, eps=0.7).generate(x, y)
    assert_inside(result, x, 2, 0.7)
    np.testing.assert_allclose(sizes(result, x, 2), 0.7, rtol=1e-3)
    np.testing.assert_allclose(result, attack_on(inside, eps=0.7).generate(x, y), atol=1e-3)


class Blur(PreprocessorPyTorch):
    """A 3×3 mean, or with ``repeat`` the batch several times over."""

    def __init__(self, repeat: int = 1) -> None:
        super().__init__(device_type="cpu", apply_fit=True, apply_predict=True)
        self.repeat = repeat

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return nn.functional.avg_pool2d(x, 3, stride=1, padding=1).repeat(self.repeat, 1, 1, 1), y


class Shifts(EoTPyTorch):
    """Expectation over transformation, as ART's own: ``nb_samples`` images for each."""

    def _transform(self, x: Tensor, y: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return x.roll(int(torch.randint(3, ())), dims=3), y


def test_differentiates_through_a_defence(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    model = load_pretrained("digits")
    blurred = make_classifier(model, preprocessing_defences=[Blur()])
    attack = attack_on(blurred, eps=1.5)
    adversarial = attack.generate(x, y)
    assert_inside(adversarial, x, 2, 1.5)
    fooled = blurred.predict(adversarial).argmax(1) != y
    np.testing.assert_array_equal(attack.solution.success, fooled)
    # the attack that does not know of the blur is worse against it
    unaware = attack_on(make_classifier(model), eps=1.5).generate(x, y)
    labels = np.eye(10, dtype=np.float32)[y]
    assert (
        blurred.compute_loss(adversarial, labels).mean()
        > 1.2 * blurred.compute_loss(unaware, labels).mean()
    )


def test_arts_own_defence_in_pytorch(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    pytest.importorskip("kornia")  # ART's smoothing needs it
    x, y = digits
    smooth = SpatialSmoothingPyTorch(channels_first=True, device_type="cpu")
    classifier = make_classifier(load_pretrained("digits"), preprocessing_defences=smooth)
    attack = attack_on(classifier, max_iter=10)
    assert_inside(attack.generate(x, y), x, 2, 1.0)
    assert attack.solution.success.any()


def test_unsupported_preprocessing(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    model = load_pretrained("digits")
    in_numpy = make_classifier(
        model, preprocessing_defences=FeatureSqueezing(clip_values=(0, 1), bit_depth=4)
    )
    with pytest.raises(NotImplementedError, match="must be written in PyTorch"):
        attack_on(in_numpy)
    for defence in (Blur(repeat=3), Shifts(nb_samples=2, clip_values=(0.0, 1.0))):
        several = make_classifier(model, preprocessing_defences=defence)
        with pytest.raises(NotImplementedError, match="one state per image"):
            attack_on(several).generate(x, y)


# bad input


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


# what it leaves alone


class Stateful(nn.Module):
    """A classifier with every kind of state a call could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.5)
        self.deq = ConvDEQClassifier(channels=4, groups=2)
        self.fail_at: int | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
            raise RuntimeError("on purpose")
        logits: Tensor = self.deq(self.dropout(self.norm(x)))
        return logits


def _state_of(classifier: PyTorchClassifier) -> list[Any]:
    model = classifier.model
    return [
        [m.training for m in classifier._model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        torch.get_rng_state(),
        np.random.get_state()[1:3],  # noqa: NPY002
    ]


@pytest.mark.parametrize("fail_at", [None, 1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"num_random_init": 2, "autocast": torch.bfloat16}])
def test_nothing_of_the_callers_is_changed(
    make_classifier: Callable[..., PyTorchClassifier],
    digits: Digits,
    fail_at: int | None,
    options: dict[str, Any],
) -> None:
    x, y = (array.copy() for array in digits)
    torch.manual_seed(0)
    model = Stateful().train()
    model.norm.eval()  # frozen by the user
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 3 != 0)
        p.grad = torch.full_like(p, float(k)) if k % 2 else None
    classifier = make_classifier(model)
    before = _state_of(classifier)
    model.fail_at = fail_at
    attack = attack_on(classifier, max_iter=2, batch_size=4, **options)
    if fail_at is None:
        attack.generate(x)
        attack.generate(x, y)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            attack.generate(x)
        assert attack.solution is None
    torch.testing.assert_close(before, _state_of(classifier), rtol=0, atol=0)
    np.testing.assert_array_equal(x, digits[0])
    np.testing.assert_array_equal(y, digits[1])


def test_the_result_is_not_a_view(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = (array.copy() for array in digits)
    result = attack_on(shared_small, eps=0.0, max_iter=2).generate(x, y)
    np.testing.assert_array_equal(result, x)
    assert not np.shares_memory(result, x)
    empty = x[:0]
    assert attack_on(shared_small).generate(empty) is not empty


# ART's hooks


def test_parameters_as_art_has_them(shared_small: PyTorchClassifier) -> None:
    attack = attack_on(shared_small)
    assert attack.estimator is shared_small
    assert attack.targeted is False
    attack.set_params(targeted=True, eps=np.ones(3), max_iter=7)
    assert attack.targeted is True
    assert attack.max_iter == 7
    with pytest.raises(ValueError, match="cannot be set"):
        attack.set_params(decay=1.0)
    text = repr(attack)
    assert text.startswith("JIIOAttack(norm=2, ")
    assert all(f"{name}=" in text for name in JIIOAttack.attack_params)
    defaults = JIIOAttack(shared_small)
    assert (defaults.norm, defaults.eps, defaults.batch_size) == (np.inf, 0.3, 32)


def test_copies(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(shared_small, max_iter=2)
    result = attack.generate(x, y)
    np.testing.assert_array_equal(copy.deepcopy(attack).generate(x, y), result)
    record = pickle.loads(pickle.dumps(attack.solution))
    np.testing.assert_array_equal(record.value, attack.solution.value)
    with pytest.raises(AttributeError):
        record.value = None


def test_inside_auto_attack(
    trained: PyTorchClassifier, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = digits
    # AutoAttack imports this package of ART's optional ones, and here does nothing with it
    monkeypatch.setitem(sys.modules, "multiprocess", sys.modules[__name__])
    members = [attack_on(trained, eps=0.5, max_iter=4), attack_on(trained, eps=0.5, max_iter=12)]
    auto = AutoAttack(
        trained, norm=2, eps=0.5, eps_step=0.1, attacks=members, batch_size=8, targeted=True
    )
    adversarial = auto.generate(x, y)
    assert_inside(adversarial, x, 2, 0.5)
    alone = members[1]
    alone.set_params(targeted=False)
    alone.generate(x, y)
    fooled = trained.predict(adversarial).argmax(1) != y
    assert fooled.sum() >= alone.solution.success.sum() > 0


def test_adversarial_accuracy(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, eps=0.3, max_iter=10)
    accuracy = adversarial_accuracy(trained, x, y, attack_crafter=attack)
    assert accuracy == 1 - attack.solution.success.mean()
    assert 0 < accuracy < 1


def test_adversarial_training(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (ART's trainer draws from the global state)
    model = ConvDEQClassifier(channels=4, groups=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    classifier = make_classifier(model, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    attack = attack_on(classifier, max_iter=2, verbose=True)
    trainer = AdversarialTrainer(classifier, attack, ratio=0.5)
    trainer.fit(x, np.eye(10, dtype=np.float32)[y], batch_size=4, nb_epochs=1)
    assert attack.verbose is False
    assert attack.solution.f_evals.shape == (2,)
    after = [p.detach() for p in model.parameters()]
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Recorder(SummaryWriter):
    def __init__(self) -> None:
        super().__init__(summary_writer=False)
        self.updates: list[dict[str, Any]] = []
        self.resets = 0

    def _init_summary_writer(self, summary_writer: Any, init_counter: int) -> None:
        pass

    def update(self, batch_id: int, global_step: int, **kwargs: Any) -> None:  # type: ignore[override]
        self.updates.append({"batch_id": batch_id, "global_step": global_step, **kwargs})

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("targeted", [False, True])
def test_summary_writer(trained: PyTorchClassifier, digits: Digits, targeted: bool) -> None:
    x, y = digits
    writer = Recorder()
    attack = attack_on(
        trained, eps=0.02, max_iter=12, batch_size=5, targeted=targeted, summary_writer=writer
    )
    attack.generate(x, y)
    assert [(u["batch_id"], u["global_step"]) for u in writer.updates] == [
        (batch, step) for batch in range(2) for step in range(12)
    ]
    assert writer.resets == 1
    last = writer.updates[11]
    assert last["x"].shape == last["grad"].shape == (5, 1, 8, 8)
    assert last["estimator"] is trained
    assert last["targeted"] is targeted
    assert last["patch"] is None
    np.testing.assert_array_equal(last["y"], np.eye(10)[y[:5]])
    np.testing.assert_array_equal(writer.updates[0]["x"], x[:5])
    # uphill for the attacker, as ART's own attacks write it
    exact = trained.loss_gradient(last["x"], last["y"]) * (-1 if targeted else 1)
    trained.model.zero_grad()
    cosine = (exact * last["grad"]).sum((1, 2, 3)) / np.sqrt(
        np.square(exact).sum((1, 2, 3)) * np.square(last["grad"]).sum((1, 2, 3))
    )
    assert cosine.min() > 0.9


def test_tensorboard(trained: PyTorchClassifier, digits: Digits, tmp_path: Any) -> None:
    pytest.importorskip("tensorboardX")
    x, y = digits
    attack = attack_on(
        trained, max_iter=2, num_random_init=2, loss="margin", summary_writer=str(tmp_path)
    )
    attack.generate(x[:2], y[:2])
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*events*")}
    assert any("loss" in name for name in written)
    assert any("gradients" in name for name in written)


def test_progress_bar(
    shared_small: PyTorchClassifier, digits: Digits, capfd: pytest.CaptureFixture[str]
) -> None:
    for verbose in (False, True):
        attack_on(shared_small, max_iter=1, batch_size=4, verbose=verbose).generate(*digits)
        assert ("JIIO - Batches" in capfd.readouterr().err) is verbose


# precision and device


def test_autocast(make_classifier: Callable[..., PyTorchClassifier], digits: Digits) -> None:
    x, y = digits
    model = load_pretrained("digits")
    seen: list[torch.dtype] = []
    model.equilibrium.cell.register_forward_hook(lambda m, args, out: seen.append(args[1].dtype))
    classifier = make_classifier(model)
    attack = attack_on(classifier, eps=0.6, autocast=torch.bfloat16)
    adversarial = attack.generate(x, y)
    assert torch.bfloat16 in seen  # the loop
    assert seen[-1] == torch.float32  # the verification
    assert_inside(adversarial, x, 2, 0.6)
    assert (attack.solution.status == Status.CONVERGED).all()
    full = attack_on(classifier, eps=0.6)
    full.generate(x, y)
    assert attack.solution.success.mean() >= full.solution.success.mean() - 0.13
    np.testing.assert_allclose(attack.solution.value.mean(), full.solution.value.mean(), rtol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_cuda_agrees_with_the_cpu(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits, norm: float
) -> None:
    x, y = digits
    on_cpu = attack_on(make_classifier(load_pretrained("digits")), norm=norm, eps=EPS[norm])
    classifier = make_classifier(load_pretrained("digits"), device_type="gpu")
    on_gpu = attack_on(classifier, norm=norm, eps=EPS[norm])
    states = torch.cuda.get_rng_state()
    assert_inside(on_gpu.generate(x, y), x, norm, EPS[norm])
    on_cpu.generate(x, y)
    np.testing.assert_allclose(
        on_gpu.solution.value.mean(), on_cpu.solution.value.mean(), rtol=0.05, atol=0.05
    )
    torch.testing.assert_close(states, torch.cuda.get_rng_state())
    varied = attack_on(
        classifier, norm=norm, eps=EPS[norm], autocast=torch.bfloat16, num_random_init=2
    )
    mask = np.arange(8) < 6
    result = varied.generate(x, mask=mask)
    assert_inside(result, x, norm, EPS[norm])
    np.testing.assert_array_equal(result[..., 6:], x[..., 6:])
