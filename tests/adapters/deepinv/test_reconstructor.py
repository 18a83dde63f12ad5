"""``JIIOReconstructor`` against what deepinv and its users expect of a reconstructor."""

from __future__ import annotations

import copy
from typing import Any

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Blur, Denoising, GaussianNoise, Inpainting, PoissonNoise
from deepinv.utils import TensorList
from torch import Tensor, nn

from jiio_deepinv import JIIOReconstructor, likelihood_of
from jiio_plugins import Equilibrium, Joint, Nested, Status
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import load_pretrained
from tests.adapters.deepinv.toys import SHAPE, Encoder, Generator, Spread, measured, reconstructor
from tests.helpers import Elementwise, rand


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
    w = model.latents.clone().requires_grad_()
    image = model.generator(w)
    torch.testing.assert_close(found, image)
    value = (image - y).square().flatten(1).sum(1) / (2 * 0.1**2) + w.square().sum(1) / 2
    torch.testing.assert_close(model.solution.value, value.detach())
    (gradient,) = torch.autograd.grad(value.sum(), w)
    assert gradient.abs().max() < 1e-4 * value.max()


class Bare(nn.Module):
    """A generator without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shape = (1, 4, 4)
        self.equilibrium = Equilibrium(Elementwise(lambda z, u: 0.3 * z + 0.7 * u))

    def forward(self, w: Tensor) -> Tensor:
        return self.equilibrium(w)


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
    w = model.latents.clone().requires_grad_()
    value = likelihood_of(physics)(model.generator(w), y, physics) + w.square().sum(1) / 2
    torch.testing.assert_close(model.solution.value, value.detach())
    (gradient,) = torch.autograd.grad(value.sum(), w)
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
        # at the optimum the added image is the proximal step of the data term at G(w)
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


@torch.no_grad()
def test_in_float64_an_image_is_the_same_alone_and_in_a_batch() -> None:
    """With latents that have not settled, along which rounding grows."""
    torch.manual_seed(0)
    generator = load_pretrained("digits-generator").double()
    physics = Inpainting((1, 8, 8), mask=0.5, noise_model=GaussianNoise(0.1)).double()
    y = physics(load_digits("test")[0][:2].double())
    model = JIIOReconstructor(generator, iters=8)
    whole = model(y, physics)
    alone = torch.cat([model(y[k : k + 1], physics) for k in range(2)])
    assert float((whole - alone).abs().max()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-2), (torch.float64, 1e-4)])
def test_the_value_owes_nothing_to_the_batch_where_pixels_do(
    dtype: torch.dtype, rtol: float
) -> None:
    """After so many iterations that rounding has grown along latents that y says little about."""
    torch.manual_seed(0)
    generator = load_pretrained("digits-generator").to(dtype)
    physics = Inpainting((1, 8, 8), mask=0.5, noise_model=GaussianNoise(0.1)).to(dtype)
    y = physics(load_digits("test")[0][:3].to(dtype))
    model = JIIOReconstructor(generator, iters=100)
    values = []
    for part in (y, *y.split(1)):
        model(part, physics)
        assert model.solution is not None
        values.append(model.solution.value)
    torch.testing.assert_close(torch.cat(values[1:]), values[0], rtol=rtol, atol=0)


def test_what_helps_where_the_gradient_has_not_settled() -> None:
    """The advice of the status, on a generator that is hard to solve: there is no ball."""
    generator = load_pretrained("digits-generator")
    with torch.no_grad():
        for p in generator.equilibrium.cell.parameters():
            p.mul_(1.8)
    torch.manual_seed(0)
    physics = Inpainting((1, 8, 8), mask=0.5, noise_model=GaussianNoise(0.05))
    y = physics(load_digits("test")[0][:40])

    def found(**settings: Any) -> tuple[int, Tensor]:
        method = Joint(**{"max_iter": 60, "step_size": 1.0, **settings})
        model = JIIOReconstructor(generator, method=method)
        with torch.no_grad():
            model(y, physics)
        assert model.solution is not None
        unsettled = model.solution.status == Status.GRADIENT_UNSETTLED
        return int(unsettled.sum()), model.solution.value

    some, value = found()
    assert some >= 4
    assert "raise max_iter" in Status.GRADIENT_UNSETTLED.message
    fewer, lower = found(max_iter=300)
    assert fewer < some / 2
    assert lower.mean() < value.mean()
    _, same = found(max_state_steps=12, max_adjoint_steps=12, anchors=8)
    assert torch.equal(same, value)
