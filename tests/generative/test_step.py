"""One training step: the envelope gradient, and the size of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from jiio_plugins import Anderson, Joint
from jiio_plugins.data.classification import load_digits
from jiio_plugins.envelope import envelope_loss, joint_solution
from jiio_plugins.generative import TrainConfig, fit
from jiio_plugins.generative.step import SquaredError, TrainingStep, WithLatent, default_step_size
from jiio_plugins.models import MDEQDecoder, load_pretrained
from tests.generative.helpers import config

if TYPE_CHECKING:
    from pathlib import Path


def test_envelope_gradient_agrees_with_finite_differences() -> None:
    """d/dθ min_u ℓ by the envelope theorem and by solving the whole problem at θ ± h."""
    torch.manual_seed(0)
    solver = Anderson(max_iter=400, tol=1e-13)
    decoder = MDEQDecoder(
        latent_shape=2, image_shape=(1, 4, 4), channels=(4, 4), stride=1, solver=solver
    ).double()
    model = WithLatent(decoder)
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    objective = SquaredError(images, 0.5)
    method = Joint(max_iter=300, step_size=0.1, acceleration=0, relaxation=1.0)
    start = decoder.zeros(2)

    def fitted() -> Any:
        return joint_solution(model, start, objective, method=method)

    solution = fitted()
    assert float(solution.z_residual.max()) < 1e-10
    assert float(solution.costate_residual.max()) < 1e-10
    loss = envelope_loss(model, solution, objective, refine=200, reduction="sum")
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters)
    direction = [torch.randn_like(p) for p in parameters]
    slope = float(sum((g * d).sum() for g, d in zip(grads, direction, strict=True)))

    def value(h: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(h * d)
        found = fitted()
        with torch.no_grad():
            total = float(objective(model(found.x)).sum())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(h * d)
        return total

    h = 1e-5
    numeric = (value(h) - value(-h)) / (2 * h)
    assert abs(numeric) > 1e-3
    assert slope == pytest.approx(numeric, rel=1e-5)


def test_default_step_size_by_the_sizes_of_latent_and_image(tmp_path: Path) -> None:
    digits: Any = load_pretrained("digits-generator")
    assert default_step_size(digits) == pytest.approx(2.5 / 8)
    spatial = MDEQDecoder(latent_shape=(4, 7, 7), image_shape=(1, 28, 28))
    assert default_step_size(spatial) == pytest.approx(2.5 / 4)
    settings = config(tmp_path / "run", step_size=None)
    assert TrainConfig.from_json(settings.to_json()).step_size is None
    assert TrainingStep(digits, None, settings).method.step_size == pytest.approx(2.5 / 8)
    assert TrainingStep(digits, None, config(tmp_path / "run")).method.step_size == 0.3
    x, _ = load_digits("test")
    default, by_hand, too_small = (
        float(fit(digits, x[:24], method=Joint(max_iter=10, step_size=step)).psnr.mean())
        for step in (None, 0.3, 0.03)
    )
    assert default > by_hand - 0.1 > too_small
