"""Fixed-point solvers to the same residual of every row: ours, torchdeq's, deepinv's, SciPy's.

    python benchmarks/solvers.py [--cells linear-0.9 digits] [--out out/benchmark-solvers]

Every solver starts at zero and ends where ``‖f(z) − z‖ ≤ tol ‖f(z)‖`` holds for each of the rows.
One more evaluation, which is not counted, judges it. A peer runs with each of its settings here,
and the best of those that arrive is shown, by evaluations and by seconds apart. Where its rule for
stopping is another, it gets the tolerance at which ours is met. Ours run as a layer does.

Evaluations are of f, a row. A peer evaluates every row until all have converged. Seconds are of the
process, the least of several rounds in which all solvers take turns. The two ratios are of ours to
the best peer's.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
import tyro
from deepinv.optim import FixedPoint
from deepinv.optim.optimizers import AndersonAccelerationConfig
from torch import Tensor, nn
from torchdeq.solver import get_solver

from jiio_plugins import Anderson, Broyden, Equilibrium, Picard, Solver, count_evaluations
from jiio_plugins.data import load_digits
from jiio_plugins.equilibrium import Layout
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import write_json

MOST = 500  # evaluations after which a solver has not arrived
OURS: dict[str, Solver] = {"Anderson": Anderson(), "Picard": Picard(), "Broyden": Broyden()}


@dataclass
class Args:
    """Benchmark of the fixed-point solvers."""

    cells: list[str] = field(default_factory=lambda: list(CELLS))
    """Which of them: see CELLS in this file."""
    tolerances: list[float] = field(default_factory=lambda: [1e-3, 1e-5, 1e-10])
    """Relative residuals to reach, 1e-7 and below in float64."""
    rows: int = 64
    """Samples in the batch."""
    rounds: int = 5
    """Rounds in which the solvers take turns."""
    threads: int = 1
    """Of PyTorch."""
    out: Path = Path("out/benchmark-solvers")
    """Where results.json goes."""


class Map:
    """f on flat states, counted."""

    def __init__(self, cell: nn.Module, inputs: tuple[Tensor, ...], layout: Layout) -> None:
        self.cell, self.inputs, self.layout = cell, inputs, layout
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.layout.pack(self.cell(self.layout.unpack(z), *self.inputs))

    def residual(self, z: Tensor) -> float:
        """The largest relative residual of a row."""
        fz = self(z)
        found = ((fz - z).norm(dim=1) / fz.norm(dim=1)).max().item()
        return found if math.isfinite(found) else math.inf


class Symmetric(nn.Module):
    """``f(z) = A z + u``, with a symmetric A of the spectral radius that each row asks for."""

    def __init__(self, dtype: torch.dtype, size: int = 200) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.basis = torch.linalg.qr(whole)[0].to(dtype)
        self.spectrum = torch.linspace(-0.5, 1, size, dtype=dtype)

    def forward(self, z: Tensor, u: Tensor, rate: Tensor) -> Tensor:
        return ((z @ self.basis) * (rate * self.spectrum)) @ self.basis.T + u


def linear(rows: int, dtype: torch.dtype, rate: float, slow: float | None = None) -> Map:
    """All rows at one rate but, where ``slow`` is given, the first."""
    rates = torch.full((rows, 1), rate, dtype=dtype)
    rates[0] = rate if slow is None else slow
    u = torch.randn(rows, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Map(Symmetric(dtype), (u.to(dtype), rates), Layout.of(u))


def mdeq(rows: int, dtype: torch.dtype, gain: float = 1.0) -> Map:
    """The shipped classifier of digits. The first row's injection is ``gain`` times its own."""
    model = load_pretrained("digits").to(dtype)
    layer = next(m for m in model.modules() if isinstance(m, Equilibrium))
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(load_digits("test")[0][:rows].to(dtype))
    inputs = tuple(part.clone() for part in seen)
    for part in inputs:
        part[0] *= gain
    return Map(layer.cell, inputs, Layout.of(layer.initial_state(*inputs)))


CELLS: dict[str, Callable[[int, torch.dtype], Map]] = {
    "linear-0.5": partial(linear, rate=0.5),
    "linear-0.9": partial(linear, rate=0.9),
    "linear-0.99": partial(linear, rate=0.99),
    "linear-0.999": partial(linear, rate=0.999),
    "linear, one slow row": partial(linear, rate=0.5, slow=0.999),
    "digits": mdeq,
    "digits, one row alone": lambda _, dtype: mdeq(1, dtype),
    "digits, one slow row": partial(mdeq, gain=4.0),
}
Run = Callable[[Map, Tensor, float], tuple[Tensor, float]]  # the fixed point, evaluations a row


@dataclass
class Found:
    """What one solver did: evaluations a row, seconds, the largest residual of a row."""

    solver: str
    evaluations: float = math.nan
    seconds: float = math.inf
    residual: float = math.inf
    arrived: bool = False


def ours(solver: Solver) -> Run:
    def run(f: Map, z0: Tensor, tol: float) -> tuple[Tensor, float]:
        layer = Equilibrium(f.cell, solver=replace(solver, tol=tol, max_iter=MOST))
        with count_evaluations() as counter:
            z = layer(*f.inputs, z0=f.layout.unpack(z0))
        return f.layout.pack(z), counter.f_evals / len(z0)

    return run


def torchdeq(name: str, **settings: Any) -> Run:
    def run(f: Map, z0: Tensor, tol: float) -> tuple[Tensor, float]:
        before = f.calls
        z, _, _ = get_solver(name)(f, z0, max_iter=MOST, tol=tol, stop_mode="rel", **settings)
        return z, f.calls - before

    return run


