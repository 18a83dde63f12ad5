"""Training through a joint solution: the loop without its verification, and its gradient.

A model trained against an optimised input (adversarial training), or to let an optimised input fit
(a generator and its latents), needs ``d/dθ min_x ℓ(h(z*))``. By the envelope theorem the minimiser
x is held constant. Where the joint loop ends its z and μ are there already. So the gradient is one
more VJP, of ``ℓ(h(z)) + μᵀf(z, x)`` with respect to θ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.counting import count
from jiio_plugins.equilibrium.mode import layer_mode
from jiio_plugins.equilibrium.solvers import Anderson, Solver
from jiio_plugins.joint.inputs import check_gradients_possible, check_input, problem_of
from jiio_plugins.joint.modes import EnvelopeMode
from jiio_plugins.joint.problem import FlatState
from jiio_plugins.methods.base import solve
from jiio_plugins.methods.joint import check_method
from jiio_plugins.utils.checks import is_count

if TYPE_CHECKING:
    from jiio_plugins.constraints import Constraint
    from jiio_plugins.joint.problem import Objective
    from jiio_plugins.methods.base import Method
    from jiio_plugins.methods.records import Callback, Stop

Reduction = Literal["mean", "sum", "none"]
Refine = int | tuple[int, int] | Solver


@dataclass(frozen=True)
class JointSolution:
    """Where the joint loop ended, not verified.

    Attributes:
        x: the optimised input, in the constraint set.
        z: the state there, as the cell has it. Of several layers, a tuple over them.
        costate: the adjoint μ in the layout of ``z``, from before the last step on x.
        loss: running objective at the last iterate that was evaluated, ``(rows,)``.
        z_residual: ``‖f(z) − z‖ / ‖f(z)‖`` there, ``(rows,)``.
        costate_residual: the same of the adjoint equation, ``(rows,)``.
        iterations: of the loop, ``(rows,)``.
        f_evals: evaluations of f, ``(rows,)``.
        vjps: vector-Jacobian products, ``(rows,)``.
        flat: z and μ as the engine keeps them.
    """

    x: Tensor
    z: Any
    costate: Any
    loss: Tensor
    z_residual: Tensor
    costate_residual: Tensor
    iterations: Tensor
    f_evals: Tensor
    vjps: Tensor
    flat: FlatState = field(repr=False)


def joint_solution(
    model: nn.Module,
    x: Tensor,
    objective: Objective,
    *,
    method: Method | None = None,
    constraint: Constraint | None = None,
    start: Tensor | JointSolution | None = None,
    state: FlatState | None = None,
    training_mode: bool = False,
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> JointSolution:
    """``min_x ℓ(h(z*))  s.t.  z* = f(z*, x),  x ∈ C`` as in training: the loop alone.

    :func:`jiio_plugins.optimize_input` judges its result by independent solves, which cost more
    than the loop. A training step needs no judgement. There x is only a hard example, and
    :func:`envelope_loss` makes the gradient from the z and μ that the loop ended with.

    Args:
        model: any module whose forward reaches an equilibrium layer. DistributedDataParallel is
            unwrapped.
        x: its input, ``(rows, ...)``. It is a ball's centre unless the ball names another.
        objective: ``objective(output) -> (rows,)``, minimised. To attack, give minus the loss.
        method: :class:`jiio_plugins.Joint` (default) or :class:`jiio_plugins.Nested`.
        constraint: see :func:`jiio_plugins.optimize_input`. None: no bounds.
        start: where x starts, shaped like x, projected on the set. None: at x. Of an earlier
            :class:`JointSolution` of the same rows x, z and μ are carried on.
        state: where z and μ start, such as ``solution.flat`` of the same rows. None: where
            ``start`` has them, or from scratch.
        training_mode: leave the model's train/eval flags as they are.
        stop: ``stop(output) -> (rows,)`` booleans. A sample for which it holds four evaluations in
            a row is finished early.
        callback: called with a :class:`jiio_plugins.methods.Progress` after every step.

    Returns:
        A :class:`JointSolution`, the last iterate.

    Raises:
        TypeError, ValueError: bad input.
        RuntimeError: called in inference mode.

    Not for: judging robustness, or anything else that reports the loss it reached.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), sections 3.2 and 3.3.
    """
    method = check_method(method)
    check_gradients_possible("joint_solution")
    problem = problem_of(
        model,
        x,
        objective,
        constraint=constraint,
        start=_start(check_input(x), start),
        state=start.flat if state is None and isinstance(start, JointSolution) else state,
        training_mode=training_mode,
    )
    if not problem.rows:
        raise ValueError("x holds no samples: a training step needs at least one")
    result = solve(problem, method, stop=stop, callback=callback)
    count(problem.cost, result.z_residual, result.mu_residual)
    z, mu, jz_mu = result.z.detach(), result.mu.detach(), result.jz_mu.detach()
    return JointSolution(
        x=problem.variable.unflatten(result.v),
        z=problem.layout.unpack(z),
        costate=problem.layout.unpack(mu),
        loss=result.loss_last,
        z_residual=result.z_residual,
        costate_residual=result.mu_residual,
        iterations=result.iterations,
        f_evals=problem.f_evals,
        vjps=problem.vjps,
        flat=FlatState(problem.layout, z, mu, jz_mu),
    )


def _start(x: Tensor, start: Tensor | JointSolution | None) -> Tensor | None:
    if start is None:
        return None
    tensor = start.x if isinstance(start, JointSolution) else start
    if not isinstance(tensor, Tensor):
        raise TypeError(f"start must be a tensor or a JointSolution, got {type(tensor).__name__}")
    tensor = check_input(tensor, "start")
    if tensor.shape != x.shape:
        raise ValueError(
            f"start must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}"
        )
    return tensor.detach().to(x)


def envelope_loss(
    model: nn.Module,
    solution: JointSolution,
    objective: Objective,
    *,
    refine: Refine = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The optimised objective as a differentiable function of the model's parameters.

    ``∇_θ min_x ℓ = ∂ℓ/∂θ + μᵀ ∂f/∂θ`` at the solution's (z, x), both held constant. Here μ takes
    one step ``μ = J_zᵀμ + ∂ℓ/∂z`` on from the loop's, and the state the head sees is ``f(z, x)``.
    That is one evaluation of f and one VJP.

    The result is an ordinary tensor: take its negative (the attacker minimises minus the loss),
    scale it, add to it, call ``backward()``. Whatever else ``objective`` uses that requires grad
    gets its gradient too.

    Args:
        model: called as ``model(solution.x)``, train/eval flags as they are. Give the
            DistributedDataParallel (or other) wrapper here, so that it sees the pass.
        solution: of :func:`joint_solution` for this model.
        objective: the one that was minimised, ``objective(output) -> (rows,)``.
        refine: further steps on z before the pass and on μ in its backward, at most so many of
            each, warm-started at the solution's. A pair is ``(on z, on μ)``, a solver takes them
            itself. A model with several equilibrium layers takes one step on μ at least.
        reduction: "mean", "sum" or "none" over the rows.

    Returns:
        A scalar, or ``(rows,)`` with "none".

    Raises:
        TypeError, ValueError: bad input.

    Not for: second derivatives, and gradients with respect to x.

    Source: envelope (Danskin's) theorem. Gurumurthy et al. (NeurIPS 2021), section 3.3.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    value, _, _ = envelope_pass(model, solution, objective, refine=refine)
    if reduction == "none":
        return value
    return value.mean() if reduction == "mean" else value.sum()


def envelope_pass(
    model: nn.Module, solution: JointSolution, objective: Objective, *, refine: Refine = 0
) -> tuple[Tensor, Any, Tensor | None]:
    """The pass of :func:`envelope_loss`, with all that it saw.

    Args:
        model: see :func:`envelope_loss`.
        solution: of :func:`joint_solution` for this model.
        objective: the one that was minimised, ``objective(output) -> (rows,)``.
        refine: see :func:`envelope_loss`.

    Returns:
        The loss, ``(rows,)``, the model's output, and the relative residual of z after the
        refinement, ``(rows,)``, or None without one.

    Raises:
        TypeError, ValueError: bad input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(solution, JointSolution):
        raise TypeError(
            f"solution must come from joint_solution(...), got {type(solution).__name__}"
        )
    flat = solution.flat
    assert flat.mu is not None
    assert flat.jz_mu is not None
    mode = EnvelopeMode(
        flat.layout.split(flat.z),
        flat.layout.split(flat.mu),
        flat.layout.split(flat.jz_mu),
        refiner(refine, flat.z.dtype),
    )
    with layer_mode(mode):
        output = model(solution.x)
    rows = len(flat.z)
    problem_value = objective(output)
    if not isinstance(problem_value, Tensor) or problem_value.shape != (rows,):
        got = getattr(problem_value, "shape", type(problem_value).__name__)
        raise ValueError(
            f"objective(output) must return one value per row, shape ({rows},), got {got}"
        )
    mode.watch(problem_value)
    return problem_value, output, mode.residual


def refiner(refine: Refine, dtype: torch.dtype) -> tuple[Solver | None, Solver | None]:
    """The solvers on z and on μ that ``refine=`` stands for. None stands for no steps.

    Args:
        refine: a number of steps, a pair of them (on z, on μ), or a solver.
        dtype: of the state, which sets the tolerance.

    Raises:
        ValueError: anything else, or negative numbers.
    """
    if isinstance(refine, Solver):
        return refine, refine
    steps: Any = refine if isinstance(refine, tuple | list) else (refine, refine)
    if len(steps) != 2 or not all(is_count(n, 0) for n in steps):
        raise ValueError(
            "refine must be a number of steps >= 0, a pair of them (on z, on μ) or a solver, got "
            f"{refine!r}"
        )
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    of_state, of_adjoint = (Anderson(max_iter=int(n), tol=tol) if n else None for n in steps)
    return of_state, of_adjoint
