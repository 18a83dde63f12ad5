"""Networks, methods, constraints and norms that many tests run over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Box,
    Equilibrium,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    Solution,
    Status,
)
from tests.helpers import TIGHT, LinearNet, Net, PairNet, Series, TanhCell, linear, rand

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN_NETWORKS: dict[str, Any] = {"tensor": Net, "tuple": PairNet, "series": Series}
NETWORKS: dict[str, Any] = {
    **PLAIN_NETWORKS,
    "skip": lambda **kwargs: Net(skip=True, **kwargs),
}
METHODS = {
    "joint": Joint(),
    "paper": Joint(state_steps=1, adjoint_warmup=0, relaxation=1.0),
    "nested": Nested(solver=Anderson(tol=1e-4)),
    "warm": Nested(solver=Anderson(tol=1e-2), warm_start=True),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

CONSTRAINTS = {
    "free": None,
    "box": Box(-0.8, 0.8),
    "l2": L2Ball(0.5),
    "linf in a box": Intersection(LinfBall(0.2), Box(-0.9, 0.9)),
    "l1": L1Ball(1.0),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
# every method with every constraint on one network, and a few on each of the others
COMBINATIONS = [
    *(("tensor", method, constraint) for method in METHODS for constraint in CONSTRAINTS),
    *((name, "joint", constraint) for name in list(NETWORKS)[1:] for constraint in ("free", "l2")),
    *((name, "nested", "box") for name in list(NETWORKS)[1:]),
    ("series", "joint", "box"),
]
every_combination = pytest.mark.parametrize(("name", "method", "constraint"), COMBINATIONS)
SOME = [0, 7, 20, 63]  # rows of a batch of 64

NORMS = {1.0: 8.0, 2.0: 1.5, math.inf: 0.2}  # norm: an ε that fools every digit
LOSSES = ("cross-entropy", "dlr", "margin")
every_norm = pytest.mark.parametrize("norm", NORMS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def squared(y: Tensor) -> Tensor:
    return y.square().sum(1)


def statuses(solution: Solution) -> set[Status]:
    return {Status(int(s)) for s in solution.status}


def mixed_batch(n: int = 64) -> Tensor:
    """Easy and hard rows; a few are far out, where tanh saturates."""
    x = (0.3 * rand(n, 5, seed=1)).clamp(-0.9, 0.9)
    x[::7] *= 0.01
    return x


# Problems with known answers --------------------------------------------------------------------


class Ridge(nn.Module):
    """Linear equilibrium whose output holds ``√ρ x`` as well: strongly convex in x."""

    def __init__(self, rate: float = 0.8, rho: float = 2.0) -> None:
        super().__init__()
        self.net, self.rho = LinearNet(inputs=6, n=10, outputs=4, rate=rate, seed=2), rho
        with torch.no_grad():
            self.net.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), self.rho**0.5 * x], dim=1)

    def objective(self, seed: int) -> Callable[[Tensor], Tensor]:
        """``½‖M x − t‖² + ½ρ‖x‖²``."""
        target = rand(4, seed=seed)
        return lambda y: 0.5 * ((y[:, :4] - target).square().sum(1) + y[:, 4:].square().sum(1))

    def hessian(self) -> Tensor:
        m = self.net.matrix()
        return m.T @ m + self.rho * torch.eye(6, dtype=m.dtype)

    def curvature(self) -> float:
        """The largest eigenvalue of the Hessian."""
        return float(torch.linalg.eigvalsh(self.hessian())[-1])

    def answer(self, seed: int) -> Tensor:
        return torch.linalg.solve(self.hessian(), self.net.matrix().T @ rand(4, seed=seed))

    def boxed_answer(self, seed: int, low: float, high: float) -> Tensor:
        """By projected gradient on the closed form."""
        h, g = self.hessian(), self.net.matrix().T @ rand(4, seed=seed)
        x = torch.zeros(6, dtype=h.dtype)
        for _ in range(5000):
            x = (x - (h @ x - g) / self.curvature()).clamp(low, high)
        return x


class Wells(nn.Module):
    """``Σ y⁴ − y²`` of an equilibrium's output: a maximum at 0, saddles, and minima."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = linear(3, 5, seed=1)
        nn.init.zeros_(self.encoder.bias)
        self.equilibrium = Equilibrium(TanhCell(5, 0.5, seed=2), solver=TIGHT)
        self.head = linear(5, 3, seed=3)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(self.equilibrium(self.encoder(x)))


def wells(y: Tensor) -> Tensor:
    return (y**4 - y**2).sum(1)
