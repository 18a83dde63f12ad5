"""The judge: values by independent solves, never from the state that an optimisation ended in.

Where an optimisation ends, z has not settled, and the loss that it saw there may be far off. So its
end is only a candidate. A :class:`Judge` evaluates it twice: by the solver that the model carries,
as a user of ``model(x)`` would, and by a tight solve that no method had a part in. :func:`verified`
makes a :class:`jiio_plugins.Solution` of that. It judges the best iterate and the start as well
where they may be better, so that nothing returned is worse than its start. What did not converge,
and where the two solves disagree, is a status.

Statuses and their remedies are in :mod:`jiio_plugins.solution`. Methods are judged here for
:func:`jiio_plugins.optimize_input`, attacks of any library for
:func:`jiio_plugins.evaluation.robust_accuracy`.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jiio_plugins.equilibrium.counting import Cost, RowCounter, count, counting_into
from jiio_plugins.equilibrium.solvers import Anderson, Picard, Solver, check_solver
from jiio_plugins.equilibrium.state import relative, row_norm
from jiio_plugins.joint.adjoint import solve_adjoint
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from jiio_plugins.losses import attack_objective
from jiio_plugins.solution import Solution, Stats, Status
from jiio_plugins.utils.trees import map_leaves

if TYPE_CHECKING:
    from jiio_plugins.joint.problem import Solved
    from jiio_plugins.methods.base import MethodResult

_AGREE = 1e-2  # model's value and tight value further apart than this (relative) disagree
# Where the relative errors of z and μ come to more than this, the loop's gradient is likely to be
# more than 25 degrees off that of the model. benchmarks/zoo.py counts where this errs.
_UNSETTLED = 0.2
# It is compared with the one that the judged state has where 1 / (1 − ρ) times these errors is more
# than this, and they themselves are no more than the second.
_DOUBTFUL, _LOST = 0.1, 0.5
_ALIGNED = 0.92  # cosine of an angle of 23 degrees
_ADJOINT = Anderson(max_iter=30, tol=1e-2)
# The loss ℓ at the start is known to first order, up to ‖J_zᵀμ + ∂ℓ/∂z − μ‖ ‖f(z) − z‖ / (1 − ρ). A
# result is trusted to be better than the start beyond this share of ℓ, this many times the first
# order itself, and this amplification of the rest. Else the start is judged.
_CLEAR = 0.1
_SHIFTED = 3.0
_AMPLIFY = 10.0
_SLOWER = 3.0  # or this many times what the verification shows, where that is more
_NOISE = 100.0  # two answers are two where they are this many times the dtype's epsilon apart


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
            :attr:`jiio_plugins.joint.problem.Solved.amplification`.
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
        if _has_rows(base.output, self.problem):
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

    def take_better(self, best: Candidate, v: Tensor, where: Tensor) -> Candidate:
        """The better of two candidates, problem by problem.

        Args:
            best: the verdict so far.
            v: the other candidate, ``(problems, d)``.
            where: problems for which it is tried, bool ``(problems,)``.
        """
        if not bool(where.any()):
            return best
        other = self.some(v, where, best)
        finite = torch.isfinite(best.value), torch.isfinite(other.value)
        better = where & ((other.value < best.value) | (~finite[0] & finite[1]))
        rows = self.problem.groups.spread(better)
        chosen = {}
        for name in vars(best):
            ours, theirs = getattr(best, name), getattr(other, name)
            if name not in ("output", "model_output"):
                choice = better if name in ("v", "value", "model_value") else rows
            elif _has_rows(best.output, self.problem):
                choice = rows
            else:
                chosen[name] = ours
                continue
            chosen[name] = torch.where(choice.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)
        found = Candidate(**chosen)
        if bool(better.any()) and self.problem.whole:
            return self.everything(found.v)  # rows of two batches may influence each other
        if bool(better.any()) and not _has_rows(best.output, self.problem):
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


def _has_rows(output: Any, problem: Problem) -> bool:
    """Whether what the model returned is one tensor with a row per row of the batch."""
    return isinstance(output, Tensor) and output.ndim > 0 and len(output) == problem.rows


def _nan(t: Tensor) -> Tensor:
    return torch.full_like(t, torch.nan) if t.is_floating_point() else t


def _by_row(own: Solved, tight: Solved) -> dict[str, Any]:
    """What a verdict has of each row."""
    names = ("z", "residual", "converged", "nonfinite", "output")
    found = {name: getattr(tight, name) for name in names}
    return {**found, "model_z": own.z, "model_output": own.output}


def verified(problem: Problem, result: MethodResult, verifier: Solver) -> tuple[Solution, Tensor]:
    """Judge where a method ended, and fall back where another point was better.

    Args:
        problem: that was solved.
        result: where the method ended.
        verifier: of the independent solves.

    Returns:
        The solution, and its v ``(problems, d)``.
    """
    judge, v_start = Judge(problem, verifier), problem.v_start
    begin = time.perf_counter()
    final = judge.everything(result.v)
    verification, model_f_evals = judge.f_evals.clone(), judge.model_f_evals
    amplification = _amplification(problem, result, judge.amplification, final.z)
    off = relative(final.z - result.z, final.z)
    astray, f_evals, vjps = _led_astray(problem, result, final, off, amplification)
    seconds = time.perf_counter() - begin
    final = _never_worse(judge, result, final, amplification)
    problem.pay(f_evals=judge.f_evals - verification)
    verification += f_evals
    status = _status(problem, final, astray)
    doubtful = (status == Status.NOT_VERIFIED) | (status == Status.DISAGREEMENT)
    doubtful |= problem.groups.worst((off > _UNSETTLED).float()) > 0
    if bool(doubtful.any()):
        random, spent = _random(problem, final)
        status[random & (status != Status.NONFINITE)] = Status.RANDOM
        verification += spent
    status[((final.v == v_start).all(1)) & (status == Status.CONVERGED)] = Status.NO_IMPROVEMENT
    stats = Stats(
        f_evals=problem.f_evals,
        vjps=problem.vjps,
        iterations=result.iterations,
        z_residual=final.residual,
        costate_residual=result.mu_residual,
        verification_f_evals=verification,
        verification_vjps=vjps,
        verification_seconds=seconds,
        model_f_evals=model_f_evals,
        model_value=final.model_value,
        model_output=final.model_output,
    )
    solution = Solution(
        x=problem.variable.unflatten(final.v),
        z=problem.layout.unpack(final.z),
        costate=problem.layout.unpack(result.mu),
        value=final.value,
        status=status,
        stats=stats,
        output=final.output,
    )
    return solution, final.v


def unverified(problem: Problem, result: MethodResult) -> Solution:
    """Where a method ended, as it is. No values, as nobody has checked any.

    Args:
        problem: what was optimised.
        result: where the method ended.
    """
    finite = torch.isfinite(result.loss_last)
    finite &= problem.groups.worst((~torch.isfinite(row_norm(result.z))).float()) == 0
    status = torch.full_like(result.loss_last, Status.UNVERIFIED, dtype=torch.int8)
    stats = Stats(
        f_evals=problem.f_evals,
        vjps=problem.vjps,
        iterations=result.iterations,
        z_residual=result.z_residual,
        costate_residual=result.mu_residual,
        verification_f_evals=torch.zeros_like(problem.f_evals),
        verification_vjps=torch.zeros_like(problem.f_evals),
    )
    return Solution(
        x=problem.variable.unflatten(result.v),
        z=problem.layout.unpack(result.z),
        costate=problem.layout.unpack(result.mu),
        value=None,
        status=status.masked_fill(~finite, Status.NONFINITE),
        stats=stats,
    )


def check_verify(verify: object) -> None:
    """Raise unless it is True, False, None or a solver.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(verify, bool):
        check_solver(verify, "verify")


