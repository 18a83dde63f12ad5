"""``optimize_input``: check, run a method, verify what it found."""

from __future__ import annotations

import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jiio_plugins._counting import RowCounter, count, counting_into
from jiio_plugins._problem import (
    Objective,
    ParameterVariable,
    Problem,
    Variable,
    buffers_kept,
    same_randomness,
)
from jiio_plugins._state import ordinary, row_norm
from jiio_plugins.constraints import Constraint, FeasibleSet
from jiio_plugins.equilibrium import EquilibriumLayer
from jiio_plugins.implicit import attach, plain_step, settle, warn_if_loose
from jiio_plugins.methods import Callback, Joint, Method, Path, Stop
from jiio_plugins.solution import Solution, Stats, Status
from jiio_plugins.solvers import Anderson, Solver, check_solver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_AGREE = 1e-2  # model's value and tight value further apart than this (relative) disagree
# The start's running loss ℓ is off by about ‖∂ℓ/∂z‖ ‖f(z) − z‖ / (1 − ρ). A result is trusted to be
# better than the start beyond this many times that, plus this share of ℓ; else the start is judged.
_AMPLIFY = 10.0  # or this many times what the verification shows, where that is more
_SLOWER = 3.0
_CLEAR = 0.5


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
    verify: Solver | None = None,
    training_mode: bool = False,
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Minimise ``objective(model(x))`` over the input of a model with equilibrium layers.

    ``min_x ℓ(h(z*))  s.t.  z* = f(z*, x),  x ∈ C``, each row of the batch by itself.

    Args:
        model: any module whose forward reaches at least one :class:`jiio_plugins.Equilibrium`.
            It is called as ``model(x, *given)``; nothing of it is changed.
        x: where to start, ``(batch, ...)``, floating point, finite.
        objective: ``objective(output) -> (batch,)``, minimised; to attack, give minus the loss.
        given: what else the model takes, tensors ``(batch, ...)``: a condition, a mask. They stand
            still.
        method: :class:`Joint` (default) or :class:`Nested`.
        constraint: an :class:`L2Ball`, :class:`LinfBall`, :class:`L1Ball`, :class:`Box` or
            :class:`Intersection`. A ball's centre is x unless it names another.
        variables: names of the model's parameters to optimise instead of x; the model keeps its
            own, the result has the optimised ones.
        groups: with ``variables``: which problem each row belongs to, ``(batch,)`` integers
            ``0 … P−1``; None: all rows share one. With P > 1 a parameter needs a leading dimension
            of 1 that the model broadcasts over rows. What is kept of each is as large as of the
            largest, so give problems of about the same size.
        differentiable: attach ``x`` of the result to every tensor requiring grad that model,
            objective or constraint uses, closures included (a ball's default centre is x itself),
            by implicit differentiation of the whole joint fixed point
            (:mod:`jiio_plugins.implicit`). It needs plain gradient steps to settle: the result is
            refined until they do, and a warning says when they do not. First derivatives only. A
            solver instead of True refines the result and solves the equation of the gradient: one
            with fewer iterations and a larger ``tol`` makes a cheaper, less exact gradient, and
            warnings begin at ten times its ``tol``, or at 0.5.
        verify: solver of the final check, started from the model's own solution; None: Anderson
            with relative tolerance 1e-5 (1e-9 in float64).
        training_mode: leave the model's train/eval flags as they are (default: eval mode while the
            loop runs). Dropout keeps one mask for the whole call.
        stop: ``stop(output) -> (batch,)`` booleans; a problem for which it holds four evaluations
            in a row is finished early.
        callback: called with a :class:`jiio_plugins.methods.Progress` after every step.

    Returns:
        A :class:`Solution`. ``value`` and ``output`` come from an independent solve at the returned
        x, never from the state the loop ended in; ``stats.model_value`` is what ``model(x)`` itself
        says. No problem is worse than its start by ``value``: where the running loss there leaves
        a doubt, the start is judged too. ``x`` is in the constraint set.

    Raises:
        TypeError, ValueError: bad input; the message says what was given and what is accepted.

    Not for: models in which rows influence each other (batch statistics), objectives that need the
    output of all rows at once, and cells that hardly contract (``1 − ρ`` below about 1e-3), where a
    small residual does not mean that z has settled.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021).
    """
    check_solver(verify, "verify")
    if not isinstance(differentiable, (bool, Solver)):
        raise TypeError(
            f"differentiable must be True, False, or a solver such as Anderson(...), got "
            f"{differentiable!r}"
        )
    method, constraint = check_method(method), check_constraint(constraint)
    model = unwrap(model)
    check_gradients_possible("optimize_input")
    x = check_input(x)
    if isinstance(variables, str):
        raise TypeError(f"variables must be a list of names, got the string {variables!r}")
    implicit = differentiable if isinstance(differentiable, Solver) else None
    given = _check_given(given, len(x))
    still = [t.detach() for t in given]  # no graph of theirs in every iteration
    if groups is not None:
        groups = _check_groups(groups, variables, len(x))
    if not len(x):
        return _empty(x)
    variable = (
        Variable(model, x, still)
        if variables is None
        else ParameterVariable(model, x, list(variables), groups, still)
    )
    start = variable.start
    flat = start.reshape(len(start), -1).clone()  # a search may end in its start
    with torch.no_grad():
        feasible = FeasibleSet(flat) if constraint is None else constraint.bind(start).detach()
    v = feasible.project(flat)
    problem = Problem(variable, objective, len(x), splits=not training_mode)
    problem.starts_at(v)
    # the problem keeps the costs per row; what its layers report one by one would count twice
    with torch.enable_grad(), undisturbed(model, training_mode, variable), counting_into(()):
        path = method.run(problem, feasible, v, stop, callback)
        if differentiable:
            step = plain_step(problem, feasible, v, path, method.steps(feasible, v)[-1])
            path = settle(problem, feasible, step, path, implicit)
        solution, flat = _verified(problem, path, v, verify or _default_verifier(v.dtype))
    if differentiable:
        variable.given = given
        with torch.enable_grad(), undisturbed(model, training_mode, variable, frozen=False):
            live = feasible if constraint is None else constraint.bind(variable.origin)
            solution = _attached(problem, live, step, replace(path, v=flat), solution, implicit)
    count(
        f_evals=problem.f_evals,
        vjps=problem.vjps,
        residual=solution.stats.z_residual,
        verification=solution.stats.verification_f_evals,
        verification_seconds=solution.stats.verification_seconds,
    )
    return solution


def _attached(
    problem: Problem, feasible: FeasibleSet, step: Tensor, path: Path, solution: Solution,
    solver: Solver | None,
) -> Solution:  # fmt: skip
    """The solution with x as a differentiable function of all that it was computed from."""
    v, residuals = attach(problem, feasible, step, path.z, path.mu, path.v, solver=solver)
    warn_if_loose(residuals, solver)
    problem.pay_passes(1, 1)
    stats = replace(solution.stats, implicit=residuals, f_evals=problem.f_evals, vjps=problem.vjps)
    return replace(solution, x=problem.variable.unflatten(v), stats=stats)


def _default_verifier(dtype: torch.dtype) -> Solver:
    return Anderson(max_iter=200, tol=1e-9 if dtype == torch.float64 else 1e-5)


def check_method(method: Method | None, name: str = "method") -> Method:
    """The method, :class:`Joint` for None; TypeError for anything else."""
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"{name} must be Joint(...) or Nested(...), got {method!r}")
    return method if method is not None else Joint()


def check_constraint(constraint: Constraint | None) -> Constraint | None:
    """The constraint; TypeError for anything else."""
    if constraint is not None and not isinstance(constraint, Constraint):
        raise TypeError(
            "constraint must be an L2Ball, LinfBall, L1Ball, Box or Intersection, "
            f"got {type(constraint).__name__}"
        )
    return constraint


def unwrap(model: nn.Module) -> nn.Module:
    """The module whose forward the loop calls: without DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise TypeError(
            "DataParallel splits the batch over threads, which the joint loop cannot follow: pass "
            "model.module, or use DistributedDataParallel"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module  # the loop needs no gradient hooks
        return inner
    return model


def check_gradients_possible(name: str) -> None:
    """Raise in inference mode."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} needs gradients, which torch.inference_mode() forbids: call it outside "
            "(torch.no_grad() is no hindrance)"
        )


def check_input(x: Tensor, name: str = "x") -> Tensor:
    """``x``, raise unless it is finite, batch first and floating point."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be one tensor, got {type(x).__name__}; several inputs go in as one, "
            "flattened and concatenated, and a wrapper of the model splits them"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {x.dtype}: convert it with {name}.float()"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} must be batch first, (batch, ...), got shape {tuple(x.shape)}")
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = int((~finite.reshape(len(x), -1).all(1)).nonzero()[0])
        raise ValueError(f"{name} holds NaN or Inf (first in sample {bad}): clean the input")
    return ordinary(x)


