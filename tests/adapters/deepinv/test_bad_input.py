"""Measurements, physics and settings that do not fit, and the errors that say so."""

from __future__ import annotations

from typing import Any

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising, GaussianNoise, Inpainting, Physics
from torch import Tensor, nn

from jiio_deepinv import JIIOReconstructor
from jiio_plugins import Joint, Status
from tests.adapters.deepinv.toys import SHAPE, Encoder, Generator, measured, reconstructor


def bad(y: Any, physics: Any, match: str, error: type = ValueError, **kwargs: Any) -> None:
    model = reconstructor(**kwargs)
    with torch.no_grad(), pytest.raises(error, match=match):
        model(y, physics)
    assert model.solution is None


def test_measurements_that_do_not_fit() -> None:
    _, y, physics = measured()
    wrong = y[..., :3]
    bad(wrong, physics, r"physics\.A of .* has shape \(2, 1, 4, 4\), y has \(2, 1, 4, 3\)")
    bad(y.index_fill(0, torch.tensor(1), torch.nan), physics, "NaN or Inf .first in sample 1.")
    bad(y.numpy(), physics, "must be a tensor", TypeError)
    bad(y.long(), physics, "floating point", TypeError)
    bad(y[0, 0, 0], physics, "batch first")
    bad(y[:0], physics, "not empty")


def test_a_generator_of_another_shape() -> None:
    _, y, _ = measured()
    physics = Inpainting((1, 5, 5), mask=0.5)
    bad(y, physics, r"images, shape \(batch, 1, 4, 4\).* img_size is \(1, 5, 5\)")
    physics = Denoising()
    bad(torch.rand(2, 1, 5, 5), physics, r"\(2, 1, 4, 4\), y has \(2, 1, 5, 5\)")


class Vast(Generator):
    """Its squares leave the range of float64."""

    def forward(self, w: Tensor) -> Tensor:
        return 1e200 * super().forward(w)


def test_a_generator_that_runs_away() -> None:
    dark = Inpainting(SHAPE, mask=torch.zeros(SHAPE).double(), noise_model=GaussianNoise(0.1))
    bad(torch.zeros(2, *SHAPE).double(), dark, "is not finite or too large", generator=Vast())


def test_physics_without_a_derivative() -> None:
    _, y, _ = measured()
    bad(y, Physics(A=lambda x: x.detach()), "no differentiable forward")
    bad(y, Physics(A=lambda x: torch.from_numpy(x.numpy())), "no differentiable forward")
    bad(y, Physics(A=lambda x: (x > 0.5).double()), "no differentiable forward")
    for steps in (torch.round, torch.floor, torch.sign):
        bad(y, Physics(A=lambda x, steps=steps: steps(4 * x)), "gradient is zero at all images")


def test_a_start_at_the_minimum_is_no_error() -> None:
    physics = Denoising(GaussianNoise(0.1))
    model = reconstructor()
    with torch.no_grad():
        y = model.generator(torch.zeros(2, 3).double())  # the gradient of the data term is zero
        torch.testing.assert_close(model(y, physics), y)


class Saturated(Generator):
    """Draws ones, whatever its latents are."""

    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w).clamp(max=0) + 1


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", ["fitted", "saturated", "saturated and fitted", "empty mask"])
def test_where_nothing_can_be_better_the_start_is_the_result(case: str, gradients: bool) -> None:
    generator = Saturated(SHAPE) if "saturated" in case else Generator(SHAPE)
    physics: Physics = Denoising(GaussianNoise(0.1))
    y = torch.full((2, *SHAPE), 0.3, dtype=torch.float64)
    if case == "empty mask":
        physics, y = Inpainting(SHAPE, mask=torch.zeros(SHAPE).double()), 0 * y
    start = generator(torch.zeros(2, 3, dtype=torch.float64)).detach()
    if "fitted" in case:
        y = start
    model = JIIOReconstructor(generator)
    with torch.set_grad_enabled(gradients):
        image = model(y, physics)
    assert torch.equal(image, start)
    assert model.solution is not None
    assert (model.solution.status == Status.NO_IMPROVEMENT).all()
    if gradients:
        image.square().sum().backward()
        assert all(
            bool(torch.isfinite(p.grad).all()) for p in generator.parameters() if p.grad is not None
        )


