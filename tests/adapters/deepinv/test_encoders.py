"""Encoders: how far latents move from a guess, and what a guess may be."""

from __future__ import annotations

from typing import Any

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising, GaussianNoise, Inpainting, Physics
from torch import Tensor, nn

from jiio_deepinv import GaussianEncoder
from jiio_plugins.models import MDEQRefiner
from tests.adapters.deepinv.toys import Encoder, Spread, measured, reconstructor
from tests.helpers import rand


def test_latents_stay_near_the_encoders_guess() -> None:
    _, y, physics = measured()
    encoder = Encoder()
    with torch.no_grad():
        m = encoder(y, physics)
        near, far = (
            reconstructor(encoder=encoder, latent_penalty=weight, iters=200, tol=1e-9)
            for weight in (1e6, 1.0)
        )
        torch.testing.assert_close(near(y, physics), near.generator(m), rtol=1e-3, atol=1e-3)
        image = far(y, physics)
        w = far.latents
        value = (image - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        torch.testing.assert_close(far.solution.value, value + (w - m).square().sum(1) / 2)
        start = (far.generator(m) - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        assert (far.solution.value < start).all()
    assert "encoder.linear.weight" in far.state_dict()


def test_latents_move_as_far_as_the_encoder_is_unsure() -> None:
    _, y, physics = measured()
    encoder, model = Spread(), reconstructor(encoder=Spread(), iters=300, tol=1e-9)
    with torch.no_grad():
        m, s = encoder(y, physics)
        image = model(y, physics)
        w = model.latents
        torch.testing.assert_close(model.generator(w), image)
        value = (image - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        xi = (w - m) / s
        torch.testing.assert_close(model.solution.x, xi)
        torch.testing.assert_close(model.solution.value, value + xi.square().sum(1) / 2)
        elsewhere = model(y, physics, init=m + 1)
        torch.testing.assert_close(elsewhere, image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(y, physics, init=w), image, rtol=1e-5, atol=1e-5)
        model.encoder.log_std.sub_(12)
        torch.testing.assert_close(model(y, physics), model.generator(m), rtol=1e-4, atol=1e-4)


class Adjoint(nn.Module):
    """The image ``Aᵀy / 2`` as a guess."""

    def forward(self, y: Tensor, physics: Physics) -> Tensor:
        image: Tensor = physics.A_adjoint(y) / 2
        return image


def test_the_first_steps_are_not_too_long_for_a_sensing_matrix() -> None:
    """It lengthens its own row space tenfold, and random directions hardly at all."""
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    physics = dinv.physics.CompressedSensing(
        m=16, img_size=(1, 8, 8), dtype=torch.float64, noise_model=GaussianNoise(0.05)
    )
    model = reconstructor(
        generator=MDEQRefiner((1, 8, 8)).double(), encoder=Adjoint(), latent_penalty=100.0, iters=8
    )
    with torch.no_grad():
        _, metrics = model(physics(x), physics, compute_metrics=True)
    cost = torch.tensor(metrics["cost"])
    assert (cost[:, 1] < 0.7 * cost[:, 0]).all()
    assert (cost[:, 1:] <= cost[:, :-1] * 1.001).all()


@pytest.mark.parametrize("mode", ["adjoint", "pinv"])
def test_gaussian_encoder(mode: str) -> None:
    x, y, physics = measured(dinv.physics.Inpainting((1, 4, 4), mask=0.5))
    network = nn.Conv2d(2, 1, 3, padding=1).double()
    encoder = GaussianEncoder(Adjoint(), network, mode=mode, largest=2.0)
    mean, std = encoder(y, physics)
    assert mean.shape == std.shape == x.shape
    assert (std > 0).all()
    assert (std < 2).all()
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    for largest, first in ((2.0, 0.05), (0.25, 0.05), (0.04, 0.02)):
        new = GaussianEncoder(Adjoint(), network, mode=mode, largest=largest)(y, physics)[1]
        torch.testing.assert_close(new, torch.full_like(x, first), rtol=0.1, atol=0)
    model = reconstructor(generator=MDEQRefiner((1, 4, 4), stride=1).double(), encoder=encoder)
    model(y, physics).square().sum().backward()
    assert network.weight.grad.abs().max() > 0


def test_an_encoder_that_is_unsure_of_a_few_pixels() -> None:
    """The exact mode of a Gaussian model, in eight steps, with std from 0.01 to 0.5."""
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    std = torch.where(rand(4, 1, 28, 28, seed=1) > 2, 0.5, 0.01).double()
    mean = x + std * rand(4, 1, 28, 28, seed=2)
    y = x + 0.05 * rand(4, 1, 28, 28, seed=3)
    model = reconstructor(
        generator=MDEQRefiner((1, 28, 28)).double(), encoder=Says((mean, std)), iters=8
    )
    with torch.no_grad():
        found = model(y, Denoising(GaussianNoise(0.05)))
    mode = (mean * 0.05**2 + y * std**2) / (0.05**2 + std**2)
    torch.testing.assert_close(found, mode, rtol=0, atol=0.02)


@pytest.mark.parametrize("guessed", [False, True])
def test_a_first_image_that_is_zero(guessed: bool) -> None:
    """A step that is small against the image says nothing there; a new refiner draws it at zero."""
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    mean = torch.zeros_like(x)
    mean[1:] = 0.5 * guessed
    settings = {"encoder": Says((mean, torch.full_like(x, 0.5)))} if guessed else {}
    model = reconstructor(generator=MDEQRefiner((1, 8, 8)).double(), iters=10, **settings)
    with torch.no_grad():
        found = model(x, Denoising(GaussianNoise(0.05)))
    prior = 0.5**2 if guessed else 1.0
    mode = (mean * 0.05**2 + x * prior) / (0.05**2 + prior)
    torch.testing.assert_close(found, mode, rtol=0, atol=1e-4)


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "physics", "match"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            Inpainting((1, 4, 4), mask=0.5),
            r"does not fit y: A\(guess\) .*\(2, 3, 4, 4\)",
        ),
        (torch.zeros(2, 1, 4, 4), Physics(), "needs a physics with an adjoint, Physics has none"),
    ],
)
def test_a_guess_that_no_gaussian_encoder_takes(guess: Tensor, physics: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GaussianEncoder(Says(guess), nn.Identity())(torch.zeros(2, 1, 4, 4), physics)


class Says(nn.Module):
    """An encoder that returns what it was made with."""

    def __init__(self, guess: Any) -> None:
        super().__init__()
        self.guess = guess

    def forward(self, y: Tensor, physics: Physics) -> Any:
        return self.guess


@pytest.mark.parametrize(
    ("guess", "match"),
    [
        ((torch.zeros(2, 3), torch.ones(2, 4)), r"std must be.* of shape \(2, 3\), got \(2, 4\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "std must be real, positive and finite: end it"),
        ((torch.zeros(2, 3), torch.full((2, 3), torch.nan)), "positive and finite"),
        ((torch.zeros(2, 3),), r"the latents' mean, or \(mean, std\), got 1 things"),
        ((None, torch.ones(2, 3)), "mean must be.* got NoneType"),
        (torch.tensor([[0.0] * 3, [torch.nan] * 3]), r"NaN or Inf \(first in sample 1\)"),
        ((torch.full((2, 3), torch.inf), torch.ones(2, 3)), "mean holds NaN or Inf"),
        (torch.zeros(2, 3, dtype=torch.complex64), "mean must be real, as latents are"),
    ],
)
def test_an_encoders_answer_that_does_not_fit(guess: Any, match: str) -> None:
    _, y, physics = measured()
    with pytest.raises(ValueError, match=match):
        reconstructor(encoder=Says(guess))(y, physics)


@pytest.mark.parametrize(
    ("settings", "match"), [({"mode": "A"}, '"adjoint" or "pinv"'), ({"largest": 0.0}, "largest")]
)
def test_bad_settings_of_an_encoder(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GaussianEncoder(nn.Identity(), nn.Identity(), **settings)