def _check_given(given: Any, rows: int) -> tuple[Tensor, ...]:
    if not isinstance(given, (tuple, list)) or not all(isinstance(t, Tensor) for t in given):
        raise TypeError(
            f"given must be a tuple or list of tensors, model(x, *given), got {given!r}"
        )
    for t in given:
        if t.shape[:1] != (rows,):
            raise ValueError(
                f"each tensor of given must have a row per sample, ({rows}, ...), got "
                f"{tuple(t.shape)}: expand what is the same for all"
            )
    return tuple(ordinary(t) for t in given)


def _check_groups(groups: Tensor, variables: Sequence[str] | None, rows: int) -> Tensor:
    if variables is None:
        raise ValueError("groups= says which rows share a variable: it needs variables=")
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups must be a tensor of integers, got {type(groups).__name__}")
    dtype = groups.dtype
    if groups.shape != (rows,) or dtype.is_floating_point or dtype == torch.bool:
        raise ValueError(
            f"groups must hold one integer per row, shape ({rows},), got {dtype} "
            f"{tuple(groups.shape)}"
        )
    seen = groups.unique()
    if not torch.equal(seen, torch.arange(len(seen), device=groups.device, dtype=seen.dtype)):
        raise ValueError(f"groups must be numbered 0 … P−1 without gaps, got {seen.tolist()}")
    return groups.long()


