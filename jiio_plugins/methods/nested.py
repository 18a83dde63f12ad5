"""The nested loop, which the joint one replaces: two solves for every step on the variable."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jiio_plugins.equilibrium.solvers import Anderson, FlatMap, Solver, iterate
from jiio_plugins.joint.adjoint import AdjointEquation
from jiio_plugins.methods.base import Method
from jiio_plugins.methods.records import Evaluation
from jiio_plugins.methods.round import Iteration

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.best import BestSoFar
    from jiio_plugins.methods.records import MethodResult


@dataclass(frozen=True, kw_only=True)
class Nested(Method):
    """The nested loop: solve for z, solve for μ, step on v, and again.

    ``z* = f(z*, v)``, then ``μ* = J_zᵀμ* + ∂ℓ/∂z``, then ``v⁺ = Π(v + α ε d(J_vᵀμ* + ∂ℓ/∂v))``.
    Here d(g) is the steepest descent direction for a gradient g, see :class:`Method`.

    Costs are counted as low as they are. The evaluation of f that carries the graph is the solve's
    last one, and the last VJP of the adjoint solve yields ``J_vᵀμ`` too. On a CPU a solve goes on
    with the rows that still run. Making their graph anew is an evaluation of f for each.

    Args:
        max_iter: steps on v.
        step_size: α_0 in units of ε, a number or one per problem. Without a ball α, in units of
            v²/objective. None: 2.0 with a ball, but 30 / max_iter up to 3.0 in an L2 ball, and 0.1
            without one.
        final_step_size: α at the last step, in the same units. None: with a ball 0.8 / max_iter of
            step_size (of 2.0, where that is None), without one step_size.
        warmup: forward-only evaluations of f before the first step, at most, see :class:`Method`.
            Unused without ``warm_start``.
        precision: dtype in which the loop runs the model under autocast, such as
            ``torch.bfloat16``. None: as the model is.
        gap_tol: with a ball: a problem leaves where its v is at rest, see :class:`Method`. 0, the
            default, takes all steps, as PGD does.
        solver: for z. Its ``max_iter`` caps the evaluations of f a step, the one with the graph
            included.
        adjoint_solver: for μ. None: as ``solver``.
        warm_start: start both solves where the last ones ended. Otherwise they start from scratch,
            without warm-up.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range, or another precision.
    """

    solver: Solver = field(default_factory=lambda: Anderson(tol=1e-3))
    adjoint_solver: Solver | None = None
    warm_start: bool = False
    max_iter: int = 20

    def start(self, problem: Problem) -> Iteration:
        """See :class:`Method`."""
        return _NestedIteration(self, problem)


class _NestedIteration(Iteration):
    """Both solves, at every v."""

    def __init__(self, method: Nested, problem: Problem) -> None:
        self.method, self.problem = method, problem
        self.warm: Tensor | None = None  # where z starts next. None: from scratch
        self.mu_start: Tensor | None = None
        if method.warm_start:
            self.warm = problem.warm_up(problem.v_start, method.warmup).z

    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """See :class:`Iteration`."""
        problem, solver, solving = self.problem, self.method.solver, None
        if self.warm is None:
            solved = problem.solve(v, _capped(solver))
            problem.pay(f_evals=solved.evals * active)
            self.warm = solved.fz
        elif solver.max_iter > 1:
            solving = _Solving(_capped(solver))
        linearized = problem.linearize(v, self.warm, advance=solving)
        if solving is not None:
            problem.pay(f_evals=solving.evals * active)
        z = linearized.z
        loss = problem.loss(linearized.output)
        dl_dz = linearized.gradient(loss)
        equation = AdjointEquation(problem, linearized, v, z, dl_dz)
        start = dl_dz if self.mu_start is None else self.mu_start
        found = iterate(equation, start, self.method.adjoint_solver or solver)
        problem.pay_passes(active * (1 + equation.f_evals), found.evals * active)
        gradient = linearized.by_v(equation.jv_mu)
        self.z, self.mu = linearized.fz, found.fz
        self.mu_residual = found.residual
        warm = self.method.warm_start
        self.warm, self.mu_start = (self.z, self.mu) if warm else (None, None)
        r = linearized.fz - z
        at = z, r, linearized.fz, dl_dz, found.residual, found.fz - dl_dz
        return Evaluation(loss.detach(), linearized.output, gradient, *at)

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """See :class:`Iteration`."""
        self.jz_mu = self.mu - at.dl_dz
        return replace(super().finish(at, v, best), mu_error=self.mu_residual)


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
