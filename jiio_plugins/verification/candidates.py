"""The judge: two independent solves of one candidate, and what they say of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.counting import RowCounter, counting_into
from jiio_plugins.equilibrium.solvers import Anderson, Solver
from jiio_plugins.utils.trees import map_leaves

if TYPE_CHECKING:
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.joint.solved import Solved


def default_verifier(dtype: torch.dtype) -> Solver:
    """Anderson to a relative residual of 1e-5; 1e-9 in float64, 4 roundings in half."""
    tol = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    return Anderson(max_iter=200, tol=tol)


@dataclass
class Candidate:
    """What two solves say of one candidate v per problem.

    Attributes:
        v: ``(problems, d)``.
        value: the objective by the independent solve, ``(problems,)``.
        model_value: by the model's own answer, ``(problems,)``.
        z: state of the independent solve, ``(rows, n)``.
        model_z: state that the model itself stops at, ``(rows, n)``.
        residual: ``‖f(z) − z‖ / ‖f(z)‖`` of the independent solve, ``(rows,)``.
        converged: whether that solve reached its tolerance, bool ``(rows,)``.
        nonfinite: whether it met NaN or Inf, bool ``(rows,)``.
        output: the model's, by the independent solve.
        model_output: by its own.
    """

    v: Tensor
    value: Tensor
    model_value: Tensor
    z: Tensor
    model_z: Tensor
    residual: Tensor
    converged: Tensor
    nonfinite: Tensor
    output: Any
    model_output: Any

    @property
    def sure_value(self) -> Tensor:
        """The worse of the two values, which both solves promise, ``(problems,)``."""
        return torch.maximum(self.value, self.model_value)


class Judge:
    """Evaluates candidates with the model's own solver, and by an independent solve.

    Args:
        problem: whose objective counts.
        verifier: of the independent solve.
        warm: start that one where the model's own ended. Otherwise it starts from the layers'
            initial state.

    Attributes:
        f_evals: what judging has cost so far, ``(rows,)``.
        model_f_evals: what the model's own solver took of that, in the last judgement of all
            problems, ``(rows,)``.
        amplification: of the last judgement of all problems, ``(rows,)``, see
            :attr:`jiio_plugins.joint.solved.Solved.amplification`.
    """

    amplification: Tensor
    model_f_evals: Tensor

    def __init__(self, problem: Problem, verifier: Solver, *, warm: bool = True) -> None:
        self.problem, self.verifier, self.warm = problem, verifier, warm
        self.f_evals = torch.zeros(problem.rows, device=problem.v_start.device)

    def everything(self, v: Tensor) -> Candidate:
        """The verdict on v ``(problems, d)``, for all problems."""
        before = self.f_evals
        own, tight, self.f_evals = self._solve(v, before)
        self.model_f_evals = self.f_evals - before - tight.evals
        self.amplification = tight.amplification
        return self._verdict(v, _by_row(own, tight))

    def some(self, v: Tensor, where: Tensor, base: Candidate) -> Candidate:
        """Judge some of the problems. The other rows are taken from what is known.

        Where what the model returns has no rows, all of them are judged.

        Args:
            v: the candidate, ``(problems, d)``.
            where: problems to judge, bool ``(problems,)``.
            base: what is known, of all rows.
        """
        rows = self.problem.groups.spread(where).nonzero().squeeze(1)
        found = None
        if has_rows(base.output, self.problem):
            found = self.problem.on_some(
                lambda some: self._solve(v, self.f_evals[some], some), rows
            )
        if found is None:
            return self.everything(v)
        own, tight, spent = found
        self.f_evals = self.f_evals.index_copy(0, rows, spent)
        parts = _by_row(own, tight).items()
        return self._verdict(v, {k: getattr(base, k).index_copy(0, rows, t) for k, t in parts})

    def _solve(
        self, v: Tensor, spent: Tensor, rows: Tensor | None = None
    ) -> tuple[Solved, Solved, Tensor]:
        """The model's own answer, the independent one, and what has been spent by then."""
        problem = self.problem
        failed: Exception | None = None
        with counting_into((counter := RowCounter(spent),)):
            try:
                own = problem.solve(v, rows=rows)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                failed = error
        start = own.z if self.warm and failed is None else None
        tight = problem.solve(v, self.verifier, start, rows)
        if failed is not None:
            warnings.warn(
                f"the model's own solver failed at the input that was found ({failed}). What the "
                "model itself says there is NaN, and the independent solve is from scratch",
                stacklevel=2,
            )
            own = tight._replace(output=map_leaves(tight.output, Tensor, _nan))
        return own, tight, counter.f_evals_by_row + tight.evals

    def take_better(
        self, best: Candidate, v: Tensor, where: Tensor, *, surely: bool = False
    ) -> Candidate:
        """The better of two candidates, problem by problem.

        Args:
            best: the verdict so far.
            v: the other candidate, ``(problems, d)``.
            where: problems for which it is tried, bool ``(problems,)``.
            surely: compare what both solves promise, not what the independent one finds.
        """
        if not bool(where.any()):
            return best
        other = self.some(v, where, best)
        ours, theirs = (c.sure_value if surely else c.value for c in (best, other))
        better = where & ((theirs < ours) | (~torch.isfinite(ours) & torch.isfinite(theirs)))
        rows = self.problem.groups.spread(better)
        chosen = {}
        for name in vars(best):
            ours, theirs = getattr(best, name), getattr(other, name)
            if name not in ("output", "model_output"):
                choice = better if name in ("v", "value", "model_value") else rows
            elif has_rows(best.output, self.problem):
                choice = rows
            else:
                chosen[name] = ours
                continue
            chosen[name] = torch.where(choice.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)
        found = Candidate(**chosen)
        if bool(better.any()) and self.problem.whole:
            return self.everything(found.v)  # rows of two batches may influence each other
        if bool(better.any()) and not has_rows(best.output, self.problem):
            mixed = self.everything(found.v)  # only the model can put together what it returns
            found.output, found.model_output = mixed.output, mixed.model_output
        return found

    def _verdict(self, v: Tensor, by_row: dict[str, Any]) -> Candidate:
        with torch.no_grad():
            value, model_value = (
                self.problem.groups.sum(self.problem.loss(by_row[name]))
                for name in ("output", "model_output")
            )
        return Candidate(v=v, value=value, model_value=model_value, **by_row)


def has_rows(output: Any, problem: Problem) -> bool:
    """Whether what the model returned is one tensor with a row per row of the batch."""
    return isinstance(output, Tensor) and output.ndim > 0 and len(output) == problem.rows


def _nan(t: Tensor) -> Tensor:
    return torch.full_like(t, torch.nan) if t.is_floating_point() else t


def _by_row(own: Solved, tight: Solved) -> dict[str, Any]:
    """What a verdict has of each row."""
    names = ("z", "residual", "converged", "nonfinite", "output")
    found = {name: getattr(tight, name) for name in names}
    return {**found, "model_z": own.z, "model_output": own.output}
