"""The nested loop, which the joint one replaces: two solves for every step on the variable."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers import Anderson, FlatMap, Solver, iterate
from jiio_plugins.equilibrium.state import relative
from jiio_plugins.methods.base import Method, Progress, Tracker

if TYPE_CHECKING:
    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.joint.linearization import Linearization
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Callback, Path, Stop


@dataclass(frozen=True, kw_only=True)
class Nested(Method):
    """The nested loop: solve for z, solve for μ, step on v, and again.

    Costs are counted as low as they are: the evaluation of f that carries the graph is the solve's
    last one, and the last VJP of the adjoint solve yields ``J_vᵀμ`` too. On a CPU, where a solve
    goes on with the rows that still run, making their graph anew is an evaluation of f for each.

    Args:
        solver: for z; ``max_iter`` caps the evaluations of f a step, the one with the graph
            included.
        adjoint_solver: for μ; None: as ``solver``.
        warm_start: start both solves where the last ones ended; else from scratch, without warm-up.
    """

    solver: Solver = field(default_factory=lambda: Anderson(tol=1e-3))
    adjoint_solver: Solver | None = None
    warm_start: bool = False
    max_iter: int = 20

    def run(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        v: Tensor,
        stop: Stop | None = None,
        callback: Callback | None = None,
    ) -> Path:
        """See :class:`Method`."""
        adjoint_solver = self.adjoint_solver or self.solver
        z: Tensor | None = None
        mu: Tensor | None = None
        if self.warm_start:
            z = problem.warm_up(v, self.warmup)
        track = Tracker(problem, v, stop)
        mu_residual = torch.zeros(problem.rows, device=v.device)
        for k, step in enumerate(self.steps(feasible, v)):
            active = track.active
            solving = None
            if z is None:
                solved = problem.solve(v, _capped(self.solver))
                problem.pay(f_evals=solved.evals * active)
                z = solved.image
            elif self.solver.max_iter > 1:
                solving = _Solving(_capped(self.solver))
            lin = problem.linearize(v, z, advance=solving)
            if solving is not None:
                problem.pay(f_evals=solving.evals * active)
            z_start = lin.z
            loss = problem.loss(lin.output)
            b, direct = lin.gradient(loss)
            equation = _AdjointEquation(problem, lin, v, z_start, b)
            outcome = iterate(equation, b if mu is None else mu, adjoint_solver)
            problem.pay_passes(active * (1 + equation.f_evals), outcome.evals * active)
            r = lin.f - z_start
            track.see(v, loss, lin.output, b, r, active)
            gradient = (direct + equation.jv_mu).reshape(v.shape)
            mu_residual = outcome.residual
            if callback is not None:
                callback(Progress(k, v, gradient, loss.detach(), relative(r, lin.f), z_start))
            v_next = feasible.project(v + step * feasible.descent_direction(gradient, v))
            v = track.move(v, v_next)
            last_z, last_mu = lin.f, outcome.fz
            z, mu = (last_z, last_mu) if self.warm_start else (None, None)
            if track.all_done():
                break
        return track.path(v, last_z, last_mu, last_mu - b, relative(r, lin.f), mu_residual)


def _capped(solver: Solver) -> Solver:
    """The solver with one evaluation less: the one with the graph comes after it."""
    return replace(solver, max_iter=max(1, solver.max_iter - 1))


class _Solving:
    """A solve where a layer is called, so that the rest of the network runs once a step.

    Attributes:
        evals: evaluations of f per row, all layers together.
    """

    evals: Tensor | float = 0.0

    def __init__(self, solver: Solver) -> None:
        self.solver = solver

    def __call__(self, f: FlatMap, z: Tensor) -> Tensor:
        """One layer's flat state, one step on from where its solve ended."""
        found = iterate(f, z, self.solver)
        self.evals = self.evals + found.evals
        return found.fz


class _AdjointEquation:
    """``μ -> J_zᵀμ + b`` at one ``(z, v)``; keeps ``J_vᵀμ`` of the last μ of every row."""

    # restricting evaluates f anew, so it must save more than in a forward solve
    compact_below = 0.5

    def __init__(
        self, problem: Problem, lin: Linearization, v: Tensor, z: Tensor, b: Tensor
    ) -> None:
        self.problem, self.lin, self.v, self.z, self.b = problem, lin, v, z, b
        self.rows: Tensor | None = None
        self.jv_mu = torch.zeros_like(v)
        self.f_evals = torch.zeros(problem.rows, device=v.device)

    def __call__(self, mu: Tensor) -> Tensor:
        jz_mu, jv_mu = self.lin.vjp(mu, last=False)
        jv_mu = jv_mu.reshape(self.v.shape)
        if self.rows is None:
            self.jv_mu.copy_(jv_mu)
        else:
            self.jv_mu[self.rows] = jv_mu[self.rows]
        return jz_mu + self.b

    def restrict(self, rows: Tensor) -> _AdjointEquation | None:
        if self.problem.groups.index is not None or not self.problem.splits:
            return None  # rows that share a variable or a dropout mask stay together
        smaller = object.__new__(_AdjointEquation)
        smaller.__dict__.update(self.__dict__)
        smaller.rows = rows if self.rows is None else self.rows[rows]
        smaller.z, smaller.b = self.z[rows], self.b[rows]
        smaller.lin = self.problem.linearize(self.v, smaller.z, smaller.rows)
        self.f_evals[smaller.rows] += 1
        return smaller
