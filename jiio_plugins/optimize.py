"""``optimize_input``: check, run a method, verify what it found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.counting import Cost, count, counting_into
from jiio_plugins.equilibrium.solvers import Solver
from jiio_plugins.implicit import attach, plain_step, settle, warn_if_loose
from jiio_plugins.joint.inputs import check_gradients_possible, problem_of
from jiio_plugins.methods.base import solve
from jiio_plugins.methods.joint import check_method
from jiio_plugins.solution import Solution, Stats
from jiio_plugins.verification import check_verify, default_verifier, unverified, verified

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.constraints import Constraint
    from jiio_plugins.joint.problem import Objective, Problem
    from jiio_plugins.methods.base import Method
    from jiio_plugins.methods.records import Callback, MethodResult, Stop


def optimize_input(
    model: nn.Module,
    x: Tensor,
    objective: Objective,
    *,
    given: Sequence[Tensor] = (),
    method: Method | None = None,
    constraint: Constraint | None = None,
    variables: Sequence[str] | None = None,
    groups: Tensor | None = None,
    differentiable: bool | Solver = False,
    verify: bool | Solver | None = None,
    training_mode: bool = False,
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Minimise ``objective(model(x))`` over the input of a model with equilibrium layers.

    ``min_x ℓ(h(z*))  s.t.  z* = f(z*, x),  x ∈ C``, each row of the batch by itself.

    Args:
        model: any module whose forward reaches at least one :class:`jiio_plugins.Equilibrium`. It
            is called as ``model(x, *given)``, and nothing of it is changed.
        x: where to start, ``(rows, ...)``, floating point, finite.
        objective: ``objective(output) -> (rows,)``, minimised. To attack, give minus the loss.
        given: what else the model takes, tensors ``(rows, ...)``: a condition, a mask. They stand
            still.
        method: :class:`Joint` (default) or :class:`Nested`.
        constraint: an :class:`L2Ball`, :class:`LinfBall`, :class:`L1Ball`, :class:`Box` or
            :class:`Intersection`. A ball's centre is x unless it names another. None: no bounds.
        variables: names of the model's parameters to optimise instead of x. The model keeps its
            own, the result has the optimised ones.
        groups: with ``variables``: which problem each row belongs to, integers ``0 … P−1``,
            ``(rows,)``. None: all rows share one. With P > 1 a parameter needs a leading dimension
            of 1 that the model broadcasts over rows. What is kept of each is as large as of the
            largest, so give problems of about the same size.
        differentiable: attach ``x`` of the result to every tensor requiring grad that model,
            objective or constraint uses, closures included (a ball's default centre is x itself).
            This is implicit differentiation of the whole joint fixed point
            (:mod:`jiio_plugins.implicit`), for first derivatives only. It needs plain gradient
            steps to settle. The result is refined until they do, and a warning says when they do
            not. A solver instead of True refines the result and solves the equation of the
            gradient. One with fewer iterations and a larger ``tol`` makes a cheaper, less exact
            gradient. Warnings then begin at ten times its ``tol``, or at 0.5.
        verify: solver of the final check, started from the model's own solution. None or True:
            Anderson with relative tolerance 1e-5 (1e-9 in float64, four roundings in half
            precision). False: leave the check out, for callers who judge x themselves. The last
            iterate is then returned, which may be worse than the start. ``value`` and ``output``
            are None, and the status is ``Status.UNVERIFIED``.
        training_mode: leave the model's train/eval flags as they are. By default it is in eval mode
            while the loop runs. Dropout keeps one mask for the whole call.
        stop: ``stop(output) -> (rows,)`` booleans. A problem for which it holds four evaluations in
            a row is finished early.
        callback: called with a :class:`jiio_plugins.methods.Progress` after every step.

    Returns:
        A :class:`Solution`. ``value`` and ``output`` come from an independent solve at the returned
        x, never from the state the loop ended in. ``stats.model_value`` is what ``model(x)`` itself
        says. No verified problem is worse than its start by ``value``: where the running loss there
        leaves a doubt, the start is judged too. ``x`` is in the constraint set.

    Raises:
        TypeError, ValueError: bad input. The message says what was given and what is accepted.
        RuntimeError: called in inference mode.

    Not for: models in which rows influence each other (batch statistics), and objectives that need
    the output of all rows at once. Nor for cells that hardly contract (``1 − ρ`` below about 1e-3),
    where a small residual does not mean that z has settled.

    Example:
        >>> from jiio_plugins import L2Ball
        >>> solution = optimize_input(model, x, lambda out: -out[:, 7], constraint=L2Ball(0.5))
        >>> model(x)[:, 7].tolist()  # how much the images look like a seven
        [-5.6, -6.0, -3.4, 10.1]
        >>> model(solution.x)[:, 7].tolist()
        [-0.6, 1.8, 3.2, 13.1]

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021).
    """
    check_verify(verify)
    if not isinstance(differentiable, (bool, Solver)):
        raise TypeError(
            f"differentiable must be True, False, or a solver such as Anderson(...), got "
            f"{differentiable!r}"
        )
    method = check_method(method)
    check_gradients_possible("optimize_input")
    problem = problem_of(
        model,
        x,
        objective,
        constraint=constraint,
        given=given,
        variables=variables,
        groups=groups,
        training_mode=training_mode,
    )
    if not problem.rows:
        return _empty(x)
    implicit = differentiable if isinstance(differentiable, Solver) else None
    result = solve(problem, method, stop=stop, callback=callback)
    with torch.enable_grad(), problem.variable.guarded(), counting_into(()):
        if differentiable:
            final_step = method.steps(problem.feasible, problem.v_start)[-1]
            step = plain_step(problem, result, final_step)
            result = settle(problem, result, step, implicit)
        if verify is False:
            solution, v = unverified(problem, result), result.v
        else:
            verifier = verify if isinstance(verify, Solver) else default_verifier(x.dtype)
            solution, v = verified(problem, result, verifier)
    if differentiable:
        solution = _attached(problem, replace(result, v=v), step, solution, implicit)
    stats = solution.stats
    assert stats.verification_f_evals is not None
    assert stats.verification_vjps is not None
    verifying = stats.verification_f_evals, stats.verification_vjps, stats.verification_seconds
    count(Cost(stats.f_evals, stats.vjps, *verifying), stats.z_residual, stats.costate_residual)
    return solution


def _attached(
    problem: Problem, result: MethodResult, step: Tensor, solution: Solution, solver: Solver | None
) -> Solution:
    """The solution with x as a differentiable function of all that it was computed from."""
    with torch.enable_grad(), problem.variable.guarded(freeze=False):
        v, residuals = attach(problem, result, step, solver=solver)
    warn_if_loose(residuals, solver)
    problem.pay_passes(1, 1)
    stats = replace(solution.stats, implicit=residuals, f_evals=problem.f_evals, vjps=problem.vjps)
    return replace(solution, x=problem.variable.unflatten(v), stats=stats)


def _empty(x: Tensor) -> Solution:
    none = x.new_zeros(0)
    status = torch.zeros(0, dtype=torch.int8, device=x.device)
    stats = Stats(none, none, none, none, none, none, none, model_value=none)
    return Solution(x.detach().clone(), None, None, none, status, stats)
