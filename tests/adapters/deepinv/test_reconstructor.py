"""``JIIOReconstructor`` against what deepinv and its users expect of a reconstructor."""

from __future__ import annotations

import copy
from typing import Any

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Blur, Denoising, GaussianNoise, Inpainting, Physics, PoissonNoise
from deepinv.utils import TensorList
from torch import Tensor, nn

from jiio_deepinv import GaussianEncoder, JIIOReconstructor, likelihood_of
from jiio_plugins import Equilibrium, Joint, Nested, Status
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import MDEQRefiner, load_pretrained
from tests.adapters.deepinv.toys import Encoder, Generator, Spread, reconstructor
from tests.helpers import Elementwise, rand

SHAPE = (1, 4, 4)


def measured(physics: Physics | None = None, batch: int = 2) -> tuple[Tensor, Tensor, Physics]:
    """True images in the generator's range, their measurements and the physics."""
    physics = physics or Denoising(GaussianNoise(0.1, rng=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        x = Generator(SHAPE)(rand(batch, 3, seed=7))
        return x, physics(x), physics


# The contract -----------------------------------------------------------------------------------


def test_it_is_a_reconstructor() -> None:
    model = reconstructor()
    assert isinstance(model, dinv.models.Reconstructor)
    assert set(model.state_dict()) == {f"generator.{k}" for k in model.generator.state_dict()}
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_it_finds_the_minimum() -> None:
    x, y, physics = measured()
    model = reconstructor(iters=300, tol=1e-9)
    with torch.no_grad():
        found = model(y, physics)
    assert found.shape == x.shape
    assert model.solution is not None
    assert model.solution.status.tolist() == [Status.CONVERGED] * 2
    u = model.latents.clone().requires_grad_()
    image = model.generator(u)
    torch.testing.assert_close(found, image)
    value = (image - y).square().flatten(1).sum(1) / (2 * 0.1**2) + u.square().sum(1) / 2
    torch.testing.assert_close(model.solution.value, value.detach())
    (gradient,) = torch.autograd.grad(value.sum(), u)
    assert gradient.abs().max() < 1e-4 * value.max()


def test_latents_stay_near_the_encoders_guess() -> None:
    _, y, physics = measured()
    encoder = Encoder()
    with torch.no_grad():
        m = encoder(y, physics)
        near, far = (
            reconstructor(encoder=encoder, latent_penalty=w, iters=200, tol=1e-9)
            for w in (1e6, 1.0)
        )
        torch.testing.assert_close(near(y, physics), near.generator(m), rtol=1e-3, atol=1e-3)
        image = far(y, physics)
        u = far.latents
        value = (image - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        torch.testing.assert_close(far.solution.value, value + (u - m).square().sum(1) / 2)
        start = (far.generator(m) - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        assert (far.solution.value < start).all()
    assert "encoder.linear.weight" in far.state_dict()


def test_latents_move_as_far_as_the_encoder_is_unsure() -> None:
    _, y, physics = measured()
    encoder, model = Spread(), reconstructor(encoder=Spread(), iters=300, tol=1e-9)
    with torch.no_grad():
        m, s = encoder(y, physics)
        image = model(y, physics)
        u = model.latents
        torch.testing.assert_close(model.generator(u), image)
        value = (image - y).square().flatten(1).sum(1) / (2 * 0.1**2)
        away = (u - m) / s
        torch.testing.assert_close(model.solution.x, away)
        torch.testing.assert_close(model.solution.value, value + away.square().sum(1) / 2)
        elsewhere = model(y, physics, init=m + 1)
        torch.testing.assert_close(elsewhere, image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(y, physics, init=u), image, rtol=1e-5, atol=1e-5)
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


class Bare(nn.Module):
    """A generator without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shape = (1, 4, 4)
        self.equilibrium = Equilibrium(Elementwise(lambda z, u: 0.3 * z + 0.7 * u))

    def forward(self, u: Tensor) -> Tensor:
        return self.equilibrium(u)


def test_a_generator_without_parameters_and_a_weight_that_is_learned() -> None:
    _, y, physics = measured(Denoising(GaussianNoise(0.05)))
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    model = reconstructor(generator=Bare(), latent_penalty=weight)
    found = model(y, physics)
    torch.testing.assert_close(found, y / (1 + 2 * 0.05**2), rtol=0, atol=1e-4)
    found.sum().backward()
    assert weight.grad < 0
    assert not model.solution.value.requires_grad
    copy.deepcopy(model)


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


def test_it_beats_the_measurements() -> None:
    generator = load_pretrained("digits-generator")
    images, _ = load_digits("test")
    physics = Denoising(GaussianNoise(0.4, rng=torch.Generator().manual_seed(0)))
    y, psnr = physics(images[:8]), dinv.metric.PSNR()
    with torch.no_grad():
        found = JIIOReconstructor(generator)(y, physics)
    assert (psnr(found, images[:8]) > psnr(y, images[:8]) + 4).all()


@pytest.mark.parametrize("encoder", [None, Encoder(), Spread()])
def test_a_sample_does_not_depend_on_its_neighbours(encoder: nn.Module | None) -> None:
    physics = Denoising(GaussianNoise(torch.tensor([0.1, 0.2, 0.4])))
    _, y, _ = measured(physics, batch=3)
    model = reconstructor(iters=30, encoder=encoder)
    with torch.no_grad():
        together = model(y, physics)
        iterations = model.solution.stats.iterations
        for i, sigma in enumerate((0.1, 0.2, 0.4)):
            alone = model(y[i : i + 1], Denoising(GaussianNoise(sigma)))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-7, atol=1e-7)
            assert model.solution.stats.iterations[0] == iterations[i]


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
def test_one_step_size_for_all_noise_levels(sigma: float) -> None:
    physics = Denoising(GaussianNoise(sigma, rng=torch.Generator().manual_seed(1)))
    _, y, _ = measured(physics)
    model = reconstructor(iters=60)
    with torch.no_grad():
        model(y, physics)
        short = model.solution.value
        long = reconstructor(iters=600, tol=1e-9)
        long(y, physics)
    assert (short - long.solution.value <= 0.01 * long.solution.value).all()


def test_stacked_measurements() -> None:
    blur = Blur(filter=torch.ones(1, 1, 3, 3).double() / 9, padding="circular")
    blur.noise_model = PoissonNoise(0.1)
    physics = Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.1)).stack(blur)
    x, y, _ = measured(physics)
    assert isinstance(y, TensorList)
    model = reconstructor(iters=300, tol=1e-9)
    with torch.no_grad():
        assert model(y, physics).shape == x.shape
    assert (model.solution.status == Status.CONVERGED).all()
    u = model.latents.clone().requires_grad_()
    value = likelihood_of(physics)(model.generator(u), y, physics) + u.square().sum(1) / 2
    torch.testing.assert_close(model.solution.value, value.detach())
    (gradient,) = torch.autograd.grad(value.sum(), u)
    assert gradient.abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")  # deepinv makes one
def test_complex_images() -> None:
    shape = (1, 6, 6)
    generator = Generator(shape, dtype=torch.complex64)
    physics = dinv.physics.RandomPhaseRetrieval(m=100, img_size=shape)
    with torch.no_grad():
        y = physics(generator(rand(2, 3, seed=7)))
        model = reconstructor(generator=generator, iters=100)
        found, metrics = model(y, physics, compute_metrics=True)
    assert found.shape == (2, *shape)
    assert found.is_complex()
    assert all(costs[-1] < 0.2 * costs[0] for costs in metrics["cost"])


def test_spatial_latents_and_a_latent_shape_of_your_own() -> None:
    spatial = Generator(SHAPE, latent_shape=(2, 2, 2))
    _, y, physics = measured()
    with torch.no_grad():
        model = reconstructor(generator=spatial)
        model(y, physics)
        assert model.latents.shape == (2, 2, 2, 2)
        wrapped = nn.Sequential(spatial)
        other = reconstructor(generator=wrapped, latent_shape=(2, 2, 2))
        torch.testing.assert_close(other(y, physics), model(y, physics))
    with pytest.raises(ValueError, match=r"latent_shape=64, or \(c, h, w\)"):
        JIIOReconstructor(wrapped)


@pytest.mark.parametrize("name", ["TV", "L2"])
def test_a_prior_on_the_image(name: str) -> None:
    _, y, physics = measured()
    prior = dinv.optim.TVPrior() if name == "TV" else dinv.optim.Tikhonov()
    plain, regular = reconstructor(), reconstructor(prior=prior, prior_weight=50.0)
    with torch.no_grad():
        before, after = prior(plain(y, physics)), prior(regular(y, physics))
    assert (after < before).all()


def test_the_image_may_leave_the_generators_range() -> None:
    x, _, physics = measured()
    y = physics(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).double())
    with torch.no_grad():
        near = reconstructor(iters=200)
        far = reconstructor(iters=200, range_penalty=10.0)
        inside, outside = near(y, physics), far(y, physics)
        assert (far.solution.value < near.solution.value).all()
        assert far.latents.shape == (2, 3)
        # at the optimum the added image is the proximal step of the data term at G(u)
        made = far.generator(far.latents)
        torch.testing.assert_close(outside, (y / 0.01 + 10 * made) / 110, rtol=1e-3, atol=1e-3)
        # an infinite penalty is the generator's range
        stiff = reconstructor(iters=200, range_penalty=1e6)(y, physics)
    torch.testing.assert_close(stiff, inside, rtol=0.05, atol=0.02)


def test_the_start() -> None:
    _, y, physics = measured()
    with torch.no_grad():
        model = reconstructor(iters=100, tol=1e-6)
        first = model(y, physics)
        cold, latents = model.solution.stats.iterations, model.latents
        again = model(y, physics, init=latents)
        assert (model.solution.stats.iterations < cold).all()
        torch.testing.assert_close(again, first, rtol=1e-3, atol=1e-3)
        by_call = model(y, physics, init=lambda y, physics: latents)
        torch.testing.assert_close(by_call, again, rtol=0, atol=0)
        always = reconstructor(iters=100, tol=1e-6, init=lambda y, physics: latents)
        torch.testing.assert_close(always(y, physics), again, rtol=0, atol=0)


def test_the_nested_loop_in_its_place() -> None:
    _, y, physics = measured()
    with torch.no_grad():
        joint = reconstructor(iters=200)
        nested = reconstructor(method=Nested(max_iter=150, step_size=1.0))
        torch.testing.assert_close(nested(y, physics), joint(y, physics), rtol=0.02, atol=0.01)
    assert (nested.solution.stats.f_evals > joint.solution.stats.f_evals).all()


@pytest.mark.parametrize("mode", ["no_grad", "inference", "enabled"])
def test_every_grad_mode_gives_the_same_image(mode: str) -> None:
    _, y, physics = measured()
    model = reconstructor(iters=200, tol=1e-9).eval()
    with torch.no_grad():
        expected = model(y, physics)
    if mode == "inference":
        with torch.inference_mode():
            physics = Denoising(GaussianNoise(0.1))
            everything = Inpainting(SHAPE, mask=torch.ones(1, *SHAPE))
            everything.noise_model = GaussianNoise(0.1)
            found = model(y.clone(), physics)
            inpainted = model(y.clone(), everything)
        torch.testing.assert_close(inpainted, expected, rtol=1e-6, atol=1e-6)
        assert not torch.is_inference_mode_enabled()
    else:
        with torch.set_grad_enabled(mode == "enabled"):
            found = model(y, physics)
        assert found.requires_grad is (mode == "enabled")
    torch.testing.assert_close(found.detach().clone(), expected, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_solver() -> None:
    physics = Denoising(GaussianNoise(0.1))
    generator = Generator(SHAPE).float()
    generator.dtype = torch.float32
    y = physics(torch.rand(2, *SHAPE))
    model = JIIOReconstructor(generator, iters=20)
    with torch.no_grad():
        expected = model(y, physics)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(y, physics)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_metrics() -> None:
    x, y, physics = measured()
    model = reconstructor(iters=15, tol=0.0)
    with torch.no_grad():
        found, metrics = model(y, physics, x_gt=x, compute_metrics=True)
    assert {name: [len(r) for r in rows] for name, rows in metrics.items()} == {
        "psnr": [16, 16],
        "cost": [15, 15],
        "residual": [15, 15],
    }
    assert metrics["psnr"][1][-1] == pytest.approx(float(dinv.metric.PSNR()(found, x)[1]), 1e-4)
    assert all(costs[-1] < costs[0] for costs in metrics["cost"])
    with torch.no_grad():
        _, metrics = model(y, physics, compute_metrics=True)
    assert metrics["psnr"] == [[], []]


# Bad input --------------------------------------------------------------------------------------


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
    mean = dinv.optim.DataFidelity(d=lambda u, y: (u - y).square().mean())
    bad(y, physics, "one value per sample", data_fidelity=mean)


def test_latents_that_do_not_fit() -> None:
    _, y, physics = measured()
    bad(y, physics, r"latents of shape \(2, 3\), got \(1, 3\)", init=torch.zeros(1, 3))
    bad(y, physics, "got NoneType", init=lambda y, physics: None)
    wide = reconstructor(encoder=Encoder(latent=4))
    with pytest.raises(ValueError, match=r"encoder.* latents of shape \(2, 3\), got \(2, 4\)"):
        wide(y, physics)


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


class Tracked(Blur):
    """A blur whose forward fails after some calls."""

    calls = 0

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:  # noqa: N802
        self.calls += 1
        if self.calls > 20:
            raise ArithmeticError("the machine stopped")
        return super().A(x, **kwargs)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_callers_is_changed(fails: bool) -> None:
    kind = Tracked if fails else Blur
    physics = kind(filter=torch.ones(1, 1, 3, 3).double() / 9, padding="circular")
    physics.set_noise_model(GaussianNoise(0.1, rng=torch.Generator().manual_seed(0)))
    _, y, _ = measured(Denoising(GaussianNoise(0.1)))
    model = reconstructor(iters=100, latent_penalty=30.0)
    model.generator.head.weight.requires_grad_(False)
    model.train()
    model.generator.head.eval()
    y_before, states = y.clone(), copy.deepcopy([model.state_dict(), physics.state_dict()])
    flags = [(m.training) for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    rng, noise = torch.get_rng_state(), physics.noise_model.rng.get_state()
    if fails:
        with pytest.raises(ArithmeticError, match="the machine stopped"):
            model(y, physics)
        assert model.solution is None
    else:
        model(y, physics)
    torch.testing.assert_close(y, y_before, rtol=0, atol=0)
    for now, then in zip([model.state_dict(), physics.state_dict()], states, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert [(m.training) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(physics.noise_model.rng.get_state(), noise)


def test_joint_settings_are_passed_on() -> None:
    assert reconstructor(method=Joint(max_iter=7)).method.max_iter == 7
    method = reconstructor(iters=9, step_size=0.5, tol=1e-2).method
    assert (method.max_iter, method.step_size, method.tol) == (9, 0.5, 1e-2)
