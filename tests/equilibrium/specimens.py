"""Equilibrium layers in the forms that circulate, written from the mathematics.

Each solves z = f(z, x) by a solver it was given, and differentiates the fixed point by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.helpers import TanhCell, linear

if TYPE_CHECKING:
    from collections.abc import Callable


def iterate(f: Callable[[Tensor], Tensor], z: Tensor, *, most: int = 200) -> tuple[Tensor, int]:
    """Plain iteration, and how long it took."""
    for took in range(1, most + 1):
        before, z = z, f(z)
        if (z - before).norm() <= 1e-8 * z.norm():
            return z, took
    return z, most


class Hooked(nn.Module):
    """One more evaluation of f, and a hook that solves for the adjoint."""

    def __init__(self, f: nn.Module, solver: Any, **settings: Any) -> None:
        super().__init__()
        self.f, self.solver, self.settings = f, solver, settings

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, self.took = self.solver(lambda z: self.f(z, x), torch.zeros_like(x), **self.settings)
        z = self.f(z, x)
        at = z.clone().detach().requires_grad_()
        fz = self.f(at, x)

        def adjoint(g: Tensor) -> Tensor:
            def step(y: Tensor) -> Tensor:
                return torch.autograd.grad(fz, at, y, retain_graph=True)[0] + g

            return self.solver(step, g, **self.settings)[0]

        z.register_hook(adjoint)
        return z


class FixedPoint(torch.autograd.Function):
    """The solve and the adjoint's, as one function of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Any, solver: Any) -> Tensor:
        with torch.no_grad():
            z = solver(lambda z: f(z, x), torch.zeros_like(x))[0]
        ctx.save_for_backward(x, z)
        ctx.f, ctx.solver = f, solver
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, z = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            fz = ctx.f(z, x)
        mu, _ = ctx.solver(lambda y: torch.autograd.grad(fz, z, y, retain_graph=True)[0] + g, g)
        return torch.autograd.grad(fz, x, mu)[0], None, None


class ByFunction(nn.Module):
    def __init__(self, f: nn.Module, solver: Any) -> None:
        super().__init__()
        self.f, self.solver = f, solver

    def forward(self, x: Tensor) -> Tensor:
        return FixedPoint.apply(x, self.f, self.solver)


class Scales(nn.Module):
    """Two scales as one vector for the solver, of three things that it returns."""

    def __init__(self, f: nn.Module, solver: Any) -> None:
        super().__init__()
        self.f = f
        self.f_solver = self.b_solver = lambda g, z, name: {"result": solver(g, z)[0], "name": name}

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        parts = [x[:, :2], x[:, 2:]]
        start = torch.cat([torch.zeros_like(p) for p in parts], dim=1)[:, :, None]

        def step(z: Tensor) -> Tensor:
            return self.f(z.squeeze(2), torch.cat(parts, dim=1))[:, :, None]

        with torch.no_grad():
            z = self.f_solver(step, start, name="forward")["result"]
        if self.training:
            z = step(z.requires_grad_())
            at = z.detach().requires_grad_()
            fz = step(at)

            def adjoint(g: Tensor) -> Tensor:
                def step_back(y: Tensor) -> Tensor:
                    return torch.autograd.grad(fz, at, y, retain_graph=True)[0] + g

                return self.b_solver(step_back, torch.zeros_like(g), name="backward")["result"]

            z.register_hook(adjoint)
        flat = z.squeeze(2)
        return [2 * flat[:, :2], flat[:, 2:]], x.new_zeros(1, 1), x.new_zeros(len(x), 1)


class Named(nn.Module):
    """A state with names, an injection by keyword, and the solver as a method."""

    def __init__(self, cell: nn.Module, kind: type = dict) -> None:
        super().__init__()
        self.cell, self.kind = cell, kind

    def solver(self, f: Any, start: Any) -> Any:
        state = start
        for _ in range(150):
            state = f(state)
        return state

    def forward(self, *, x: Tensor) -> Any:
        def join(state: Any) -> Tensor:
            parts = state.values() if self.kind is dict else state
            return torch.cat([*parts], dim=1)

        def split(z: Tensor) -> Any:
            parts = [z[:, :2], z[:, 2:]]
            return {"low": parts[0], "high": parts[1]} if self.kind is dict else self.kind(parts)

        def step(state: Any, u: Tensor | None = None) -> Any:
            return split(self.cell(join(state), x if u is None else u))

        with torch.no_grad():
            state = self.solver(step, split(torch.zeros_like(x)))
        return step(state)


class Model(nn.Module):
    """Encoder, a layer, and a head on all that it returns."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        cell = TanhCell(6, 0.7, seed=2)
        self.encoder, self.head = linear(5, 6, seed=1), linear(6, 3, seed=3)
        build: dict[str, Callable[[], nn.Module]] = {
            "hook": lambda: Hooked(cell, iterate),
            "function": lambda: ByFunction(cell, iterate),
            "scales": lambda: Scales(cell, iterate),
            "dict": lambda: Named(cell, dict),
            "list": lambda: Named(cell, list),
            "tuple": lambda: Named(cell, tuple),
        }
        self.named = layer in ("dict", "list", "tuple")
        self.deq = build[layer]()

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        z = self.deq(x=u) if self.named else self.deq(u)
        if isinstance(self.deq, Scales):
            z = z[0]
        if isinstance(z, dict):
            z = list(z.values())
        return self.head(torch.cat(list(z), dim=1) if isinstance(z, (list, tuple)) else z)


def objective(logits: Tensor) -> Tensor:
    return -cross_entropy(logits, torch.arange(len(logits)) % 3, reduction="none")
