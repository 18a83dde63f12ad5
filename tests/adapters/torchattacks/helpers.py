"""A small classifier, its normalisation, and what must hold of an attack on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Equilibrium, attack_objective
from tests.helpers import TanhCell, independent_output, linear, rand

CLASSES = 4
SHAPE = (3, 4, 4)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ORDER = {"L2": 2.0, "Linf": math.inf}


class Net(nn.Module):
    """Three channels of 4×4 pixels, BatchNorm and dropout around an equilibrium; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.encoder = linear(48, 12, seed=1)
        self.dropout = nn.Dropout(0.5)
        cell = TanhCell(12, 0.6, seed=2)
        self.equilibrium = Equilibrium(cell, solver=Anderson(max_iter=100, tol=1e-10))
        self.head = linear(12, CLASSES, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        u = 3 * self.encoder(self.norm(x).flatten(1))
        return 4 * self.head(self.dropout(self.equilibrium(u)))


class Normalize(nn.Module):
    """The normalisation as a layer of the model."""

    def __init__(self, mean: list[float], std: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        # float32 first: torchattacks keeps both in float32
        self.mean = torch.tensor(mean).to(dtype).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std).to(dtype).reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = Net().to(dtype).eval()
    if dtype == torch.float32:
        model.equilibrium.solver = Anderson(tol=1e-5)
    return model


def batch(
    rows: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0, saturated: bool = True
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], many pixels at 0 and 1 exactly, and what the net predicts for them."""
    spread = 1.0 if saturated else 0.1
    images = (0.5 + spread * rand(rows, *SHAPE, seed=seed)).clamp(0, 1)
    with torch.no_grad():
        labels = net()(images).argmax(1)
    return images.to(dtype), labels


def size(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), ord=ORDER[norm], dim=1)


def assert_inside(adversarial: Tensor, images: Tensor, norm: str, eps: float) -> None:
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    n = images[0].numel()
    rounding = 2**-23 * float(images.abs().max()) * n ** (1 / ORDER[norm])
    assert float(size(adversarial.double() - images.double(), norm).max()) <= (
        eps * (1 + 1e-6) + rounding
    )


def value(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy by an independent solve."""
    return -attack_objective("cross-entropy", labels)(independent_output(model, x, steps=300))
