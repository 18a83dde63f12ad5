"""Small tasks, and their optima by a route that shares nothing with the learner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from jiio_learn2learn import JIIOLearner
from jiio_plugins import Equilibrium, Unrolled
from tests.helpers import TIGHT, PairCell, TanhCell, linear, rand

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = ("head.weight", "head.bias")


class Toy(nn.Module):
    """A context of three entries moves the injection; the state is a tensor or a pair."""

    def __init__(self, *, pair: bool = False, seed: int = 0) -> None:
        super().__init__()
        n = 7 if pair else 6
        self.context = nn.Parameter(0.3 * rand(1, 3, seed=seed + 1))
        self.film = linear(3, n, seed + 2)
        self.encoder = linear(4, n, seed + 3)
        cell = PairCell(seed + 4) if pair else TanhCell(n, 0.5, seed + 4)
        self.equilibrium = Equilibrium(cell, solver=TIGHT)
        self.head = linear(n, 3, seed + 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.equilibrium(self.encoder(x) + self.film(self.context))
        if isinstance(z, tuple):
            z = torch.cat([z[0], z[1].flatten(1)], dim=1)
        return self.head(z)


def task(seed: int, queries: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support of five and query: inputs and labels of three classes."""
    x, y = rand(5 + queries, 4, seed=seed), torch.arange(5 + queries) % 3
    return x[:5], y[:5], x[5:], y[5:]


def learner(**kwargs: Any) -> JIIOLearner:
    settings = {"lr": 1.0, "reg": 0.3, "iters": 200, **kwargs}
    return JIIOLearner(settings.pop("model", None) or Toy(), settings.pop("lr"), **settings)


def exact(model: Toy) -> Toy:
    """The same model, its layer unrolled so that it can be differentiated twice."""
    model.equilibrium.adjoint = Unrolled(steps=100)
    return model


class Reference:
    """The query loss at ``argmin_v`` of one task, by Newton's method with a dense Hessian.

    Args:
        model: with a layer that can be differentiated twice.
        data: as :func:`task` gives it.
        reg: of the proximal term.
        near: v close to the optimum at the model's own parameters.
        name: of the parameter that is v.
    """

    def __init__(
        self,
        model: Toy,
        data: tuple[Tensor, ...],
        reg: float,
        near: Tensor,
        name: str = "context",
    ) -> None:
        self.model, self.data, self.reg, self.near, self.name = model, data, reg, near, name
        self.hessian = torch.autograd.functional.hessian(self._objective({}), near)
        self.hessian = self.hessian.reshape(near.numel(), near.numel())
        assert bool((torch.linalg.eigvalsh(self.hessian) > 0).all())

    def _objective(self, values: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        x, y, _, _ = self.data
        v0 = values.get(self.name, self.model.get_parameter(self.name).detach())

        def objective(v: Tensor) -> Tensor:
            loss = cross_entropy(functional_call(self.model, {**values, self.name: v}, (x,)), y)
            return loss + 0.5 * self.reg * (v - v0).square().sum()

        return objective

    def __call__(self, values: dict[str, Tensor]) -> float:
        """At parameters close to the model's own."""
        objective, v = self._objective(values), self.near
        for _ in range(8):  # the Hessian is that of a close point: each step gains 3 or 4 digits
            g = torch.autograd.functional.jacobian(objective, v).flatten()
            v = v - torch.linalg.solve(self.hessian, g).reshape(v.shape)
            if float(g.norm()) < 1e-12:
                break
        assert float(g.norm()) < 1e-11
        _, _, x, y = self.data
        with torch.no_grad():
            return float(
                cross_entropy(functional_call(self.model, {**values, self.name: v}, (x,)), y)
            )
