"""The one table of fixed-point problems, and small networks with known answers.

``PROBLEMS`` is run by every solver. The networks are in float64 and take a seed, so that two calls
build the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Broyden, Equilibrium, Picard, Solver, Status

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
TIGHT = Anderson(max_iter=400, tol=1e-13, abs_tol=1e-14)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contraction(n: int, rate: float, *, symmetric: bool, seed: int) -> Tensor:
    """An ``(n, n)`` matrix of spectral norm ``rate``."""
    m = rand(n, n, seed=seed)
    if symmetric:
        m = m + m.T
    return m * (rate / torch.linalg.matrix_norm(m, ord=2))


def rotation(angles: list[float], radius: float = 1.0) -> Tensor:
    """Block-diagonal plane rotations, scaled to spectral radius ``radius``."""
    a = torch.tensor(angles, dtype=torch.float64)
    blocks = [
        torch.stack([torch.stack([t.cos(), -t.sin()]), torch.stack([t.sin(), t.cos()])]) for t in a
    ]
    return radius * torch.block_diag(*blocks)


class Affine(nn.Module):
    """``z -> A z + u``."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return z @ self.a.T + u


class Elementwise(nn.Module):
    """``z -> g(z, u)`` for a function that works on each row by itself."""

    def __init__(self, g: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.g = g

    def forward(self, z: Any, u: Tensor) -> Any:
        return self.g(z, u)


class TanhCell(nn.Module):
    """``tanh(W z + u)`` with ``‖W‖₂ = rate``."""

    def __init__(self, n: int, rate: float, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(contraction(n, rate, symmetric=False, seed=seed))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + u)


class _Count(torch.autograd.Function):
    """The identity, which notes each pass back through it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, seen: list[int]) -> Tensor:
        ctx.seen = seen
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(len(g))
        return g, None


class Cut(torch.autograd.Function):
    """The identity, whose backward pass sends no gradient on."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


class CountedCell(TanhCell):
    """``products`` holds the rows of each vector-Jacobian product that happened."""

    def __init__(self, n: int, rate: float, seed: int) -> None:
        super().__init__(n, rate, seed)
        self.products: list[int] = []

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return _Count.apply(super().forward(z, u), self.products)


class PairCell(nn.Module):
    """A state of two tensors, ``(rows, 3)`` and ``(rows, 2, 2)``, that act on each other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(contraction(7, 0.7, symmetric=False, seed=seed))

    def initial_state(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return u.new_zeros(len(u), 3), u.new_zeros(len(u), 2, 2)

    def forward(self, z: tuple[Tensor, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.tanh(torch.cat([z[0], z[1].flatten(1)], dim=1) @ self.weight.T + u)
        return flat[:, :3], flat[:, 3:].reshape(-1, 2, 2)


def plain_solve(cell: nn.Module, *u: Tensor, start: Any = None, steps: int = 1000) -> Any:
    """The fixed point by plain iteration, with a graph: a reference that shares no code."""
    if start is None:
        build = getattr(cell, "initial_state", None)
        start = torch.zeros_like(u[0]) if build is None else build(*u)
    z = start
    for _ in range(steps):
        z = cell(z, *u)
    return z


@dataclass(frozen=True)
class FixedPoint:
    """``z = cell(z, u)`` from ``z0``.

    Attributes:
        solution: z*, or None where there is none.
        condition: how many times larger than the residual the error may be.
        ends: by solver name, the status of each row where it is not CONVERGED.
        budget: evaluations each solver may take.
        tol: what the solvers are asked for.
    """

    name: str
    cell: nn.Module
    u: Tensor
    z0: Any
    solution: Any = None
    condition: float = 1.0
    ends: dict[str, list[Status]] = field(default_factory=dict)
    budget: int = 400
    tol: float = 1e-10

    def f(self, z: Any) -> Any:
        """The map on the whole batch."""
        return self.cell(z, self.u)

    def expected(self, solver: Solver) -> list[Status]:
        """The status of every row."""
        rows = [Status.CONVERGED] * len(self.u)
        return self.ends.get(type(solver).__name__, rows)


def _affine(name: str, a: Tensor, rows: int = 2, seed: int = 1, **kwargs: Any) -> FixedPoint:
    u = rand(rows, len(a), seed=seed)
    eye = torch.eye(len(a), dtype=a.dtype)
    kwargs.setdefault("condition", float(torch.linalg.inv(eye - a).norm(p=2)))
    solution = torch.linalg.solve(eye - a, u.T).T
    return FixedPoint(name, Affine(a), u, torch.zeros_like(u), solution, **kwargs)


def _nonlinear(name: str, cell: nn.Module, u: Tensor) -> FixedPoint:
    """A net whose solution is found by plain iteration."""
    cell = cell.requires_grad_(False)
    z = plain_solve(cell, u, steps=2000)
    z0 = tuple(torch.zeros_like(t) for t in z) if isinstance(z, tuple) else torch.zeros_like(z)
    return FixedPoint(name, cell, u, z0, z, condition=10.0)


def _at_zero() -> FixedPoint:
    a = contraction(6, 0.7, symmetric=True, seed=7)
    z0 = rand(2, 6, seed=8)
    u = torch.zeros_like(z0)
    return FixedPoint("solution at zero", Affine(a), u, z0, u, condition=1e14)


def _no_fixed_point() -> FixedPoint:
    u = torch.ones(2, 3, dtype=torch.float64)
    limit = [Status.MAX_ITER] * 2  # a safeguarded solver does not run away: it finds nothing
    ends = {"Picard": [Status.DIVERGED] * 2, "Anderson": limit, "Broyden": limit}
    cell = Elementwise(lambda z, u: z * z + z + u)  # z² = −1
    return FixedPoint("no fixed point", cell, u, 0.1 * u, ends=ends)


def _always_nan() -> FixedPoint:
    u = torch.ones(2, 3, dtype=torch.float64)
    ends = {name: [Status.NONFINITE] * 2 for name in ("Picard", "Anderson", "Broyden")}
    return FixedPoint("always NaN", Elementwise(lambda z, u: z * torch.nan), u, u, ends=ends)


def _nan_outside() -> FixedPoint:
    """``z = 3 √(1 − z)``: the first plain step leaves the domain."""
    u = torch.full((2, 1), 3.0, dtype=torch.float64)
    solution = torch.full_like(u, (117**0.5 - 9) / 2)
    ends = {"Picard": [Status.NONFINITE] * 2}
    cell = Elementwise(lambda z, u: u * torch.sqrt(1 - z))
    return FixedPoint("NaN outside a domain", cell, u, torch.zeros_like(u), solution, ends=ends)


def _one_stuck() -> FixedPoint:
    """Rows 0, 1, 3 contract; row 2 has no fixed point, ``z = z + 1``."""
    u = torch.tensor([[0.3], [-0.6], [1.0], [0.8]], dtype=torch.float64)
    stuck = u == 1

    def g(z: Tensor, u: Tensor) -> Tensor:
        return torch.where(u == 1, z + 1, u * z + 1)

    solution = torch.where(stuck, torch.nan, 1 / (1 - u))
    ok, limit = Status.CONVERGED, Status.MAX_ITER
    ends = {name: [ok, ok, limit, ok] for name in ("Picard", "Anderson", "Broyden")}
    return FixedPoint(
        "one row stuck", Elementwise(g), u, torch.zeros_like(u), solution, condition=5.0, ends=ends
    )


def problems() -> list[FixedPoint]:
    """The table, built anew."""
    max_iter = {"Picard": [Status.MAX_ITER] * 2}
    diverged = {"Picard": [Status.DIVERGED] * 2}
    table = []
    for rate in (0.1, 0.5, 0.9, 0.99, 0.999):
        # plain iteration needs log(tol) / log(rate) evaluations
        limits = {0.99: {"budget": 3_000}, 0.999: {"budget": 15_000, "tol": 1e-6}}.get(rate, {})
        even = torch.diag(torch.linspace(0, rate, 20, dtype=torch.float64))
        geometric = torch.diag(rate ** torch.arange(1, 21, dtype=torch.float64))
        table += [
            _affine(f"even spectrum up to {rate}", even, **limits),
            _affine(f"geometric decay {rate}", geometric, **limits),
        ]
    table += [
        _affine(
            "slow trio",
            torch.diag(torch.tensor([0.9, 0.99, 0.999]).double()),
            budget=15_000,
            tol=1e-6,
        ),
        _affine("symmetric 0.95", contraction(16, 0.95, symmetric=True, seed=11), budget=1_000),
        _affine("nonsymmetric 0.95", contraction(16, 0.95, symmetric=False, seed=12)),
        _affine("alternating", torch.diag(torch.linspace(-0.98, 0.5, 8).double()), budget=2_000),
        _affine("rotation", rotation([1.57, 1.05, 0.79]), ends=max_iter),
        _affine("growing rotation", rotation([2.0, 1.0], radius=1.2), ends=diverged),
        _affine("reflection", torch.diag(torch.tensor([-3.0, -2.0, 0.5]).double()), ends=diverged),
        _nonlinear("tanh net", TanhCell(12, 0.9, seed=3), rand(4, 12, seed=4)),
        _nonlinear("tuple state", PairCell(seed=5), rand(3, 7, seed=6)),
        _at_zero(),
        _no_fixed_point(),
        _always_nan(),
        _nan_outside(),
        _one_stuck(),
    ]
    return table


PROBLEMS = problems()
SOLVERS = (Picard, Anderson, Broyden)


# Small networks ---------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """A float64 linear map with weights of a fixed seed."""
    layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(rand(outputs, inputs, seed=seed) / inputs**0.5)
        layer.bias.copy_(0.1 * rand(outputs, seed=seed + 1000))
    return layer


class Net(nn.Module):
    """Encoder → equilibrium → head; with ``skip`` the head sees the encoder too."""

    def __init__(
        self,
        *,
        inputs: int = 5,
        n: int = 8,
        outputs: int = 3,
        rate: float = 0.7,
        skip: bool = False,
        seed: int = 0,
        solver: Solver | None = None,
        adjoint: Any = None,
    ) -> None:
        super().__init__()
        self.encoder = linear(inputs, n, seed + 1)
        cell = TanhCell(n, rate, seed + 2)
        self.equilibrium = Equilibrium(cell, solver=solver or TIGHT, adjoint=adjoint)
        self.head = linear(n, outputs, seed + 3)
        self.skip = linear(n, outputs, seed + 4) if skip else None

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x.flatten(1))
        y = self.head(self.equilibrium(u))
        return y if self.skip is None else y + self.skip(u)


class PairNet(nn.Module):
    """:class:`Net` with a state of two tensors."""

    def __init__(self, *, seed: int = 0, solver: Solver | None = None, adjoint: Any = None) -> None:
        super().__init__()
        self.encoder = linear(5, 7, seed + 1)
        self.equilibrium = Equilibrium(PairCell(seed + 2), solver=solver or TIGHT, adjoint=adjoint)
        self.head = linear(7, 3, seed + 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.equilibrium(self.encoder(x))
        return self.head(torch.cat([first, second.flatten(1)], dim=1))


class Series(nn.Module):
    """Two equilibrium layers of different size, one after the other."""

    def __init__(self, *, seed: int = 0, solver: Solver | None = None, adjoint: Any = None) -> None:
        super().__init__()
        solver = solver or TIGHT
        self.encoder = linear(5, 6, seed + 1)
        self.first = Equilibrium(TanhCell(6, 0.6, seed + 2), solver=solver, adjoint=adjoint)
        self.between = linear(6, 4, seed + 3)
        self.second = Equilibrium(TanhCell(4, 0.8, seed + 4), solver=solver, adjoint=adjoint)
        self.head = linear(4, 3, seed + 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(self.encoder(x))
        return self.head(self.second(self.between(z)))


class LinearNet(nn.Module):
    """``z = A z + B x``, ``y = C z``: everything about it has a closed form."""

    def __init__(
        self,
        *,
        inputs: int = 20,
        n: int = 12,
        outputs: int = 2,
        rate: float = 0.8,
        seed: int = 0,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.encoder = linear(inputs, n, seed + 1)
        with torch.no_grad():
            self.encoder.bias.zero_()
        a = contraction(n, rate, symmetric=False, seed=seed + 2)
        self.equilibrium = Equilibrium(Affine(a), solver=solver or TIGHT)
        self.head = linear(n, outputs, seed + 3)

    def matrix(self) -> Tensor:
        """``C (I − A)⁻¹ B``."""
        a = self.equilibrium.cell.a
        inverse = torch.linalg.inv(torch.eye(len(a), dtype=a.dtype) - a)
        return self.head.weight.detach() @ inverse @ self.encoder.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.encoder(x.flatten(1))))


class Context(nn.Module):
    """``z = tanh(W z + u(x) + context)``; the output holds the context too, for a penalty on it."""

    def __init__(
        self,
        *,
        n: int = 6,
        rate: float = 0.6,
        seed: int = 0,
        solver: Solver | None = None,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(1, n, dtype=torch.float64))
        self.encoder = linear(4, n, seed + 1)
        if affine:
            cell: nn.Module = Affine(contraction(n, rate, symmetric=False, seed=seed + 2))
        else:
            cell = TanhCell(n, rate, seed + 2)
        self.equilibrium = Equilibrium(cell, solver=solver or TIGHT)
        self.head = linear(n, 3, seed + 3)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context.expand(len(x), -1)
        y = self.head(self.equilibrium(self.encoder(x) + context))
        return torch.cat([y, context], dim=1)


class Spy(nn.Module):
    """Wraps a cell and records the rows of every call."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.calls: list[tuple[Any, Any]] = []
        self.rows: list[int] = []
        build = getattr(cell, "initial_state", None)
        if build is not None:
            self.initial_state = build

    def forward(self, z: Any, *injection: Any) -> Any:
        out = self.cell(z, *injection)
        first = z[0] if isinstance(z, (tuple, list)) else z
        self.rows.append(len(first))
        self.calls.append((z, out))
        return out

    @property
    def total(self) -> int:
        """Row evaluations so far."""
        return sum(self.rows)


# What they give ---------------------------------------------------------------------------------


def independent_output(model: nn.Module, x: Tensor, steps: int = 2000) -> Tensor:
    """``model(x)`` with every layer solved by plain iteration in float64."""
    layers = [m for m in model.modules() if isinstance(m, Equilibrium)]
    old = [layer.solver for layer in layers]
    try:
        for layer in layers:
            layer.solver = Picard(max_iter=steps, tol=0.0, abs_tol=1e-14)
        with torch.no_grad():
            return model(x)
    finally:
        for layer, solver in zip(layers, old, strict=True):
            layer.solver = solver


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a scalar of the output, for the input and every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = rand(*y.shape, seed=77)
    loss = (weights * y).sum() + y.square().sum()
    names = ["input", *(n for n, _ in model.named_parameters())]
    values = torch.autograd.grad(loss, [x, *model.parameters()])
    return dict(zip(names, values, strict=True))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        gap = (value - second[name]).norm() / second[name].norm()
        assert float(gap) <= rtol, f"{name}: {float(gap):.2e}"


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]
