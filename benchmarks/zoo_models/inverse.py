"""Reconstructions, and images drawn from latents: the attack makes their error large."""

from __future__ import annotations

import math
from functools import partial

import deepinv as dinv
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jiio_plugins import Anderson, Equilibrium, Implicit, L2Ball, Phantom, Picard
from jiio_plugins.data import load_digits

from .case import Case, Training


def attack_on_error(name: str, model: nn.Module, x: Tensor, target: Tensor, eps: float) -> Case:
    """The largest squared error of images, summed over their pixels, within an L2 ball.

    Args:
        name: of the kind.
        model: x -> images ``(rows, 1, 8, 8)``.
        x: where to start, ``(rows, ...)``.
        target: the clean images, ``(rows, 1, 8, 8)``.
        eps: radius in units of x.
    """

    def objective(images: Tensor) -> Tensor:
        return -(images - target).square().flatten(1).sum(1)

    return Case(name, model, x, objective, eps, L2Ball(eps))


class Reconstruction(nn.Module):
    """Measurements ``y = A x + noise`` of digits, and an equilibrium layer that inverts them.

    Args:
        layer: its cell has ``physics``, which is A.
        noise: standard deviation, in units of pixels that go from 0 to 1.
    """

    def __init__(self, layer: Equilibrium, noise: float = 0.03) -> None:
        super().__init__()
        self.equilibrium, self.noise = layer, noise

    def forward(self, y: Tensor) -> Tensor:
        return self.equilibrium(y)

    def measure(self, images: Tensor) -> Tensor:
        """y of clean images, with Gaussian noise."""
        y = self.equilibrium.cell.physics.A(images)
        return y + self.noise * torch.randn_like(y)


def reconstruction_error(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of the reconstruction."""
    return 64 * (model(model.measure(images)) - images).square().mean()


def attack_on_measurements(name: str, model: Reconstruction, samples: int, eps: float) -> Case:
    """The worst perturbation of the measurements of test images."""
    images = load_digits("test")[0][:samples]
    return attack_on_error(name, model, model.measure(images), images, eps)


class ProximalGradient(nn.Module):
    """``z -> D(z − γ Aᵀ(A z − y))`` with a learned denoiser D and step γ.

    Args:
        physics: A, linear.
        denoiser: D, images to images.
        gamma: γ to start with.

    Source: deepinv's ``PGD(unfold=True, DEQ=True)``.
    """

    def __init__(self, physics: nn.Module, denoiser: nn.Module, gamma: float = 1.0) -> None:
        super().__init__()
        self.physics, self.denoiser = physics, denoiser
        self.gamma = nn.Parameter(torch.tensor(gamma))

    def initial_state(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        gradient = self.physics.A_adjoint(self.physics.A(z) - y)
        return self.denoiser(z - self.gamma * gradient)


def unfolded(samples: int, training: Training) -> Case:
    """Inpainting by proximal gradient steps with a DnCNN, half of the pixels lost.

    Both directions are plain iterations in training, 20 forward and 50 backward, as deepinv's are.
    """
    mask = (torch.rand(1, 8, 8) < 0.5).float()
    physics = dinv.physics.Inpainting((1, 8, 8), mask=mask)
    denoiser = dinv.models.DnCNN(1, 1, depth=4, nf=24, pretrained=None)
    cell = ProximalGradient(physics, denoiser)
    solver, adjoint = Picard(max_iter=20, tol=1e-5), Picard(max_iter=50, tol=1e-5)
    layer = Equilibrium(cell, solver=solver, adjoint=Implicit(solver=adjoint))
    model = Reconstruction(layer)
    training.fit("unfolded-pgd", model, reconstruction_error, steps=200, lr=1e-3)
    layer.solver, layer.adjoint = Anderson(max_iter=200, tol=1e-4), Implicit()
    return attack_on_measurements("unfolded-pgd", model, samples, eps=0.5)


class GradientDescent(nn.Module):
    """``z -> z − η (Aᵀ(A z − y) + R(z))``, ``R(z) = z − D(z)``, with a learned D and step η.

    Args:
        physics: A, linear.
        denoiser: D, images to images.
        eta: η to start with.

    Source: Gilton, Ongie and Willett, "Deep Equilibrium Architectures for Inverse Problems in
    Imaging" (IEEE Transactions on Computational Imaging, 2021).
    """

    def __init__(self, physics: nn.Module, denoiser: nn.Module, eta: float = 0.5) -> None:
        super().__init__()
        self.physics, self.denoiser = physics, denoiser
        self.eta = nn.Parameter(torch.tensor(eta))

    def initial_state(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        gradient = self.physics.A_adjoint(self.physics.A(z) - y)
        return z - self.eta * (gradient + z - self.denoiser(z))


class CompressedSensing(nn.Module):
    """``A x`` with a Gaussian matrix, scaled to spectral norm 1.

    Args:
        measurements: numbers that are kept of the 64.
    """

    def __init__(self, measurements: int) -> None:
        super().__init__()
        matrix = torch.randn(measurements, 64)
        self.register_buffer("matrix", matrix / torch.linalg.matrix_norm(matrix, 2))

    def A(self, images: Tensor) -> Tensor:  # noqa: N802 (deepinv's name)
        return images.flatten(1) @ self.matrix.T

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: N802
        return (y @ self.matrix).reshape(-1, 1, 8, 8)


@torch.no_grad()
def project(layers: nn.Module, iterations: int = 10) -> None:
    """Scale down every convolution whose spectral norm on 8×8 images is above 1."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            z = torch.randn(1, layer.in_channels, 8, 8)
            for _ in range(iterations):
                image = F.conv2d(z / z.norm(), layer.weight, padding=1)
                z = F.conv_transpose2d(image, layer.weight, padding=1)
            layer.weight /= image.norm().clamp(min=1.0)


def gradient_descent(samples: int, training: Training) -> Case:
    """Compressed sensing by gradient steps with a CNN, half as many measurements as pixels.

    As by the authors, D has layers of spectral norm 1 and learns to denoise first. Then both
    directions are Anderson to 1e-2 in training.
    """

    def denoising_error(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        noisy = images + 0.2 * torch.randn_like(images)
        return 64 * (model(noisy) - images).square().mean()

    denoiser = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 1, 3, padding=1),
    )
    bound = partial(project, denoiser)
    name = "gradient-descent"
    training.fit(f"{name}-denoiser", denoiser, denoising_error, steps=400, after_step=bound)
    cell = GradientDescent(CompressedSensing(32), denoiser)
    model = Reconstruction(Equilibrium(cell, solver=Anderson(max_iter=50, tol=1e-2)))
    training.fit(name, model, reconstruction_error, steps=100, lr=1e-3, after_step=bound)
    model.equilibrium.solver = Anderson(max_iter=200, tol=1e-4)
    return attack_on_measurements(name, model, samples, eps=0.5)


