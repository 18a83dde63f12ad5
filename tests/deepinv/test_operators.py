"""Every operator and every noise model of deepinv's own tests, at batch size 1 and 2."""

from __future__ import annotations

from typing import Any

import deepinv as dinv
import pytest
import torch
from torch import Tensor

from jiio_deepinv import JIIOReconstructor, likelihood_of
from tests.deepinv.toys import Generator
from tests.deepinv.upstream import upstream
from tests.helpers import rand

physics_tests = upstream("test_physics")

# What is left out, and why; docs/deepinv.md says the same.
EXCEPTIONS = {
    "haze": "its image is a TensorList: a map, a depth and a number",
    "lidar": "deepinv's own forward takes one image at a time",
    "spatial_unwrapping_round": "wrapping to the nearest multiple jumps within the image range",
    "scattering": "runs, but solves a linear system in each forward: about a minute",
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


def noise(name: str, batch: int) -> Any:
    """As in deepinv's test of the noise models, and those it leaves out."""
    kind = dinv.physics
    if name == "PerSample":
        return kind.GaussianNoise(torch.tensor([0.1, 0.4])[:batch])
    more = {
        "Laplace": kind.LaplaceNoise(0.1), "Rician": kind.RicianNoise(0.1),
        "PoissonCounts": kind.PoissonNoise(0.1, normalize=False), "Zero": kind.ZeroNoise(),
    }  # fmt: skip
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
