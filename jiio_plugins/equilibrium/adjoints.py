"""How gradients pass a fixed point ``z* = f(z*, u)``.

For a loss ``ℓ(z*)`` with ``g = ∂ℓ/∂z*`` the exact gradient is ``dℓ/du = (∂f/∂u)ᵀ μ``. The adjoint μ
solves ``μ = J_zᵀ μ + g`` (implicit function theorem).
"""

from __future__ import annotations

import abc
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.counting import Cost, count, count_rows, counting_into, open_counters
from jiio_plugins.equilibrium.solvers import FlatSolution, Solver, check_positive, iterate
from jiio_plugins.solution import ConvergenceWarning, Status
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from jiio_plugins.equilibrium.cell import CellMap

    Reenter = Callable[[], AbstractContextManager[Any]]


_LOOSE = 1e-2  # relative residual of an adjoint from which its gradient is not to be trusted


class Adjoint(abc.ABC):
    """A gradient rule for an equilibrium."""

    @abc.abstractmethod
    def forward(self, f: CellMap, z0: Tensor, solver: Solver) -> Tensor:
        """Solve the fixed point, and connect the result to the graph of f.

        Args:
            f: the cell at its injection, on flat states.
            z0: where to start, ``(rows, n)``.
            solver: the layer's own.

        Returns:
            The flat equilibrium, ``(rows, n)``.
        """


def solve_counted(f: CellMap, z0: Tensor, solver: Solver) -> FlatSolution:
    """Solve without a graph, and tell open counters what it cost.

    Args:
        f: the cell at its injection, on flat states.
        z0: where to start, ``(rows, n)``.
        solver: what solves.
    """
    result = iterate(f, z0, solver)
    count(Cost(f_evals=result.evals), result.residual)
    return result


def _counting_backward(z: Tensor, steps: int) -> Tensor:
    """``z``, whose backward pass counts its ``steps`` vector-Jacobian products a row."""
    counters = open_counters()  # backward may run in another thread

    def report(g: Tensor | None) -> None:
        if g is None:  # a backward pass may send nothing here, and then f is not differentiated
            return
        with counting_into(counters):
            count(Cost(vjps=steps * count_rows(len(g), g.device)))

    if z.requires_grad:
        z.register_hook(report)
    return z


@dataclass(frozen=True, kw_only=True)
class Implicit(Adjoint):
    """The exact gradient: solves ``μ = J_zᵀ μ + g`` to the solver's tolerance.

    Memory does not depend on the number of iterations of either solve.

    An adjoint that has not settled is a wrong gradient: where f contracts slowly, most of it may be
    missing at a residual of a few percent. A :class:`jiio_plugins.ConvergenceWarning` tells where a
    relative residual ends above 1e-2, and above ten times ``tol``. On an accelerator, where it
    would make the host wait, ask ``worst_adjoint_residual`` of
    :func:`jiio_plugins.count_evaluations`.

    Args:
        solver: for the adjoint equation. None: the layer's own.

    Not for: second derivatives (``create_graph=True`` raises).

    Source: Bai, Kolter and Koltun (NeurIPS 2019), theorem 1.
    """

    solver: Solver | None = None

    def forward(self, f: CellMap, z0: Tensor, solver: Solver) -> Tensor:
        """Solve without a graph, then one evaluation with it. See :class:`Adjoint`.

        Args:
            f: the cell at its injection, on flat states.
            z0: where to start, ``(rows, n)``.
            solver: the layer's own.
        """
        solved = solve_counted(f, z0, solver)
        if not torch.is_grad_enabled():
            return solved.fz
        z = solved.z.detach().requires_grad_()
        with uncompiled():
            fz = f(z)
        count(Cost(f_evals=count_rows(len(z), z.device)))
        if not fz.requires_grad:
            return fz
        out: Tensor = implicit_gate(fz, z, f, self.solver or solver)
        return out