def _empty(x: Tensor) -> Solution:
    none = x.new_zeros(0)
    status = torch.zeros(0, dtype=torch.int8, device=x.device)
    stats = Stats(none, none, none, none, none, none, model_value=none)
    return Solution(x.detach().clone(), None, None, none, status, stats)


@contextmanager
def undisturbed(
    model: nn.Module, training_mode: bool, variable: Variable, *, frozen: bool = True
) -> Iterator[None]:
    """Run with eval mode and constant parameters; put everything back, also after an exception.

    Threads that share a model take turns: its flags and buffers are one for all.
    """
    with turn_of(model), _changed_back(model, training_mode, variable, frozen):
        yield


_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def turn_of(model: nn.Module) -> threading.RLock:
    """The lock of a model: of its first equilibrium layer, which wrappers of it share."""
    layers = (module for module in model.modules() if isinstance(module, EquilibriumLayer))
    with _TURNS_LOCK:
        return _TURNS.setdefault(next(layers, model), threading.RLock())


@contextmanager
def _changed_back(
    model: nn.Module, training_mode: bool, variable: Variable, frozen: bool
) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    constants = [p for p in model.parameters() if p.requires_grad] if frozen else []
    call, call_rows = variable.call, variable.call_rows
    if training_mode:
        if any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()
        ):
            warnings.warn(
                "training_mode=True with BatchNorm in train mode: its batch statistics couple the "
                "samples, so results depend on what else is in the batch",
                stacklevel=6,
            )
        # setting instance attributes shadows the methods for this call only
        variable.call = same_randomness(call)  # type: ignore[method-assign]
        variable.call_rows = same_randomness(call_rows)  # type: ignore[method-assign]
    else:
        model.eval()
    for p in constants:
        p.requires_grad_(False)
    try:
        with buffers_kept(model):
            yield
    finally:
        for p in constants:
            p.requires_grad_(True)
        for module, training in flags:
            module.training = training


