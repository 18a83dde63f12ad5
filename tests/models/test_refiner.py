"""The generator whose latents are images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jiio_plugins import count_evaluations
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import MDEQRefiner


def test_a_new_refiner_is_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    model = MDEQRefiner((3, 16, 24), channels=(8, 12))
    w = torch.randn(2, 3, 16, 24)
    assert torch.equal(model(w), w)
    parts = model.injection(w)
    assert [tuple(p.shape) for p in parts] == [(2, 8, 8, 12), (2, 12, 4, 6)]
    nn.init.normal_(model.head[-1].weight)
    w.requires_grad_()
    model(w).square().sum().backward()
    for name, p in [*model.named_parameters(), ("latents", w)]:
        assert float(p.grad.abs().max()) > 0, name
    with pytest.raises(ValueError, match="divisible by 4, got 16×22"):
        MDEQRefiner((1, 16, 22), channels=(8, 8))


@pytest.mark.parametrize("channels", [(16,), (8, 8)])
@pytest.mark.parametrize("brightness", [0.2, 1.0])
def test_a_new_refiner_contracts(channels: tuple[int, ...], brightness: float) -> None:
    images = brightness * load_digits("test")[0][:16]
    for seed in range(3):
        torch.manual_seed(seed)
        model = MDEQRefiner((1, 8, 8), channels=channels)
        with torch.no_grad(), count_evaluations() as counter:
            model(images)
        assert counter.f_evals / len(images) < 30, seed
