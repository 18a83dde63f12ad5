"""The judge: values by independent solves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.counting import RowCounter, counting_into
from jiio_plugins.equilibrium.solvers import Anderson, Solver
from jiio_plugins.equilibrium.state import row_norm
from jiio_plugins.solution import Solution, Stats, Status

if TYPE_CHECKING:
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Path

_AGREE = 1e-2  # model's value and tight value further apart than this (relative) disagree


# The start's running loss ℓ is off by about ‖∂ℓ/∂z‖ ‖f(z) − z‖ / (1 − ρ). A result is trusted to be
# better than the start beyond this many times that, plus this share of ℓ; else the start is judged.
_AMPLIFY = 10.0  # or this many times what the verification shows, where that is more


_SLOWER = 3.0


_CLEAR = 0.5


def default_verifier(dtype: torch.dtype) -> Solver:
    """Anderson to a relative residual of 1e-5, in float64 of 1e-9."""
    return Anderson(max_iter=200, tol=1e-9 if dtype == torch.float64 else 1e-5)


def verified(
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
        self,
        v: Tensor,
        value: Tensor,
        model_value: Tensor,
        z: Tensor,
        residual: Tensor,
        converged: Tensor,
        nonfinite: Tensor,
        output: Any,
        model_output: Any,
    ) -> None:
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
        self,
        v: Tensor,
        model_output: Any,
        output: Any,
        z: Tensor,
        residual: Tensor,
        converged: Tensor,
        nonfinite: Tensor,
    ) -> _Verdict:
        with torch.no_grad():
            value = self.problem.groups.sum(self.problem.loss(output))
            model_value = self.problem.groups.sum(self.problem.loss(model_output))
        return _Verdict(
            v, value, model_value, z, residual, converged, nonfinite, output, model_output
        )
