"""The derivative of a joint solution, by implicit differentiation of the whole fixed point.

State, adjoint and variable of a smooth problem solve ``q = F(q, θ)`` for ``q = (z, μ, v)`` and

    F(q, θ) = ( f(z, v),  J_zᵀμ + ∂ℓ/∂z,  Π(v − α (J_vᵀμ + ∂ℓ/∂v)) ),

θ standing for every tensor that model, objective or constraint uses. For a loss ``L(v)`` with
``g = ∂L/∂v`` the gradient is ``dL/dθ = (∂F/∂θ)ᵀ λ`` where ``λ = (∂F/∂q)ᵀ λ + (0, 0, g)``. F always
takes the plain gradient, whatever steps found the solution: normalised steps never settle, and α
cancels. One evaluation of F is kept with its graph, so memory does not depend on how many
iterations found the solution or solve for λ. Autograd finds θ in that graph, closures included.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.counting import Cost, count, count_rows, counting_into, open_counters
from jiio_plugins.equilibrium.solvers import Anderson, FlatSolution, Solver, iterate
from jiio_plugins.equilibrium.state import row_norm
from jiio_plugins.solution import ConvergenceWarning, Residuals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.joint.variables import Groups
    from jiio_plugins.methods.records import MethodResult

WARN_ABOVE = 1e-3  # relative residual, of the point or of the adjoint, from which a warning is due
LOOSEST = 0.5  # from which it is in any case
_NOISE = 1e3  # times the dtype's precision: a block of a smaller norm counts as zero
_PLAIN = 5  # iterations that show the sizes of λ's blocks, and whether the step is too long
_TRIES = 12  # how often a step may be cut to a third
_AMPLIFY = 10.0  # of a doubt that comes from residuals, which are errors times about 1 − ρ
_ADVICE = "allow more iterations, change the step size, or add a penalty on the variables"

Parts = tuple[Tensor, Tensor, Tensor]


def adjoint_solver(dtype: torch.dtype) -> Solver:
    """The default solver for λ. A long memory pays, since the equation is linear."""
    return Anderson(max_iter=300, memory=30, tol=1e-10 if dtype == torch.float64 else 1e-5)


class Blocks:
    """z and μ of all rows, and v, as one flat vector per problem, ``(problems, N)``.

    A problem with fewer rows than the largest is padded with zeros. Each block can be measured in
    units of its own, or the largest would decide alone in a least squares over all of them.

    Args:
        groups: which problem each row belongs to.
        n: entries of a row's state.
        d: entries of v.

    Attributes:
        units: of each block, ``(problems, 1)``. None: they are as they are.
    """

    def __init__(self, groups: Groups, n: int, d: int) -> None:
        self.groups, self.n, self.d = groups, n, d
        self.units: Parts | None = None

    def measure(self, z: Tensor, mu: Tensor, v: Tensor) -> None:
        """Take the norms of these blocks as units from now on.

        Args:
            z: ``(rows, n)``.
            mu: ``(rows, n)``.
            v: ``(problems, d)``.
        """
        self.units = tuple(torch.where(n > 0, n, 1.0)[:, None] for n in self.norms(z, mu, v))  # type: ignore[assignment]

    def norms(self, z: Tensor, mu: Tensor, v: Tensor) -> Parts:
        """Euclidean norm of each block, ``(problems,)`` each.

        Args:
            z: ``(rows, n)``.
            mu: ``(rows, n)``.
            v: ``(problems, d)``.
        """
        by_row = [self.groups.sum(row_norm(t).square()).sqrt() for t in (z, mu)]
        return by_row[0], by_row[1], row_norm(v)

    def pack(self, z: Tensor, mu: Tensor, v: Tensor) -> Tensor:
        """Blocks -> flat, ``(problems, N)``.

        Args:
            z: ``(rows, n)``.
            mu: ``(rows, n)``.
            v: ``(problems, d)``.
        """
        if self.units is not None:
            z = z / self.groups.spread(self.units[0])
            mu = mu / self.groups.spread(self.units[1])
            v = v / self.units[2]
        rows = self.groups.gather(torch.cat([z, mu], dim=1))
        return torch.cat([rows.flatten(1), v], dim=1)

    def unpack(self, flat: Tensor) -> Parts:
        """Flat ``(problems, N)`` -> blocks."""
        rows, v = flat.split([flat.shape[1] - self.d, self.d], dim=1)
        rows = rows.reshape(len(flat), self.groups.width, 2 * self.n)
        z, mu = self.groups.scatter(rows).split([self.n, self.n], dim=1)
        if self.units is not None:
            z = z * self.groups.spread(self.units[0])
            mu = mu * self.groups.spread(self.units[1])
            v = v * self.units[2]
        return z, mu, v


class JointMap:
    """F at the θ of a problem.

    Args:
        problem: whose model, objective and constraint.
        step: α, ``(1 or problems, 1)``.
    """

    def __init__(self, problem: Problem, step: Tensor) -> None:
        self.problem, self.step = problem, step

    @torch.enable_grad()
    def evaluate(self, z: Tensor, mu: Tensor, v: Tensor) -> Parts:
        """``F(z, μ, v)`` without a graph: one evaluation of f and one VJP.

        Args:
            z: ``(rows, n)``.
            mu: ``(rows, n)``.
            v: ``(problems, d)``.
        """
        linearized = self.problem.linearize(v, z, answer_fz=False)
        dl_dz = linearized.gradient(self.problem.loss(linearized.output))
        jz_mu, jv_mu = linearized.vjp(mu)
        moved = v - self.step * linearized.by_v(jv_mu)
        return linearized.fz, jz_mu + dl_dz, self.problem.feasible.project(moved)

    @torch.enable_grad()
    def linearize(self, z: Tensor, mu: Tensor, v: Tensor) -> tuple[Parts, list[Tensor]]:
        """``F(z, μ, v)`` with its graph, and the leaves of z, μ and v in it.

        Args:
            z: ``(rows, n)``.
            mu: ``(rows, n)``.
            v: ``(problems, d)``.
        """
        linearized = self.problem.linearize(v, z, answer_fz=False)
        mu = mu.detach().requires_grad_()
        dl_dz = linearized.gradient(self.problem.loss(linearized.output), create_graph=True)
        jz_mu, jv_mu = linearized.vjp(mu, create_graph=True)
        *z_leaves, v_leaf = linearized.leaves
        moved = v_leaf - self.step * linearized.by_v(jv_mu)
        fq = linearized.live_fz, jz_mu + dl_dz, self.problem.feasible.project_smoothly(moved)
        return fq, [*z_leaves, mu, v_leaf]


@torch.enable_grad()
def _estimate(problem: Problem, z: Tensor, mu: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``ℓ(z) + μᵀ(f(z, v) − z)``, its gradient in v, and how far off it may be.

    It is ``ℓ(z*)`` to second order: off by about the product of both residuals.
    """
    linearized = problem.linearize(v, z, answer_fz=False)
    loss = problem.loss(linearized.output)
    dl_dz = linearized.gradient(loss)
    jz_mu, jv_mu = linearized.vjp(mu)
    r = linearized.fz - z
    value = problem.groups.sum(loss.detach() + (mu * r).sum(1))
    error = problem.groups.sum(row_norm(r) * row_norm(jz_mu + dl_dz - mu))
    return value, linearized.by_v(jv_mu).reshape(v.shape), error


