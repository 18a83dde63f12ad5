"""Every operator and every noise model of deepinv's own tests, at batch size 1 and 2."""

from __future__ import annotations

import copy
from typing import Any

import deepinv as dinv
import pytest
import torch
from torch import Tensor

from jiio_deepinv import JIIOReconstructor, likelihood_of
from tests.adapters.deepinv.toys import Generator
from tests.adapters.deepinv.upstream import upstream
from tests.helpers import rand

physics_tests = upstream("test_physics")

# What is left out, and why; docs/how-to/deepinv.md says the same.
EXCEPTIONS = {
    "haze": "its image is a TensorList: a map, a depth and a number",
    "lidar": "deepinv's own forward takes one image at a time; below by itself",
    "spatial_unwrapping_round": "wrapping to the nearest multiple jumps within the image range",
    "scattering": "slow: it solves a linear system in each forward; below by itself",
}
OPERATORS = [
    *physics_tests.OPERATORS,
    *physics_tests.PHASE_RETRIEVAL_OPERATORS,
    *(name for name in physics_tests.NONLINEAR_OPERATORS if name not in EXCEPTIONS),
]
NOISES = [*physics_tests.NOISES, "Laplace", "Rician", "PoissonCounts", "PerSample", "Zero"]

pytestmark = [  # deepinv's and its tests' own
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
    pytest.mark.filterwarnings("ignore:Arguments .* are ignored"),
    pytest.mark.filterwarnings("ignore:At least one input physics is a DecomposablePhysics"),
    pytest.mark.filterwarnings("ignore:Image height and width must be equal for cake cutting"),
    pytest.mark.filterwarnings("ignore:The default value of `normalize`"),
]


def operator(name: str) -> tuple[Any, tuple[int, ...], torch.dtype]:
    """The physics, the shape of its images and their dtype."""
    if name in physics_tests.PHASE_RETRIEVAL_OPERATORS:
        return *physics_tests.find_phase_retrieval_operator(name, "cpu"), torch.complex64
    if name in physics_tests.NONLINEAR_OPERATORS:
        physics, x = physics_tests.find_nonlinear_operator(name, "cpu")
        return physics, tuple(x.shape[1:]), x.dtype
    physics, shape, _, dtype = physics_tests.find_operator(name, "cpu")
    return physics, shape, dtype


def check(physics: Any, x: Tensor, model: JIIOReconstructor) -> None:
    """Finite images, and a data term that has fallen, for each sample."""
    with torch.no_grad():
        y = physics(x)
        found = model(y, physics)
        data = model.data_fidelity or likelihood_of(physics)
        start = model.generator(torch.zeros(len(x), 3).double())
        before, after = data(start, y, physics), data(found, y, physics)
    assert found.shape == x.shape
    assert bool(torch.isfinite(found).all())
    assert (after < before).all(), (before, after)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, batch: int) -> None:
    torch.manual_seed(0)
    physics, shape, dtype = operator(name)
    generator = Generator(shape, dtype=dtype)
    with torch.no_grad():
        x = generator(1.5 * rand(batch, 3, seed=3))
    check(physics, x, JIIOReconstructor(generator, iters=12))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # deepinv's, with NumPy 2
@pytest.mark.parametrize("name", ["lidar", "scattering"])
def test_operators_of_one_image(name: str) -> None:
    torch.manual_seed(0)
    physics, shape, dtype = operator(name)
    generator = Generator(shape, dtype=dtype)
    with torch.no_grad():
        x = generator(1.5 * rand(1, 3, seed=3))
    check(physics, x, JIIOReconstructor(generator, iters=4 if name == "scattering" else 12))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["inpainting", "deblur_circular"])
@pytest.mark.parametrize("wrapper", ["LinearPhysicsMultiScaler", "PhysicsCropper"])
def test_wrapped_operators(wrapper: str, name: str, batch: int) -> None:
    torch.manual_seed(0)
    physics, shape, _, _ = physics_tests.find_operator(name, "cpu", imsize=(3, 16, 32))
    if wrapper == "LinearPhysicsMultiScaler":
        physics = dinv.physics.LinearPhysicsMultiScaler(physics, shape, factors=[2, 4])
        physics.set_scale(2)
        shape = (3, 4, 8)
    else:
        physics, shape = dinv.physics.PhysicsCropper(physics, crop=(2, 4)), (3, 18, 36)
    generator = Generator(shape, dtype=torch.float32)
    with torch.no_grad():
        x = generator(1.5 * rand(batch, 3, seed=3))
    check(physics, x, JIIOReconstructor(generator, iters=12))


