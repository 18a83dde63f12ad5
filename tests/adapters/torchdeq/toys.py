"""A small network around a layer of TorchDEQ's, and the same around one of ours."""

from __future__ import annotations

from typing import Any

import torch
import torchdeq
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_plugins import Anderson, Equilibrium
from tests.helpers import TanhCell, linear

TIGHT = {
    f"{which}_{name}": value
    for which in "fb"
    for name, value in {
        "solver": "anderson",
        "max_iter": 200,
        "tol": 1e-12,
        "stop_mode": "rel",
    }.items()
}


class Net(nn.Module):
    """Three parts around a TorchDEQ layer, float64; ``pair`` splits its state into two tensors."""

    def __init__(self, *, pair: bool = False, **settings: Any) -> None:
        super().__init__()
        self.encoder, self.cell = linear(5, 6, seed=1), TanhCell(6, 0.7, seed=2)
        self.head = linear(6, 3, seed=3)
        self.deq = torchdeq.get_deq(**{**TIGHT, **settings})
        self.pair = pair
        self.calls = 0

    def f(self, z: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.cell(z, u)
        return out

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        if not self.pair:
            z_out, _ = self.deq(lambda z: self.f(z, u), torch.zeros_like(u))
            return self.head(z_out[-1])

        def func(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            out = self.f(torch.cat([a, b.flatten(1)], dim=1), u)
            return out[:, :2], out[:, 2:].reshape(-1, 2, 2)

        z_out, _ = self.deq(func, (torch.zeros_like(u[:, :2]), u.new_zeros(len(u), 2, 2)))
        a, b = z_out[-1]
        return self.head(torch.cat([a, b.flatten(1)], dim=1))


class Ours(nn.Module):
    """The same network with a layer of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = linear(5, 6, seed=1), TanhCell(6, 0.7, seed=2)
        self.head = linear(6, 3, seed=3)
        self.deq = Equilibrium(self.cell, solver=Anderson(max_iter=200, tol=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deq(self.encoder(x)))


def objective(logits: Tensor) -> Tensor:
    return -cross_entropy(logits, torch.arange(len(logits)) % 3, reduction="none")