def plain_step(problem: Problem, result: MethodResult, step: Tensor) -> Tensor:
    """α for F, ``(1 or problems, 1)``: ``step``, or with a ball one of the problem's own scale.

    Normalised steps have none. For a solution on the ball that is ``ε / ‖gradient‖``, for one
    inside it the inverse curvature, taken from the way here: ``‖v − v0‖² / 2 (φ(v0) − φ(v))``.

    Args:
        problem: that was solved.
        result: where the method ended.
        step: the method's last one, ``(1 or problems, 1)``.

    Raises:
        ValueError: a step of 0 without a ball.
    """
    radius = problem.feasible.radius
    if radius is None:
        if not bool((step > 0).all()):  # every v would stand still
            raise ValueError("a differentiable solution needs a final_step_size above 0")
        return step
    value, gradient, _ = _estimate(problem, result.z, result.mu, result.v)
    problem.pay_passes(1, 1)
    tiny = torch.finfo(value.dtype).tiny
    size = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    way = (result.v - problem.v_start).square().sum(1, keepdim=True)
    gain = (result.loss_first - value)[:, None]
    curved = torch.where((gain > 0) & (way > 0), way / (2 * gain).clamp(min=tiny), torch.inf)
    return torch.minimum(radius / size.clamp(min=tiny), curved)


