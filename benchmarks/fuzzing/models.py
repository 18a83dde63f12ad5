"""Random tiny deep equilibrium models, and their fixed points by Newton's method in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Broyden, Equilibrium, Picard, adapt

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

D, N, CLASSES = 4, 6, 3  # sizes of input and state, and the least number of outputs
KINDS = ("tanh", "linear", "rotation", "running away", "wild", "NaN", "series", "noisy")
FORMS = ("tensor", "tuple", "dict")
LAYERS = ("Equilibrium", "own solver", "TorchDEQ")
TAME = ("tanh", "linear", "rotation")
RATES = (0.3, 0.6, 0.9, 0.99, 0.999)


class Cell(nn.Module):
    """``σ(A z + u)``, on a state that is one tensor, two in a tuple, or two in a dict."""

    def __init__(self, kind: str, a: Tensor, form: str) -> None:
        super().__init__()
        self.kind, self.form, self.weight = kind, form, nn.Parameter(a)
        self.linear = kind in ("linear", "rotation", "running away")

    def core(self, z: Tensor, u: Tensor) -> Tensor:
        """On flat states ``(rows, n)``."""
        y = z @ self.weight.T + u
        if self.kind == "NaN":
            y = torch.where(u[:, :1] > 0.5, y * torch.nan, y)
        if self.kind == "noisy":
            y = y + 0.05 * torch.randn_like(y)
        return y if self.linear else torch.tanh(y)

    def initial_state(self, u: Tensor) -> Any:
        return split(torch.zeros_like(u), self.form)

    def forward(self, z: Any, u: Tensor) -> Any:
        return split(self.core(join(z), u), self.form)


def split(z: Tensor, form: str) -> Any:
    """A flat state in its form."""
    a, b = z[:, :2], z[:, 2:].reshape(-1, 2, 2)
    return {"tensor": z, "tuple": (a, b), "dict": {"a": a, "b": b}}[form]


def join(z: Any) -> Tensor:
    """The flat state ``(rows, n)`` of one in any form."""
    if isinstance(z, dict):
        z = tuple(z.values())
    return torch.cat([p.flatten(1) for p in z], dim=1) if isinstance(z, tuple) else z


class OwnSolver(nn.Module):
    """A layer as tutorials write it: plain steps without a graph, and one with it."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def solver(self, f: Callable[[Any], Any], state: Any) -> Any:
        for _ in range(100):
            state = f(state)
        return state

    def forward(self, u: Tensor) -> Any:
        with torch.no_grad():
            state = self.solver(lambda z: self.cell(z, u), self.cell.initial_state(u))
        return self.cell(state, u)


class TorchDEQ(nn.Module):
    """A layer of TorchDEQ's, beside its cell."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        import torchdeq

        self.cell = cell
        self.deq = torchdeq.get_deq(f_max_iter=60, f_tol=1e-6, b_max_iter=60, b_tol=1e-6)

    def forward(self, u: Tensor) -> Any:
        z0 = self.cell.initial_state(u)
        if isinstance(z0, tuple):
            return tuple(self.deq(lambda a, b: self.cell((a, b), u), z0)[0][-1])
        return self.deq(lambda z: self.cell(z, u), z0)[0][-1]


class Model(nn.Module):
    """Encoder, one equilibrium layer or two, head: outputs ``(rows, outputs)``.

    Args:
        kind: of ``KINDS``, what the cell is like.
        layer: of ``LAYERS``, whose it is. Those of others are adapted.
        form: of ``FORMS``, what the state is.
        outputs: number of them.
        rng: of the settings.
        generator: of the weights.
    """

    def __init__(
        self,
        kind: str,
        layer: str,
        form: str,
        outputs: int,
        rng: random.Random,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.kind, self.layer, self.form, self.rate = kind, layer, form, rng.choice(RATES)
        self.echo = False  # whether x comes behind the outputs
        self.encoder, self.head = nn.Linear(D, N), nn.Linear(N, outputs)
        self.context = nn.Parameter(torch.randn(1, N, generator=generator) / 4)
        with torch.no_grad():
            for p in (*self.encoder.parameters(), *self.head.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        solver = rng.choice((Anderson(), Broyden(), Picard(), Anderson(max_iter=200, tol=1e-6)))
        build: dict[str, Callable[[Cell], nn.Module]] = {
            "Equilibrium": lambda cell: Equilibrium(cell, solver=solver),
            "own solver": OwnSolver,
            "TorchDEQ": TorchDEQ,
        }
        cells = [
            Cell(kind, self._matrix(rng, generator), form)
            for _ in range(2 if kind == "series" else 1)
        ]
        self.layers = nn.ModuleList(map(build[layer], cells))
        if layer != "Equilibrium":
            adapt(self)

    def _matrix(self, rng: random.Random, generator: torch.Generator) -> Tensor:
        if self.kind in ("running away", "wild"):
            self.rate = rng.choice((1.1, 1.5, 3.0))
        if self.kind == "rotation":
            angles = [rng.uniform(0.1, 3.1) for _ in range(N // 2)]
            turns = [[[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]] for t in angles]
            return self.rate * torch.block_diag(*map(torch.tensor, turns))
        a = torch.randn(N, N, generator=generator)
        return a * (self.rate / torch.linalg.matrix_norm(a, ord=2))

    @property
    def amplification(self) -> float | None:
        """``‖z − z*‖ / ‖f(z) − z‖`` at most, or None where there may be several fixed points."""
        cell: Any = self.layers[0].cell
        if cell.linear:
            eye = torch.eye(N, dtype=torch.float64)
            return float(torch.linalg.inv(eye - cell.weight.detach().double()).norm(p=2))
        if self.rate >= 1 or self.kind in ("NaN", "noisy"):
            return None
        return (1 / (1 - self.rate)) ** len(self.layers)

    @property
    def tame(self) -> bool:
        """Whether it contracts so well that rounding is not amplified."""
        return self.kind in TAME and self.rate <= 0.9

    def run(self, x: Tensor, given: tuple[Tensor, ...], solve: Callable[..., Tensor]) -> Tensor:
        u = self.encoder(x.flatten(1)) + self.context + sum(given)
        for layer in self.layers:
            z = solve(layer, u)
            u = z + 0.1 * u
        out: Tensor = self.head(z)
        return torch.cat([out, x.flatten(1)], dim=1) if self.echo else out

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return self.run(x, given, lambda layer, u: join(layer(u)))

    def exact(self, x: Tensor, *given: Tensor) -> Tensor:
        """The same by Newton's method. Call it on a copy in float64."""
        return self.run(x, given, lambda layer, u: newton(layer.cell, u))


class Plain(nn.Linear):
    """A model without an equilibrium layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(D, CLASSES, dtype=dtype)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def newton(cell: Cell, u: Tensor) -> Tensor:
    """The fixed point in float64, after plain steps. Its graph has the first two derivatives."""
    eye = torch.eye(N, dtype=u.dtype)
    with torch.no_grad():
        z = torch.zeros_like(u)
        for _ in range(0 if cell.linear else 300):
            z = cell.core(z, u)
        for _ in range(8):
            z = _newton_step(cell, z, u, eye)
    if torch.is_grad_enabled():
        for _ in range(2):
            z = _newton_step(cell, z, u, eye)
    return z


def _newton_step(cell: Cell, z: Tensor, u: Tensor, eye: Tensor) -> Tensor:
    f = cell.core(z, u)
    slope = torch.ones_like(f) if cell.linear else 1 - f.square()
    jacobian = eye - slope[:, :, None] * cell.weight
    return z + torch.linalg.solve(jacobian, (f - z)[:, :, None])[:, :, 0]