def test_physics_that_is_none() -> None:
    _, y, _ = measured()
    bad(y, None, r"deepinv\.physics\.Physics, got NoneType", TypeError)
    bad(y, lambda x: x, r"got function; a function becomes one by", TypeError)


def test_a_data_fidelity_that_does_not_take_stacked_measurements() -> None:
    noise = GaussianNoise(0.1)
    _, y, physics = measured(Denoising(noise).stack(Denoising(noise)))
    match = r"L2, does not take .*\[\(2, 1, 4, 4\), \(2, 1, 4, 4\)\].* StackedPhysicsDataFidelity"
    bad(y, physics, match, data_fidelity=dinv.optim.L2())


def test_true_images_that_do_not_fit() -> None:
    x, y, physics = measured()
    for wrong, got in ((x[:1], r"\(1, 1, 4, 4\)"), (x.numpy(), "ndarray")):
        with pytest.raises(ValueError, match=f"an image per sample of y, 2 of them, got {got}"):
            reconstructor()(y, physics, x_gt=wrong, compute_metrics=True)


def test_settings_given_to_a_call() -> None:
    _, y, physics = measured()
    with pytest.raises(TypeError, match=r"iters, prior: settings of JIIOReconstructor"):
        reconstructor()(y, physics, iters=500, prior=None)
    reconstructor(iters=2)(y, physics, update_parameters=True)  # deepinv's own


def test_what_was_made_in_inference_mode() -> None:
    _, y, physics = measured()
    with torch.inference_mode():
        weight = torch.ones(SHAPE).double()
        model = reconstructor()
        with pytest.raises(ValueError, match="generator was made in inference mode"):
            model(y, physics)
    bad(y, Physics(A=lambda x: weight * x), "tensors made in inference mode")


def test_a_data_fidelity_that_mixes_samples() -> None:
    _, y, physics = measured()
    mean = dinv.optim.DataFidelity(d=lambda y_hat, y: (y_hat - y).square().mean())
    bad(y, physics, "one value per sample", data_fidelity=mean)


def test_latents_that_do_not_fit() -> None:
    _, y, physics = measured()
    bad(y, physics, r"latents of shape \(2, 3\), got \(1, 3\)", init=torch.zeros(1, 3))
    bad(y, physics, "got NoneType", init=lambda y, physics: None)
    wide = reconstructor(encoder=Encoder(latent=4))
    with pytest.raises(ValueError, match=r"encoder.* latents of shape \(2, 3\), got \(2, 4\)"):
        wide(y, physics)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"generator": nn.Linear(3, 16)}, ValueError, "Equilibrium"),
        ({"generator": torch.sin}, TypeError, "nn.Module"),
        ({"encoder": lambda y, physics: y}, TypeError, "encoder must be an nn.Module"),
        ({"implicit": 1e-3}, TypeError, "implicit must be Anderson"),
        ({"data_fidelity": nn.MSELoss()}, TypeError, "DataFidelity"),
        ({"prior": nn.MSELoss()}, TypeError, "Prior"),
        ({"prior": dinv.optim.PnP(nn.Identity())}, ValueError, "no value to minimise"),
        ({"latent_penalty": -1.0}, ValueError, "latent_penalty must be"),
        ({"latent_penalty": None}, ValueError, "latent_penalty must be .* got None"),
        ({"prior_weight": float("nan")}, ValueError, "prior_weight must be"),
        ({"prior_weight": 2.0}, ValueError, "prior_weight is of a prior: give prior= too, got 2"),
        ({"method": Joint(), "iters": 5}, ValueError, "method= is in place of iters, step_size"),
        ({"range_penalty": -1.0}, ValueError, "range_penalty must be"),
        ({"latent_shape": (3, 0)}, ValueError, "positive integers"),
        ({"iters": 0}, ValueError, "max_iter"),
        ({"step_size": -0.1}, ValueError, "step_size"),
        ({"method": "joint"}, TypeError, "Joint"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        reconstructor(**settings)
