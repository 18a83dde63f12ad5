"""The result lies in ball and box, and moves nothing that is masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from jiio_plugins.models import ConvDEQClassifier, load_pretrained
from tests.adapters.art.helpers import EPS, Digits, assert_inside, attack_on, sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from art.estimators.classification import PyTorchClassifier


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