def noise(name: str, batch: int) -> Any:
    """As in deepinv's test of the noise models, and those it leaves out."""
    kind = dinv.physics
    if name == "PerSample":
        return kind.GaussianNoise(torch.tensor([0.1, 0.4])[:batch])
    more = {
        "Laplace": kind.LaplaceNoise(0.1),
        "Rician": kind.RicianNoise(0.1),
        "PoissonCounts": kind.PoissonNoise(0.1, normalize=False),
        "Zero": kind.ZeroNoise(),
    }
    return more[name] if name in more else physics_tests.choose_noise(name)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NOISES)
def test_noise_model(name: str, batch: int) -> None:
    torch.manual_seed(0)
    physics = dinv.physics.Denoising(noise(name, batch))
    generator = Generator((1, 8, 8), dtype=torch.float32)
    with torch.no_grad():
        x = generator(3 * rand(batch, 3, seed=3))
    check(physics, x, JIIOReconstructor(generator, iters=12))


LIKELIHOODS = {
    "Gaussian": lambda z, y: -torch.distributions.Normal(z, 0.1).log_prob(y),
    "Laplace": lambda z, y: -torch.distributions.Laplace(z, 0.1).log_prob(y),
    "Poisson": lambda z, y: -torch.distributions.Poisson(z / 0.1).log_prob((y / 0.1).round()),
    "PoissonCounts": lambda z, y: -torch.distributions.Poisson(z / 0.1).log_prob(y),
    "Gamma": lambda z, y: -torch.distributions.Gamma(1.0, 1.0 / z).log_prob(y),
    "LogPoisson": lambda z, y: (
        -torch.distributions.Poisson(1024 * (-0.2 * z).exp()).log_prob(
            (1024 * (-0.2 * y).exp()).round()
        )
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_likelihood_is_the_noise_models(name: str) -> None:
    """Up to a constant, minus the log-probability that torch.distributions gives."""
    torch.manual_seed(0)
    physics = dinv.physics.Denoising(noise(name, 2)).double()
    x = 0.2 + 0.7 * torch.rand(2, 1, 6, 6).double()
    y = physics(x)
    z = [x, x + 0.3, 0.9 * x]
    ours = [likelihood_of(physics)(t, y, physics) for t in z]
    exact = [LIKELIHOODS[name](t, y).flatten(1).sum(1) for t in z]
    tolerance = {"rtol": 0.2, "atol": 4.0} if name == "Laplace" else {"rtol": 1e-4, "atol": 1e-4}
    for k in (1, 2):
        torch.testing.assert_close(ours[k] - ours[0], exact[k] - exact[0], **tolerance)


NOISE_MODELS = {
    "Gaussian": dinv.physics.GaussianNoise(0.3),
    "complex Gaussian": dinv.physics.GaussianNoise(0.3),
    "Poisson": dinv.physics.PoissonNoise(0.02),
    "PoissonGaussian, gain 0.2": dinv.physics.PoissonGaussianNoise(0.2, 0.3),
    "PoissonGaussian, gain 0.1": dinv.physics.PoissonGaussianNoise(0.1, 0.1),
    "PoissonGaussian, gain 0.01": dinv.physics.PoissonGaussianNoise(0.01, 0.1),
    "PoissonGaussian, gain 1e-5": dinv.physics.PoissonGaussianNoise(1e-5, 0.1),
    "Gamma": dinv.physics.GammaNoise(5.0),
    "FisherTippett": dinv.physics.FisherTippettNoise(5.0),
    "LogPoisson": dinv.physics.LogPoissonNoise(N0=1024.0, mu=0.2),
    "Rician": dinv.physics.RicianNoise(0.2),
}


@pytest.mark.parametrize("name", NOISE_MODELS)
@pytest.mark.parametrize("z", [0.4, 1.0])
def test_the_likelihood_belongs_to_the_noise(name: str, z: float) -> None:
    """Fisher: the slope at the true z is zero in the mean, and its variance the mean curvature."""
    torch.manual_seed(0)
    model = NOISE_MODELS[name]
    physics = dinv.physics.Denoising(copy.deepcopy(model))
    dtype = torch.complex64 if name.startswith("complex") else torch.float32
    clean = torch.full((20_000, 1, 1, 1), z, dtype=dtype)
    y = physics(clean)
    leaf = clean.clone().requires_grad_()
    value = likelihood_of(physics)(leaf, y, physics)
    (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    slope = slope.real if slope.is_complex() else slope
    (change,) = torch.autograd.grad(slope.sum(), leaf)
    curvature = float((change.real if change.is_complex() else change).mean())
    slope = slope.detach()
    assert float(slope.mean()) ** 2 < 1e-3 * curvature
    assert float(slope.var()) == pytest.approx(curvature, rel=0.06)


def test_a_small_gain_makes_gaussian_noise_of_counts() -> None:
    """The shifted Poisson likelihood goes over into the Gaussian one."""
    z = torch.linspace(0, 1, 50).reshape(2, 1, 5, 5)
    y = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    gaussian = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    expected = likelihood_of(gaussian)(z, y, gaussian)
    for gain in (1e-4, 1e-9):
        physics = dinv.physics.Denoising(dinv.physics.PoissonGaussianNoise(gain, 0.1))
        found = likelihood_of(physics)(z, y, physics)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("unit", [1e-3, 0.1, 1.0])
def test_measurements_may_be_in_a_smaller_unit(unit: float, stacked: bool) -> None:
    """The same problem in another unit has the same solution, with less noise than counts too."""
    scaled = dinv.physics.LinearPhysics(
        A=lambda x, **_: unit * x,
        A_adjoint=lambda y, **_: unit * y,
        noise_model=dinv.physics.GaussianNoise(0.01 * unit),
    )
    plain = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.05))
    generator = Generator((1, 8, 8))
    x = generator(3 * rand(2, 3, seed=3)).detach()
    y = x + 0.1 * rand(*x.shape, seed=4)
    model = JIIOReconstructor(generator, iters=200, tol=1e-9)
    both = dinv.utils.TensorList
    with torch.no_grad():
        if stacked:
            expected = model(both([y, y]), plain.stack(plain))
            found = model(both([unit * y, y]), scaled.stack(plain))
        else:
            expected, found = model(y, plain), model(unit * y, scaled)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_deepinvs_poisson_likelihood_is_taken_apart() -> None:
    """Its value of a sample holds the logarithms of the whole batch."""
    physics = dinv.physics.Denoising(dinv.physics.PoissonNoise(0.1)).double()
    theirs = dinv.optim.PoissonLikelihood(gain=0.1)
    x = 0.5 + 0.4 * torch.rand(2, 1, 4, 4).double()
    y = physics(x)
    model = JIIOReconstructor(Generator((1, 4, 4)), data_fidelity=theirs)
    pairs = [(x[i : i + 1], y[i : i + 1]) for i in range(2)]
    ours = [model.data_fidelity(z, y, physics) for z in (x, 0.8 * x)]
    alone = [torch.cat([theirs(c * z, k, physics) for z, k in pairs]) for c in (1.0, 0.8)]
    torch.testing.assert_close(ours[1] - ours[0], alone[1] - alone[0], rtol=1e-6, atol=1e-6)
    mixed = theirs(0.8 * x, y, physics) - theirs(x, y, physics)
    assert ((mixed - (alone[1] - alone[0])).abs() > 1).all()  # else it is mended: drop per_sample


def test_likelihoods_are_finite_where_a_logarithm_is_not() -> None:
    z = torch.tensor([[-0.5, 0.0, 1e-4, 0.5]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.3, 0.0, 0.2, 0.4]], dtype=torch.float64)
    for name in ("Poisson", "PoissonGaussian", "Gamma", "Rician"):
        physics = dinv.physics.Denoising(noise(name, 1)).double()
        value = likelihood_of(physics)(z, y, physics)
        (slope,) = torch.autograd.grad(value.sum(), z)
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()


def test_an_unknown_noise_model_asks_for_the_likelihood() -> None:
    both = dinv.physics.PoissonNoise(0.1) * dinv.physics.GaussianNoise(0.1)
    with pytest.raises(TypeError, match=r"NoiseModel: give data_fidelity=\. Known are Zero"):
        likelihood_of(dinv.physics.Denoising(both))