def _verified(
    problem: Problem, path: Path, v_start: Tensor, verifier: Solver
) -> tuple[Solution, Tensor]:
    """Judge the end of ``path`` by independent solves; fall back where another point was better.

    The flat v of the solution comes with it.
    """
    groups, v = problem.groups, path.v
    judge = _Judge(problem, verifier)
    begin = time.perf_counter()
    final = judge.everything(v)
    seconds = time.perf_counter() - begin
    verification = judge.f_evals.clone()
    amplified = _SLOWER * _amplification(problem, path, judge.amplification, final.z)

    # a better candidate is looked for only where the running losses make one plausible
    last = final.value if path.bounded else path.loss_last
    promising = path.loss_best < last - 0.02 * last.abs()
    final.take_better(judge, path.v_best, promising)
    amplified = groups.worst(amplified.clamp(min=_AMPLIFY))
    doubt = _CLEAR * path.loss_first.abs() + amplified * path.doubt_first
    unsafe = ~(final.value < path.loss_first - doubt)
    unsafe &= (final.v != v_start).any(1)
    final.take_better(judge, v_start, unsafe)
    problem.pay(f_evals=judge.f_evals - verification)

    status = torch.full_like(final.value, Status.CONVERGED, dtype=torch.int8)
    status[(final.v == v_start).all(1)] = Status.NO_IMPROVEMENT
    gap = (final.value - final.model_value).abs()
    status[gap > _AGREE * (1 + final.value.abs())] = Status.DISAGREEMENT
    status[groups.worst((~final.converged).float()) > 0] = Status.NOT_VERIFIED
    broken = groups.worst(final.nonfinite.float()) > 0
    status[broken | ~torch.isfinite(final.value)] = Status.NONFINITE
    stats = Stats(
        f_evals=problem.f_evals,
        vjps=problem.vjps,
        iterations=path.iterations,
        z_residual=final.residual,
        costate_residual=path.mu_residual,
        verification_f_evals=verification,
        verification_seconds=seconds,
        model_value=final.model_value,
        model_output=final.model_output,
    )
    assert problem.layout is not None
    solution = Solution(
        x=problem.variable.unflatten(final.v),
        z=problem.layout.unpack(final.z),
        costate=problem.layout.unpack(path.mu),
        value=final.value,
        status=status,
        stats=stats,
        output=final.output,
    )
    return solution, final.v


def _amplification(problem: Problem, path: Path, found: Tensor, solved: Tensor) -> Tensor:
    """About ``1 / (1 − ρ)``: how far a residual leaves z from where it settles, ``(rows,)``.

    The verification went on from the model's own solution to ``solved``, and ``found`` that; where
    the model's was as tight (0), an evaluation of f at the end of the path tells.
    """
    rows = (found == 0).nonzero().squeeze(1)
    if not len(rows) or not path.z.shape[1]:
        return found
    assert problem.layout is not None
    z = path.z[rows]
    if problem.splits:
        image = problem.evaluate(path.v, z, rows)
    else:  # in train mode fewer rows would draw another mask
        image = problem.evaluate(path.v, path.z)[rows]
    problem.pay_passes(torch.zeros_like(problem.f_evals).index_fill(0, rows, 1.0))
    tiny = torch.finfo(z.dtype).tiny
    parts = (problem.layout.split(t) for t in (solved[rows] - z, image - z))
    pairs = zip(*parts, strict=True)
    ratios = [row_norm(error) / row_norm(residual).clamp(min=tiny) for error, residual in pairs]
    return found.index_copy(0, rows, torch.stack(ratios).amax(0).to(found.dtype))


