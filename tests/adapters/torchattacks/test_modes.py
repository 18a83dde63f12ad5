"""Targeted modes and normalisation, as torchattacks has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from jiio_torchattacks import JIIO
from tests.adapters.torchattacks.helpers import (
    CLASSES,
    MEAN,
    STD,
    Normalize,
    assert_inside,
    batch,
    net,
    value,
)
from tests.helpers import independent_output

# Targeted modes ---------------------------------------------------------------------------------


def test_targeted_modes_reach_their_targets() -> None:
    model = net()
    images, labels = batch(8, saturated=False)
    wanted = (labels + 1) % CLASSES
    atk = JIIO(model, eps=4.0)
    atk.set_mode_targeted_by_function(lambda _, y: (y + 1) % CLASSES, quiet=True)
    by_function = atk(images, labels)
    atk.set_mode_targeted_by_label(quiet=True)
    by_label = atk(images, wanted)
    assert torch.equal(by_function, by_label)
    reached = independent_output(model, by_label).argmax(1) == wanted
    assert int(reached.sum()) >= 6
    assert bool((value(model, by_label, wanted) < value(model, images, wanted)).all())
    atk.set_mode_default()
    assert not torch.equal(atk(images, wanted), by_label)


@pytest.mark.parametrize("kth_min", [1, 2, CLASSES - 1])
def test_least_likely_is_the_hosts(kth_min: int) -> None:
    model, (images, labels) = net(), batch(8)
    atk = JIIO(model, eps=1.0, steps=3)
    atk.set_mode_targeted_least_likely(kth_min, quiet=True)
    expected = Attack.get_least_likely_label(atk, images, labels)
    assert torch.equal(atk.get_target_label(images, labels), expected)
    adversarial = atk(images, labels)
    atk.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(adversarial, atk(images, expected))


def test_random_targets() -> None:
    model, (images, labels) = net(), batch(40)

    def targets(seed: int) -> tuple[Tensor, Tensor]:
        atk = JIIO(model, seed=seed)
        atk.set_mode_targeted_random(quiet=True)
        return atk.get_target_label(images, labels), atk.get_target_label(images, labels)

    first, second = targets(0)
    assert bool((first != labels).all())
    assert set((first - labels).remainder(CLASSES).tolist()) == set(range(1, CLASSES))
    assert not torch.equal(first, second)  # the next batch is not given the same offsets
    assert torch.equal(first, targets(0)[0])
    assert not torch.equal(first, targets(1)[0])


def test_labels_may_be_left_out() -> None:
    model, (images, labels) = net(), batch()  # labels are the predictions
    atk = JIIO(model, eps=0.5, steps=3)
    assert torch.equal(atk(images), atk(images, labels))
    atk.set_mode_targeted_least_likely(quiet=True)
    assert torch.equal(atk(images), atk(images, labels))
    atk.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="needs the target labels"):
        atk(images)


# Normalisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("targeted", [False, True])
def test_normalisation_is_the_models(norm: str, targeted: bool) -> None:
    model = net()
    inside = nn.Sequential(Normalize(MEAN, STD, torch.float64), model).eval()
    images, _ = batch()
    with torch.no_grad():
        labels = inside(images).argmax(1)
    atk = JIIO(model, norm=norm, eps=0.2, steps=8)
    atk.set_normalization_used(MEAN, STD)
    reference = JIIO(inside, norm=norm, eps=0.2, steps=8)
    if targeted:
        atk.set_mode_targeted_least_likely(quiet=True)
        reference.set_mode_targeted_least_likely(quiet=True)
    expected = reference(images, labels)
    result = atk(atk.normalize(images), labels)
    torch.testing.assert_close(atk.solution.x, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(atk.inverse_normalize(result), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(atk.solution.value, reference.solution.value, rtol=0, atol=1e-6)
    # and it matters: the same call without it attacks another function
    other = JIIO(model, norm=norm, eps=0.2, steps=8)(images, labels)
    assert float((other - expected).abs().max()) > 1e-3


def test_normalisation_keeps_the_dtype() -> None:
    model, (images, labels) = net(torch.float32), batch(dtype=torch.float32)
    atk = JIIO(model, steps=2)
    atk.set_normalization_used(np.array(MEAN), np.array(STD))  # float64
    normalized = atk.normalize(images)
    assert normalized.dtype == torch.float32
    assert atk(normalized, labels).dtype == torch.float32


def test_normalised_images_may_be_outside_by_rounding_only() -> None:
    model, (images, labels) = net(torch.float32), batch(dtype=torch.float32)
    atk = JIIO(model, eps=0.1, steps=2)
    atk.set_normalization_used([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])  # CIFAR-10's
    normalized = atk.normalize(images)
    assert float(atk.inverse_normalize(normalized).min()) < 0
    atk(normalized, labels)
    assert_inside(atk.solution.x, images, "L2", 0.1 + 1e-6)
    with pytest.raises(ValueError, match="within the box"):
        atk(atk.normalize(images + 1e-3), labels)
