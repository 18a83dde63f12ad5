"""The adjoint equation at a state and a variable that stand still, and its solution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jiio_plugins.equilibrium.solvers import Solver, iterate
from jiio_plugins.equilibrium.state import by_row
from jiio_plugins.solution import Status

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins.joint.linearization import Linearization
    from jiio_plugins.joint.problem import Problem


class AdjointEquation:
    """``μ -> J_zᵀμ + ∂ℓ/∂z`` at one ``(z, v)``. It keeps ``J_vᵀμ`` of the last μ of every row.

    Args:
        problem: whose model and objective.
        linearized: the pass at ``(z, v)``.
        v: the variable, ``(problems, d)``.
        z: state of the rows that are evaluated, ``(rows, n)``.
        dl_dz: ``∂ℓ/∂z``, ``(rows, n)``.
        rows: indices of the rows that are evaluated. None: all.

    Attributes:
        jv_mu: ``J_vᵀμ``, ``(problems, d)``. 0 where nothing is evaluated.
        f_evals: evaluations of f for a graph of fewer rows, ``(rows of the batch,)``.
    """

    # restricting evaluates f anew, so it must save more than in a forward solve
    compact_below = 0.5

    def __init__(
        self,
        problem: Problem,
        linearized: Linearization,
        v: Tensor,
        z: Tensor,
        dl_dz: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        self.problem, self.linearized, self.v, self.z, self.dl_dz = problem, linearized, v, z, dl_dz
        self.rows = rows
        self.jv_mu = torch.zeros_like(v)
        self.f_evals = torch.zeros(problem.rows, device=v.device)

    def __call__(self, mu: Tensor) -> Tensor:
        """The next μ, ``(rows, n)``."""
        jz_mu, jv_mu = self.linearized.vjp(mu, last=False)
        jv_mu = jv_mu.reshape(self.v.shape)
        if self.rows is None:
            self.jv_mu.copy_(jv_mu)
        else:
            self.jv_mu[self.rows] = jv_mu[self.rows]
        return jz_mu + self.dl_dz

    def restrict(self, rows: Tensor) -> AdjointEquation | None:
        """The equation of these of its rows, or None where they cannot be taken apart."""
        if self.problem.groups.index is not None or not self.problem.row_separable:
            return None  # rows that share a variable or a dropout mask stay together
        smaller = object.__new__(AdjointEquation)
        smaller.__dict__.update(self.__dict__)
        smaller.rows = rows if self.rows is None else self.rows[rows]
        smaller.z, smaller.dl_dz = self.z[rows], self.dl_dz[rows]
        linearized = self.problem.on_some(
            lambda some: self.problem.linearize(self.v, smaller.z, some), smaller.rows
        )
        if linearized is None:
            return None
        smaller.linearized = linearized
        self.f_evals[smaller.rows] += 1
        return smaller


class Adjoint(NamedTuple):
    """The adjoint at one ``(z, v)``, and the gradient that it yields.

    Attributes:
        gradient: ``J_vᵀμ + ∂ℓ/∂v``, ``(problems, d)``.
        first: the same of the μ that the solve started from.
        converged: whether the solve did, bool ``(rows of the batch,)``.
        f_evals: evaluations of f, all layers together, ``(rows of the batch,)``.
        vjps: likewise.
    """

    gradient: Tensor
    first: Tensor
    converged: Tensor
    f_evals: Tensor
    vjps: Tensor

    def joined(self, other: Adjoint, rows: Tensor) -> Adjoint:
        """This, with another one's rows, each of a problem of its own. The costs add up.

        Args:
            other: that of these rows.
            rows: which they are, bool ``(rows of the batch,)``.
        """
        return Adjoint(
            gradient=by_row(rows, other.gradient, self.gradient),
            first=by_row(rows, other.first, self.first),
            converged=torch.where(rows, other.converged, self.converged),
            f_evals=self.f_evals + other.f_evals,
            vjps=self.vjps + other.vjps,
        )


def solve_adjoint(
    problem: Problem,
    v: Tensor,
    z: Tensor,
    jz_mu: Tensor,
    solver: Solver,
    rows: Tensor | None = None,
    *,
    output: Any = None,
) -> Adjoint:
    """Solve the adjoint equation at ``(z, v)``.

    Args:
        problem: whose model and objective.
        v: the variable, ``(problems, d)``.
        z: state, ``(rows, n)``.
        jz_mu: ``J_zᵀμ`` where μ starts, ``(rows, n)``.
        solver: for μ.
        rows: indices of the rows to evaluate, each with a variable of its own. None: all.
        output: of the model at ``(z, v)``, all rows: an objective is of all of them. It is not
            needed where all are evaluated.
    """
    if rows is not None:
        z, jz_mu = z[rows], jz_mu[rows]
    linearized = problem.linearize(v, z, rows)
    now = linearized.output
    dl_dz = linearized.gradient(
        problem.loss(now if rows is None else output.index_copy(0, rows, now))
    )
    equation = AdjointEquation(problem, linearized, v, z, dl_dz, rows)
    mu = equation(jz_mu + dl_dz)
    first = linearized.by_v(equation.jv_mu.clone())
    found = iterate(equation, mu, solver)
    done = found.status == Status.CONVERGED
    counted = equation.f_evals
    parts = [t.to(counted) for t in (torch.ones_like(found.evals), found.evals + 1, done)]
    if rows is not None:
        parts = [t.new_zeros(problem.rows).index_copy(0, rows, t) for t in parts]
    once, vjps, done = parts
    gradient = linearized.by_v(equation.jv_mu)
    layers = len(problem.layout.layouts)
    f_evals = layers * (once + counted)
    return Adjoint(gradient, first, done > 0, f_evals, layers * vjps)