class _AdjointMap:
    """``μ -> J_zᵀ μ + g`` with J at a fixed ``(z, u)``, through the graph of one evaluation."""

    # restricting evaluates f anew, so it must save more than in a forward solve
    compact_below = 0.5

    def __init__(
        self,
        f: CellMap | None,
        fz: Tensor,
        z: Tensor,
        g: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.f, self.fz, self.z, self.g, self.autocast = f, fz, z, g, autocast

    def __call__(self, mu: Tensor) -> Tensor:
        grads = torch.autograd.grad(self.fz, self.z, mu, retain_graph=True, materialize_grads=True)
        return grads[0] + self.g

    def restrict(self, rows: Tensor) -> _AdjointMap | None:
        f = None if self.f is None else self.f.restrict(rows)
        if f is None:
            return None
        f.injection = tuple(u.detach() if isinstance(u, Tensor) else u for u in f.injection)
        z = self.z[rows].detach().requires_grad_()
        with torch.enable_grad(), self.autocast(), uncompiled():
            fz = f(z)
        count(Cost(f_evals=count_rows(len(z), z.device)))
        return _AdjointMap(f, fz, z, self.g[rows], self.autocast)


def _autocast_now(kind: str) -> Reenter:
    """What brings back the autocast state that holds here, for a device of this kind."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    return partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
    )


def implicit_gate(
    fz: Tensor,
    z: Tensor,
    f: CellMap,
    solver: Solver | None,
    warm_start: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``fz``, whose backward passes the adjoint μ on instead of the incoming gradient g.

    Args:
        fz: ``f(z)`` with its graph, ``(rows, n)``.
        z: state that requires grad, ``(rows, n)``.
        f: the map.
        solver: of the adjoint equation. None: μ is ``warm_start(g)`` as it is.
        warm_start: where the adjoint solve starts, a function of g. None: at g.
    """
    # a function may come to hold what is made of the output: a cycle that nothing would free
    kept = f if isinstance(f.cell, nn.Module) else None
    out: Tensor = _ImplicitGate.apply(fz, z, kept, solver, warm_start)
    return out


class _ImplicitGate(torch.autograd.Function):
    """Identity forward. Backward replaces the incoming gradient g by the adjoint μ."""

    @staticmethod
    def forward(
        ctx: Any,
        fz: Tensor,
        z: Tensor,
        f: CellMap | None,
        solver: Solver | None,
        warm_start: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        # fz and z are kept as attributes: they are the graph that backward differentiates, and
        # neither refers to this node, so nothing is kept alive beyond it
        ctx.f, ctx.fz, ctx.z, ctx.solver, ctx.warm_start = f, fz, z, solver, warm_start
        ctx.counters = open_counters()  # backward may run in another thread, out of autocast
        ctx.autocast = _autocast_now(fz.device.type)
        return fz.detach().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would raise only where g depends on x
            raise RuntimeError(
                "Implicit() gives first derivatives only, but create_graph=True asks for a "
                "gradient that can be differentiated again: use adjoint=Unrolled(...) for that, or "
                "jiio_plugins.evaluation.layers_as(adjoint=Unrolled(...))"
            )
        start = g if ctx.warm_start is None else ctx.warm_start(g)
        with counting_into(ctx.counters):
            if ctx.solver is None:
                count(Cost(vjps=count_rows(len(g), g.device)))
                return start, None, None, None, None
            result = iterate(_AdjointMap(ctx.f, ctx.fz, ctx.z, g, ctx.autocast), start, ctx.solver)
            # one more product carries μ on to the injection
            count(Cost(vjps=result.evals + 1), adjoint_residual=result.residual)
        if ctx.warm_start is None:  # else it is to take these few steps and no more
            _warn_if_loose(result, ctx.solver)
        # after a few steps from a warm start one more is there already; it costs nothing
        mu = result.z if ctx.warm_start is None else result.fz
        return mu, None, None, None, None


def _warn_if_loose(found: FlatSolution, solver: Solver) -> None:
    """Warn of adjoints that have not settled. On an accelerator the host would have to wait."""
    if found.residual.device.type != "cpu" or not len(found.residual):
        return
    if not solver.tol:  # as many steps as max_iter says are asked for, not a residual
        return
    limit = max(_LOOSE, 10 * solver.tol)
    loose = (found.status != Status.CONVERGED) & ~(found.residual <= limit)
    if not bool(loose.any()):
        return
    # round numbers, since Python shows a text once: not a line for every step of a training
    share = math.ceil(10 * float(loose.double().mean())) / 10
    worst = float(found.residual[loose].max())
    about = f"up to {10.0 ** math.ceil(math.log10(worst)):.0e}" if math.isfinite(worst) else "NaN"
    warnings.warn(
        f"the adjoint of an equilibrium layer has not settled in up to {share:.0%} of the rows: "
        f"its relative residual is {about}, asked for was {solver.tol:.0e}. Their gradients may be "
        "off by far more than that. Raise max_iter in "
        "Equilibrium(adjoint=Implicit(solver=...)), damp the cell (Damped), or train with a "
        "Jacobian penalty",
        ConvergenceWarning,
        stacklevel=3,
    )


@dataclass(frozen=True, kw_only=True)
class Phantom(Adjoint):
    """Phantom gradient: differentiate through ``steps`` damped evaluations at the equilibrium.

    Each takes ``z⁺ = (1 − damping) z + damping · f(z)``. It is cheaper than :class:`Implicit`,
    biased, and meant for training.

    Args:
        steps: evaluations with a graph. Memory grows with them.
        damping: weight of ``f(z)``, in (0, 1].

    Raises:
        TypeError: steps that are no integer.
        ValueError: no steps, or a damping out of its range.

    Source: Geng, Zhang, Bai, Wang and Lin, "On Training Implicit Models" (NeurIPS 2021).
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_counts(self, steps=1)
        check_positive("damping", self.damping, 1.0)

    def forward(self, f: CellMap, z0: Tensor, solver: Solver) -> Tensor:
        """Solve without a graph, then ``steps`` evaluations with it. See :class:`Adjoint`.

        Args:
            f: the cell at its injection, on flat states.
            z0: where to start, ``(rows, n)``.
            solver: the layer's own.
        """
        z = solve_counted(f, z0, solver).z.detach()
        for _ in range(self.steps):
            z = torch.lerp(z, f(z), self.damping)
        count(Cost(f_evals=self.steps * count_rows(len(z), z.device)))
        return _counting_backward(z, self.steps)


@dataclass(frozen=True, kw_only=True)
class JacobianFree(Adjoint):
    """Jacobian-free gradient: replace ``(I − J_z)⁻¹`` by the identity, ``dℓ/du ≈ (∂f/∂u)ᵀ g``.

    Source: Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks" (AAAI 2022).
    """

    def forward(self, f: CellMap, z0: Tensor, solver: Solver) -> Tensor:
        """Solve without a graph, then one evaluation with it. See :class:`Adjoint`.

        Args:
            f: the cell at its injection, on flat states.
            z0: where to start, ``(rows, n)``.
            solver: the layer's own.
        """
        return Phantom(steps=1, damping=1.0).forward(f, z0, solver)


@dataclass(frozen=True, kw_only=True)
class Unrolled(Adjoint):
    """Differentiate through ``steps`` iterations ``z⁺ = (1 − damping) z + damping · f(z)``.

    They start at the initial state, and the layer's solver is unused. Use it for checks of other
    gradients, and for attacks that must not trust an implicit one.

    Args:
        steps: iterations, all in the graph. Memory grows with them.
        damping: weight of ``f(z)``, in (0, 1].

    Raises:
        TypeError: steps that are no integer.
        ValueError: no steps, or a damping out of its range.
    """

    steps: int = 30
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, steps=1)
        check_positive("damping", self.damping, 1.0)

    def forward(self, f: CellMap, z0: Tensor, solver: Solver) -> Tensor:
        """Plain iterations, all in the graph. See :class:`Adjoint`.

        Args:
            f: the cell at its injection, on flat states.
            z0: where to start, ``(rows, n)``.
            solver: unused.
        """
        z = z0
        for _ in range(self.steps):
            z = torch.lerp(z, f(z), self.damping) if self.damping != 1.0 else f(z)
        count(Cost(f_evals=self.steps * count_rows(len(z), z.device)))
        return _counting_backward(z, self.steps)
