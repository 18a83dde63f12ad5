"""Implicit gradients of a reconstruction against finite differences, and what they cost."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import deepinv as dinv
import pytest
import torch
from torch import Tensor, nn

from jiio_deepinv import JIIOReconstructor
from jiio_plugins import Anderson
from tests.adapters.deepinv.toys import SHAPE, Encoder, Generator, Spread
from tests.helpers import rand

if TYPE_CHECKING:
    from collections.abc import Callable


class Problem:
    """A blurred and noisy image, its physics, and a reconstructor that solves tightly."""

    def __init__(self, likelihood: str = "Gaussian", **kwargs: object) -> None:
        self.filter = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
        noise = dinv.physics.GaussianNoise(0.1)
        if likelihood == "Poisson":
            noise = dinv.physics.PoissonNoise(0.05)
        self.physics = dinv.physics.Blur(filter=self.filter, padding="circular", noise_model=noise)
        self.model = JIIOReconstructor(Generator(SHAPE), iters=400, tol=1e-11, **kwargs)
        with torch.no_grad():
            clean = self.physics.A(Generator(SHAPE)(rand(2, 3, seed=7)))
        self.y = (clean + 0.1 * rand(*clean.shape, seed=8)).clamp(min=0.0)
        self.target = rand(2, *SHAPE, seed=9)

    def loss(self) -> Tensor:
        return (self.model(self.y, self.physics) * self.target).sum()


def central(function: Callable[[], Tensor], tensor: Tensor, index: tuple[int, ...]) -> float:
    """``d function / d tensor[index]`` by central differences of fourth order.

    The solutions are as tight as with a gradient.
    """
    h, kept, values = 3e-4, tensor[index].item(), []
    for k in (-2, -1, 1, 2, 0):
        with torch.no_grad():
            tensor[index] = kept + k * h
        values.append(function().item())
    low2, low1, high1, high2, _ = values
    return (8 * (high1 - low1) - (high2 - low2)) / (12 * h)


@pytest.mark.parametrize(
    ("likelihood", "extra"),
    [
        ("Gaussian", {}),
        ("Poisson", {}),
        ("Gaussian", {"range_penalty": 100.0}),
        ("Poisson", {"prior": dinv.optim.Tikhonov()}),
        ("Gaussian", {"encoder": Encoder()}),
        ("Gaussian", {"encoder": Spread()}),
        ("Poisson", {"encoder": Spread(), "range_penalty": 100.0}),
    ],
)
def test_against_finite_differences(likelihood: str, extra: dict[str, object]) -> None:
    problem = Problem(likelihood, **extra)
    generator = problem.model.generator
    problem.y.requires_grad_()
    blur = problem.physics.filter.clone().requires_grad_()
    problem.physics.filter = blur
    problem.loss().backward()
    residuals = problem.model.solution.stats.implicit
    assert residuals.joint.max() <= 1e-9
    assert residuals.adjoint.max() <= 1e-9
    problem.model.init = problem.model.latents
    encoder = problem.model.encoder
    for tensor, index in [
        *([] if encoder is None else [(encoder.linear.weight, (1, 6))]),
        *([(encoder.log_std, (1,))] if isinstance(encoder, Spread) else []),
        (generator.head.weight, (5, 2)),
        (generator.equilibrium.cell.weight, (1, 3)),
        (problem.y, (1, 0, 2, 1)),
        (blur, (0, 0, 1, 2)),
    ]:
        expected = central(problem.loss, tensor, index)
        assert tensor.grad[index].item() == pytest.approx(expected, rel=1e-4)


def test_a_sample_gives_no_gradient_to_another() -> None:
    problem = Problem()
    problem.y.requires_grad_()
    x = problem.model(problem.y, problem.physics)
    (gradient,) = torch.autograd.grad(x[0].sum(), problem.y)
    assert gradient[0].abs().max() > 1e-3
    assert not gradient[1].any()


def test_nothing_requires_grad_nothing_is_attached() -> None:
    problem = Problem()
    problem.model.requires_grad_(False)
    assert not problem.loss().requires_grad
    with torch.no_grad():
        assert not Problem().loss().requires_grad


def test_a_loose_solution_warns() -> None:
    problem = Problem(latent_penalty=0.0)
    problem.model.method = type(problem.model.method)(max_iter=1, step_size=1e-6)
    with pytest.warns(UserWarning, match="relative residual of"):
        problem.model(problem.y * 100, problem.physics)
    assert problem.model.solution.stats.implicit.joint.max() > 1e-3


class Probe(nn.Module):
    """Passes its input on, and notes how many of the tensors it made are alive at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        out = x + 0
        self.alive.add(out)
        self.most = max(self.most, len(self.alive))
        return out


def test_memory_does_not_depend_on_the_iterations() -> None:
    most = []
    for iters in (5, 80):
        problem, probe = Problem(), Probe()
        problem.model.method = type(problem.model.method)(
            max_iter=iters, tol=0.0, acceleration=10, step_size=1.0
        )
        problem.model.generator.embed = nn.Sequential(problem.model.generator.embed, probe)
        gc.collect()
        problem.loss().backward()
        most.append(probe.most)
        assert len(probe.alive) <= 1
    assert most[1] <= most[0]


def test_float32_is_close_to_float64() -> None:
    """As users train it: no warning, and the gradient of a tight solution to a percent."""
    problem = Problem()
    problem.loss().backward()
    exact = [p.grad.clone() for p in problem.model.generator.parameters()]
    generator = Generator(SHAPE, dtype=torch.float32, solver=Anderson(max_iter=100, tol=1e-6))
    model = JIIOReconstructor(generator.float(), iters=100)
    physics = dinv.physics.Blur(
        filter=problem.filter.float(),
        padding="circular",
        noise_model=dinv.physics.GaussianNoise(0.1),
    )
    (model(problem.y.float(), physics) * problem.target.float()).sum().backward()
    for p, wanted in zip(generator.parameters(), exact, strict=True):
        assert (p.grad - wanted).norm() < 0.01 * wanted.norm()
    assert model.solution.stats.implicit.joint.max() < 1e-3
    assert model.solution.stats.implicit.adjoint.max() < 1e-3