def settle(
    problem: Problem, result: MethodResult, step: Tensor, solver: Solver | None = None
) -> MethodResult:
    """Go on from where a method ended with F, accelerated, until all three blocks stand still.

    A problem whose objective that would make worse beyond doubt keeps its end.

    Args:
        problem: that was solved.
        result: where the method ended.
        step: α, ``(1 or problems, 1)``.
        solver: what accelerates. None: Anderson with at most 300 iterations, to 1e-5 (1e-11 in
            float64).

    Returns:
        The record with z, μ and v replaced where they are better.
    """
    blocks = Blocks(problem.groups, result.z.shape[1], result.v.shape[1])
    blocks.measure(result.z, result.mu, result.v)
    joint = JointMap(problem, step)
    if solver is None:
        tol = 1e-11 if result.v.dtype == torch.float64 else 1e-5
        solver = Anderson(max_iter=300, memory=10, tol=tol)

    def flat_joint(flat: Tensor) -> Tensor:
        return blocks.pack(*joint.evaluate(*blocks.unpack(flat)))

    found = iterate(flat_joint, blocks.pack(result.z, result.mu, result.v), solver)
    z, mu, v = blocks.unpack(found.z)
    v = problem.feasible.project(v)  # an accelerated iterate may lie outside of the set
    before, _, error = _estimate(problem, result.z, result.mu, result.v)
    after, _, _ = _estimate(problem, z, mu, v)
    evals = problem.groups.spread(found.evals) + 2
    problem.pay_passes(evals, evals)
    better = after <= before + 1e-3 * before.abs() + _AMPLIFY * error
    better &= torch.isfinite(after)
    rows = problem.groups.spread(better)[:, None]
    return replace(
        result,
        z=torch.where(rows, z, result.z),
        mu=torch.where(rows, mu, result.mu),
        v=torch.where(better[:, None], v, result.v),
        loss_last=torch.where(better, after, result.loss_last),
        mu_error=None if result.mu_error is None else result.mu_error.masked_fill(rows[:, 0], 0.0),
    )


def attach(
    problem: Problem, result: MethodResult, step: Tensor, *, solver: Solver | None = None
) -> tuple[Tensor, Residuals]:
    """The v ``(problems, d)`` as a function of θ, and how accurate its gradient is.

    Args:
        problem: that was solved. Every tensor of θ is taken as its caller gave it.
        result: the solution's v, z and μ.
        step: α, ``(1 or problems, 1)``. It only sets how fast the equation for λ converges.
        solver: for λ. None: :func:`adjoint_solver`.

    Returns:
        v with a graph, and the residuals. Those of the gradient are filled in by its backward pass.
    """
    problem, (z, mu, v) = problem.live(), (result.z, result.mu, result.v)
    fq, leaves = JointMap(problem, step).linearize(z, mu, v)
    blocks = Blocks(problem.groups, z.shape[1], v.shape[1])
    with torch.no_grad():
        moved = [after.detach() - t for after, t in zip(fq, (z, mu, v), strict=True)]
        sizes = zip(blocks.norms(*moved), blocks.norms(z, mu, v), strict=True)
        # of a block that is zero but for rounding, as at an exact fit, all digits are noise
        zero = _NOISE * torch.finfo(v.dtype).eps
        residual = torch.stack([size / scale.clamp(min=zero) for size, scale in sizes]).amax(0)
    residuals = Residuals(residual)
    if not _leads_elsewhere(fq, leaves):
        return v.detach(), residuals
    equation = _Adjoint(blocks, fq, leaves, problem)
    attached: Tensor = _Gate.apply(
        *fq, v.detach(), equation, solver or adjoint_solver(v.dtype), residuals
    )
    return attached, residuals