class SineCell(nn.Module):
    """``z -> sin(W z + u)`` at every coordinate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        bound = math.sqrt(1.5 / width)
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.sin(self.linear(z) + u)


class INR(nn.Module):
    """An implicit neural representation: a latent ``(rows, latents)`` -> an image, pixel by pixel.

    What goes into the cell is made of the pixel's coordinates and shifted by the latent.

    Args:
        latents: entries of a latent.
        width: entries of the state at a coordinate.

    Source: Huang, Bai and Kolter, "(Implicit)²: Implicit Layers for Implicit Representations"
    (NeurIPS 2021).
    """

    def __init__(self, latents: int = 16, width: int = 32) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, 8)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
        waves = torch.cat([grid * math.pi * k / 2 for k in (1, 2, 4)], dim=1)
        self.register_buffer("waves", torch.cat([waves.sin(), waves.cos()], dim=1))
        self.coordinates = nn.Linear(12, width)
        self.modulation = nn.Linear(latents, width)
        self.gain = nn.Linear(latents, width)
        self.equilibrium = Equilibrium(
            SineCell(width), solver=Anderson(max_iter=30, tol=1e-3), adjoint=Phantom(steps=1)
        )
        self.head = nn.Linear(width, 1)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, latents))

    def forward(self, latent: Tensor) -> Tensor:
        gain, shift = self.gain(latent)[:, None], self.modulation(latent)[:, None]
        z = self.equilibrium((1 + gain) * self.coordinates(self.waves) + shift)
        return self.head(z).reshape(-1, 1, 8, 8)


def representation(samples: int, training: Training) -> Case:
    """Latents whose images are as far as can be from those that they stand for.

    The latents come from a linear encoder that is trained with the rest. Training differentiates
    through one evaluation at the fixed point.
    """
    model = INR()

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return 64 * (model(model.encoder(images)) - images).square().mean()

    training.fit("inr", model, loss, steps=400, lr=3e-3)
    model.equilibrium.solver = Anderson(max_iter=100, tol=1e-4)
    model.equilibrium.adjoint = Implicit()
    images = load_digits("test")[0][:samples]
    with torch.no_grad():
        latents = model.encoder(images)
    return attack_on_error("inr", model, latents, images, eps=0.5)