class _Verdict:
    """Verified values of one candidate per problem; outputs and states per row."""

    def __init__(
        self, v: Tensor, value: Tensor, model_value: Tensor, z: Tensor, residual: Tensor,
        converged: Tensor, nonfinite: Tensor, output: Any, model_output: Any,
    ) -> None:  # fmt: skip
        self.v, self.value, self.model_value = v, value, model_value
        self.z, self.residual = z, residual
        self.converged, self.nonfinite = converged, nonfinite
        self.output, self.model_output = output, model_output

    def take_better(self, judge: _Judge, v: Tensor, where: Tensor) -> None:
        """Judge the candidate ``v`` for the problems ``where``; keep it where it is better."""
        problems = where.nonzero().squeeze(1)
        if not len(problems):
            return
        other = judge.some(v, where, self)
        better = where & (
            (other.value < self.value) | (~torch.isfinite(self.value) & torch.isfinite(other.value))
        )
        rows = judge.problem.groups.spread(better)
        self.v = torch.where(better[:, None], v, self.v)
        for name in ("value", "model_value"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))
        for name in ("residual", "converged", "nonfinite"):
            setattr(self, name, torch.where(rows, getattr(other, name), getattr(self, name)))
        self.z = torch.where(rows[:, None], other.z, self.z)
        if judge.by_row(self.output):
            shape = (-1, *[1] * (self.output.ndim - 1))
            for name in ("output", "model_output"):
                chosen = torch.where(rows.reshape(shape), getattr(other, name), getattr(self, name))
                setattr(self, name, chosen)
        elif bool(better.any()):  # only the model can put together what it returns
            mixed = judge.everything(self.v)
            self.output, self.model_output = mixed.output, mixed.model_output


class _Judge:
    """Evaluates candidates with the model's own solver, then on to the verifier's tolerance."""

    def __init__(self, problem: Problem, verifier: Solver) -> None:
        self.problem, self.verifier = problem, verifier
        self.f_evals = torch.zeros_like(problem.f_evals)

    def by_row(self, output: Any) -> bool:
        """Whether what the model returned is one tensor with a row per row of the batch."""
        rows = self.problem.rows
        return isinstance(output, Tensor) and output.ndim > 0 and len(output) == rows

    def everything(self, v: Tensor) -> _Verdict:
        """All problems."""
        with counting_into((counter := RowCounter(self.f_evals),)):
            own = self.problem.solve(v)
        tight = self.problem.solve(v, self.verifier, own.z)
        self.f_evals = counter.f_evals_by_row + tight.evals
        self.amplification = tight.amplification
        return self._verdict(
            v, own.output, tight.output, tight.z, tight.residual, tight.converged, tight.nonfinite
        )

    def some(self, v: Tensor, where: Tensor, base: _Verdict) -> _Verdict:
        """The problems ``where``; the other rows are taken from ``base``."""
        rows = self.problem.groups.spread(where).nonzero().squeeze(1)
        if not self.by_row(base.output) or not self.problem.splits:
            return self.everything(v)
        with counting_into((counter := RowCounter(self.f_evals[rows]),)):
            own = self.problem.solve(v, rows=rows)
        tight = self.problem.solve(v, self.verifier, own.z, rows=rows)
        self.f_evals = self.f_evals.index_copy(0, rows, counter.f_evals_by_row + tight.evals)
        return self._verdict(
            v,
            base.model_output.index_copy(0, rows, own.output),
            base.output.index_copy(0, rows, tight.output),
            base.z.index_copy(0, rows, tight.z),
            base.residual.index_copy(0, rows, tight.residual),
            base.converged.index_copy(0, rows, tight.converged),
            base.nonfinite.index_copy(0, rows, tight.nonfinite),
        )

    def _verdict(
        self, v: Tensor, model_output: Any, output: Any, z: Tensor, residual: Tensor,
        converged: Tensor, nonfinite: Tensor,
    ) -> _Verdict:  # fmt: skip
        with torch.no_grad():
            value = self.problem.groups.sum(self.problem.loss(output))
            model_value = self.problem.groups.sum(self.problem.loss(model_output))
        return _Verdict(
            v, value, model_value, z, residual, converged, nonfinite, output, model_output
        )