def graph_of(*tensors: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """All nodes of the tensors' graphs. A leaf is there as its gradient accumulator."""
    edge = torch.autograd.graph.get_gradient_edge
    todo = [edge(t).node for t in tensors if t.requires_grad]
    seen: set[torch.autograd.graph.Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(parent for parent, _ in node.next_functions if parent is not None)


def _leads_elsewhere(fq: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the graph holds a leaf that is none of ``leaves``."""
    own = set(graph_of(*leaves))
    return any(
        node not in own and (getattr(node, "variable", None) is not None or not node.next_functions)
        for node in graph_of(*fq)
    )


class _Adjoint:
    """``λ -> (∂F/∂q)ᵀ λ + (0, 0, g)`` through the graph of one evaluation of F.

    With λ_v = share · λ'_v and the equation for v read as ``λ'_v + residual`` this is the equation
    of F for the step share · α, whose solution is the same: it is cut where α is too long.
    """

    def __init__(
        self, blocks: Blocks, fq: Parts, leaves: Sequence[Tensor], problem: Problem
    ) -> None:
        self.blocks, self.fq, self.leaves, self.rows = blocks, fq, leaves, problem.rows
        self.layers = len(problem.layout.layouts)
        self.live = [t.requires_grad for t in fq]

    def __call__(self, flat: Tensor) -> Tensor:
        z, mu, v = self.blocks.unpack(flat)
        scaled = self.share * v
        grads = torch.autograd.grad(
            list(compress(self.fq, self.live)),
            self.leaves,
            list(compress((z, mu, scaled), self.live)),
            retain_graph=True,
            materialize_grads=True,
        )
        *z_grads, mu_grad, v_grad = grads
        z_grad = torch.cat([t.reshape(self.rows, t[0].numel()) for t in z_grads], dim=1)
        return self.blocks.pack(z_grad.to(mu_grad.dtype), mu_grad, v + v_grad + self.g - scaled)

    def solve(self, g: Tensor, solver: Solver) -> tuple[Parts, FlatSolution]:
        """λ for ``g`` ``(problems, d)``."""
        self.g, self.share = g, torch.ones_like(g[:, :1])
        spent = 0
        for _ in range(_TRIES):
            parts, grows = self._plain_steps()
            spent += _PLAIN
            if not bool(grows.any()):
                break
            self.share = torch.where(grows[:, None], self.share / 3, self.share)
        self.blocks.measure(*parts)
        found = iterate(self, self.blocks.pack(*parts), solver)
        found.evals = found.evals + spent
        z, mu, v = self.blocks.unpack(found.fz)
        return (z, mu, self.share * v), found

    def _plain_steps(self) -> tuple[Parts, Tensor]:
        """λ after a few plain iterations, and where the change in λ_v has grown meanwhile."""
        z, mu, _ = self.fq
        self.blocks.units = None
        flat = self.blocks.pack(torch.zeros_like(z), torch.zeros_like(mu), self.g)
        changes = []
        with torch.no_grad():
            for _ in range(_PLAIN):
                after = self(flat)
                changes.append(row_norm((after - flat)[:, -self.blocks.d :]))
                flat = after
        return self.blocks.unpack(flat), ~(changes[-1] <= 2 * changes[0])


class _Gate(torch.autograd.Function):
    """v, whose backward sends λ into the graph of F, and on to θ."""

    @staticmethod
    def forward(
        ctx: Any,
        z_next: Tensor,
        mu_next: Tensor,
        v_next: Tensor,
        v: Tensor,
        equation: _Adjoint,
        solver: Solver,
        residuals: Residuals,
    ) -> Tensor:
        # attributes, not saved tensors: they are the graph that backward differentiates, and none
        # refers to this node, so nothing is kept alive beyond it
        ctx.equation, ctx.solver, ctx.residuals = equation, solver, residuals
        ctx.counters = open_counters()
        return v.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the solution of a joint optimisation gives first derivatives only, but "
                "create_graph=True asks for a gradient that can be differentiated again"
            )
        (z, mu, v), found = ctx.equation.solve(g, ctx.solver)
        ctx.residuals.adjoint, ctx.residuals.adjoint_evals = found.residual, found.evals
        with counting_into(ctx.counters):
            # one pass through F's graph differentiates f and its VJP: two products a row and layer
            rows = count_rows(ctx.equation.rows, g.device)
            per_row = ctx.equation.blocks.groups.spread(found.evals)
            count(Cost(vjps=2 * ctx.equation.layers * (per_row + 1) * rows))
        worst = float(found.residual.max())
        if not worst <= warn_above(ctx.solver):
            warnings.warn(
                f"the equation for the implicit gradient was solved to a relative residual of "
                f"{worst:.1e} only: the gradient is about as inexact. The optimum may not be "
                "unique (add a proximal term or a penalty on the variables), or give the adjoint "
                "solver more iterations",
                ConvergenceWarning,
                stacklevel=2,
            )
        return z, mu, v, None, None, None, None


def warn_above(solver: Solver | None) -> float:
    """The residual from which a warning is due. One who asked for a loose solver expects its."""
    return max(WARN_ABOVE, min(10 * solver.tol, LOOSEST)) if solver is not None else WARN_ABOVE


def warn_if_loose(
    residuals: Residuals, solver: Solver | None = None, advice: str | None = None
) -> None:
    """Warn when the point is not accurate enough for its implicit gradient.

    Args:
        residuals: of the point.
        solver: that the caller gave for the gradient, or None.
        advice: what to change, of a caller who knows it. None: what mostly helps.
    """
    worst = float(residuals.joint.max())
    if not worst <= warn_above(solver):
        warnings.warn(
            f"the joint solution has a relative residual of {worst:.1e}, and its implicit gradient "
            f"is about as inexact: {advice or _ADVICE}",
            ConvergenceWarning,
            stacklevel=3,
        )