def _led_astray(
    problem: Problem, result: MethodResult, final: Candidate, off: Tensor, amplification: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in which the search did not follow the gradient of the model, and what that cost to see.

    Where residuals leave a doubt, the adjoint equation is solved at the state that was judged, and
    the gradient that the run's own adjoint yields there compared with the one that follows.

    Args:
        problem: that was solved.
        result: where the method ended.
        final: what was judged of that.
        off: relative error of its state, ``(rows,)``.
        amplification: see :func:`_amplification`.

    Returns:
        Bool ``(rows,)``, evaluations of f and VJPs.
    """
    none, groups = torch.zeros_like(problem.f_evals), problem.groups
    error = off if result.mu_error is None else off + result.mu_error
    astray = ~(error <= _UNSETTLED)  # NaN is no gradient to trust
    # without a ball a gradient has a length; in train mode another pass draws another mask
    if problem.feasible.radius is None or problem.variable.repeatable:
        return astray, none, none
    doubtful = (amplification * error > _DOUBTFUL) & (error <= _LOST) & (off <= _UNSETTLED)
    doubtful &= final.converged
    where = groups.worst(doubtful.float()) > 0
    if not bool(where.any()):
        return astray, none, none
    at, found = (problem, result.v, final.z, result.jz_mu, _ADJOINT), None
    if groups.index is None and _has_rows(final.output, problem):
        found = problem.on_some(
            lambda rows: solve_adjoint(*at, rows=rows, output=final.output),
            where.nonzero().squeeze(1),
        )
    if found is None:
        found = solve_adjoint(*at)
    wrong = where & ~(cosine_similarity(found.gradient, found.first) > _ALIGNED)
    known = found.converged & doubtful
    return torch.where(known, groups.spread(wrong), astray), found.f_evals, found.vjps


def _never_worse(
    judge: Judge, result: MethodResult, final: Candidate, amplification: Tensor
) -> Candidate:
    """The end, or where that is better the best iterate or the start."""
    problem, groups = judge.problem, judge.problem.groups
    amplified = _SLOWER * amplification
    # a better candidate is looked for only where the running losses make one plausible
    last = final.value if result.bounded else result.loss_last
    promising = result.loss_best < last - 0.02 * last.abs()
    final = judge.take_better(final, result.v_best, promising)
    amplified = groups.worst(amplified.clamp(min=_AMPLIFY))
    error = _CLEAR * result.loss_first.abs() + _SHIFTED * result.shift_first
    error = error + amplified * result.error_first
    unsafe = ~(final.value < result.loss_first - error)
    unsafe &= (final.v != problem.v_start).any(1)
    return judge.take_better(final, problem.v_start, unsafe)


def _status(problem: Problem, final: Candidate, astray: Tensor) -> Tensor:
    """How far the values can be trusted, then whether the search was one, ``(problems,)``.

    Args:
        problem: whose objective counts.
        final: the verdict.
        astray: rows in which the search did not follow the gradient of the model, ``(rows,)``.
    """
    worst = problem.groups.worst
    status = torch.full_like(final.value, Status.CONVERGED, dtype=torch.int8)
    status[worst(astray.float()) > 0] = Status.GRADIENT_UNSETTLED
    gap = (final.value - final.model_value).abs()
    status[~(gap <= _AGREE * (1 + final.value.abs()))] = Status.DISAGREEMENT  # NaN too
    status[worst((~final.converged).float()) > 0] = Status.NOT_VERIFIED
    broken = worst(final.nonfinite.float()) > 0
    status[broken | ~torch.isfinite(final.value)] = Status.NONFINITE
    return status


def _random(problem: Problem, final: Candidate) -> tuple[Tensor, Tensor]:
    """Problems whose answer is another one at a second call, and what it costs to see that.

    A call solves nothing. Two begin at the initial state, each with one evaluation of f. A third is
    to say once more what has been said of the state that was judged: a head that draws random
    numbers need not show at an initial state of 0.

    Args:
        problem: whose model is called.
        final: what was judged.

    Returns:
        Bool ``(problems,)``, and evaluations of f, ``(rows,)``.
    """
    once = Picard(max_iter=1)
    with torch.no_grad():
        calls = [problem.solve(final.v, once) for _ in range(2)]
        again = problem.solve(final.v, once, final.z)
        losses = [problem.loss(output) for output in (final.output, again.output)]
    # beside 1: the one nearest to 0 may be of another batch, and be all rounding
    values = [torch.stack((loss, torch.ones_like(loss)), dim=1) for loss in losses]
    differ = torch.zeros(problem.rows, device=final.v.device)
    pairs = ([c.z for c in calls], [c.fz for c in calls], values)
    for one, two in pairs:
        far = row_norm(two - one) > _NOISE * torch.finfo(one.dtype).eps * row_norm(one)
        differ = differ + far
    return problem.groups.worst(differ) > 0, calls[0].evals + calls[1].evals + again.evals


def _amplification(problem: Problem, result: MethodResult, found: Tensor, solved: Tensor) -> Tensor:
    """About ``1 / (1 − ρ)``: how far a residual leaves z from where it settles, ``(rows,)``.

    The verification went on from the model's own solution to ``solved``, which showed ``found``.
    Where the model's was as tight (0), an evaluation of f at the end of the run tells.
    """
    rows = (found == 0).nonzero().squeeze(1)
    if not len(rows) or not result.z.shape[1]:
        return found
    z = result.z[rows]
    fz = problem.on_some(lambda some: problem.evaluate(result.v, result.z[some], some), rows)
    if fz is None:  # as in train mode, where fewer rows would draw another mask
        fz = problem.evaluate(result.v, result.z)[rows]
    problem.pay_passes(torch.zeros(problem.rows, device=z.device).index_fill(0, rows, 1.0))
    eps, tiny = torch.finfo(z.dtype).eps, torch.finfo(z.dtype).tiny
    parts = (problem.layout.split(t) for t in (solved[rows] - z, fz - z, fz))
    # a residual at the dtype's precision is noise
    ratios = [
        row_norm(error) / (row_norm(residual) + _NOISE * eps * row_norm(f)).clamp(min=tiny)
        for error, residual, f in zip(*parts, strict=True)
    ]
    return found.index_copy(0, rows, torch.stack(ratios).amax(0).to(found.dtype))


@dataclass(frozen=True)
class Verdict:
    """What two solves say of some samples, ``(rows,)`` each.

    Attributes:
        model_wrong: by the model's own answer, the solver it carries.
        tight_wrong: by the independent solve.
        converged: whether that solve reached its tolerance, with a finite answer.
        loss: cross-entropy by the independent solve.
        model_loss: cross-entropy by the model.
        residual: ``‖f(z) − z‖ / ‖f(z)‖`` of the state that the model itself stops at.
        tight_residual: the same of the state of the independent solve.
    """

    model_wrong: Tensor
    tight_wrong: Tensor
    converged: Tensor
    loss: Tensor
    model_loss: Tensor
    residual: Tensor
    tight_residual: Tensor

    @property
    def broken(self) -> Tensor:
        """Wrong by both, and verified."""
        return self.model_wrong & self.tight_wrong & self.converged

    @property
    def doubtful(self) -> Tensor:
        """Wrong by either, but not verified: it may or may not break its sample."""
        return (self.model_wrong | self.tight_wrong) & ~self.converged

    @property
    def differ(self) -> Tensor:
        """Samples whose two losses are more than 1 % (and 0.01) apart, or classes differ."""
        gap = (self.loss - self.model_loss).abs()
        far = ~(gap <= 1e-2 * (1 + self.loss.abs()))
        return far | (self.model_wrong != self.tight_wrong)

    @classmethod
    def join(cls, parts: list[Verdict]) -> Verdict:
        """Batches -> one."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor, verify: Solver) -> Verdict:
    """The model's own answer, and that of a solve from the layers' initial state.

    Args:
        model: returns logits ``(rows, classes)``.
        x: images ``(rows, ...)``.
        y: true classes, integers ``(rows,)``.
        verify: solver of that solve.

    Raises:
        ValueError: no equilibrium layer, logits of another shape, labels out of range.
    """
    problem = Problem(Variable(model, x), attack_objective("cross-entropy", y))
    judging = Judge(problem, verify, warm=False)
    found = judging.everything(problem.v_start)
    count(Cost(verification_f_evals=judging.f_evals))
    f, own = problem.evaluate(found.v, found.model_z), found.model_output
    finite = torch.isfinite(found.output).all(1)
    return Verdict(
        (own.argmax(1) != y) | ~torch.isfinite(own).all(1),  # NaN is no right answer
        (found.output.argmax(1) != y) | ~finite,
        found.converged & finite,
        -found.value,
        -found.model_value,
        relative(f - found.model_z, f),
        found.residual,
    )