class _Step(nn.Module):
    """An iterator as deepinv's loop takes it."""

    cost_fn = None

    def forward(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"est": (args[-1](state["est"][0]),), "cost": None}


def deepinv(**settings: Any) -> Run:
    def run(f: Map, z0: Tensor, tol: float) -> tuple[Tensor, float]:
        before = f.calls
        last: list[Tensor] = []

        def watched(z: Tensor) -> Tensor:
            fz = f(z)
            last[:] = [z, fz]
            return fz

        def converged(k: int, previous: Any, state: Any) -> bool:
            z, fz = last
            return bool(((fz - z).norm(dim=1) <= tol * fz.norm(dim=1)).all())

        loop = FixedPoint(
            iterator=_Step(),
            init_iterate_fn=lambda *args, **kwargs: {"est": (z0,), "cost": None},
            check_conv_fn=converged,
            max_iter=MOST,
            anderson_acceleration_config=AndersonAccelerationConfig(**settings),
        )
        loop(watched)
        return last[0], f.calls - before

    return run


def scipy_solver(name: str, **settings: Any) -> Run:
    """The batch as one system. Its tolerance is absolute, so it gets that of the smallest row."""

    def run(f: Map, z0: Tensor, tol: float) -> tuple[Tensor, float]:
        before, shape = f.calls, z0.shape
        smallest = f(z0).norm(dim=1).min().item()  # ‖f(0)‖ has about the size of ‖f(z*)‖
        last: list[Tensor] = [z0]

        def residual(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            last[0] = torch.from_numpy(z).to(z0.dtype).view(shape)
            return (f(last[0]) - last[0]).double().numpy().ravel()

        def worst(r: np.ndarray[Any, Any]) -> float:
            return float(np.linalg.norm(r.reshape(shape), axis=1).max())

        solve = getattr(scipy.optimize, name)
        start = z0.double().numpy().ravel()
        found = solve(
            residual, start, f_tol=tol * smallest, tol_norm=worst, maxiter=MOST, **settings
        )
        return torch.from_numpy(found).to(z0.dtype).view(shape), f.calls - before

    return run


PEERS = {
    **{
        f"torchdeq anderson m={m} λ={lam:g}": torchdeq("anderson", m=m, lam=lam)
        for m in (6, 20)
        for lam in (1e-4, 1e-10)
    },
    "torchdeq broyden": torchdeq("broyden"),
    "torchdeq fixed point": torchdeq("fixed_point_iter"),
    **{
        f"deepinv anderson eps={eps:g}": deepinv(history_size=5, beta=1.0, eps=eps)
        for eps in (1e-4, 1e-10)
    },
    "scipy anderson": scipy_solver("anderson", M=10),
    "scipy newton_krylov": scipy_solver("newton_krylov"),
}


def measure(name: str, run: Run, f: Map, z0: Tensor, tol: float) -> Found:
    found = Found(name)
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's words about its settings
            z, found.evaluations = run(f, z0, tol)
    except (scipy.optimize.NoConvergence, ValueError, torch.linalg.LinAlgError, OverflowError):
        return found  # it did not arrive
    found.seconds = time.process_time() - begin
    found.residual = f.residual(z)
    found.arrived = found.residual <= tol * 1.01
    return found


def compare(args: Args, cell: str, tol: float) -> dict[str, Any]:
    dtype = torch.float64 if tol <= 1e-7 else torch.float32
    f = CELLS[cell](args.rows, dtype)
    z0 = torch.zeros(len(f.inputs[0]), sum(f.layout.sizes), dtype=dtype)
    runs = {**{name: ours(solver) for name, solver in OURS.items()}, **PEERS}
    best = {name: measure(name, run, f, z0, tol) for name, run in runs.items()}
    for _ in range(args.rounds):
        for name, run in runs.items():
            if best[name].arrived:  # who does not arrive is not run again
                again = measure(name, run, f, z0, tol)
                best[name].seconds = min(best[name].seconds, again.seconds)
    peers = [best[name] for name in PEERS if best[name].arrived]
    for name in OURS:
        show(cell, tol, best[name], peers)
    return {"cell": cell, "tol": tol, "runs": [asdict(found) for found in best.values()]}


def show(cell: str, tol: float, found: Found, peers: list[Found]) -> None:
    text = f"{cell:<24}{tol:>8.0e}  {found.solver:<9}"
    if not found.arrived:
        print(f"{text} does not arrive: {found.residual:.1e}", flush=True)
        return
    text += f"{found.evaluations:>8.1f}{found.seconds:>9.4f}"
    if peers:
        fewest = min(peers, key=lambda peer: peer.evaluations)
        fastest = min(peers, key=lambda peer: peer.seconds)
        text += f"{found.evaluations / fewest.evaluations:>7.2f}"
        text += f"{found.seconds / fastest.seconds:>7.2f}"
        text += f"  {fewest.evaluations:.0f} ({fewest.solver})"
        text += f", {fastest.seconds:.4f} ({fastest.solver})"
    print(text, flush=True)


def main(args: Args) -> None:
    if unknown := set(args.cells) - set(CELLS):
        raise SystemExit(f"no such cell: {sorted(unknown)}. There are {', '.join(CELLS)}")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(
        f"{'cell':<24}{'tol':>8}  {'solver':<9}{'evals':>8}{'seconds':>9}{'ratio':>7}{'ratio':>7}"
        "  peers: fewest evaluations, fastest"
    )
    results = [compare(args, cell, tol) for cell in args.cells for tol in args.tolerances]
    record = {"rows": args.rows, "threads": args.threads, "results": results}
    write_json(args.out / "results.json", record)
    print(f"\nwritten: {args.out}/results.json")


if __name__ == "__main__":
    main(tyro.cli(Args))
