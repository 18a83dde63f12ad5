"""Where a method ended, verified: value and status, and nothing that is worse than the start."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from jiio_plugins.equilibrium.solvers import Anderson, Picard, Solver, check_solver
from jiio_plugins.equilibrium.state import relative, row_norm
from jiio_plugins.joint.adjoint import Adjoint, solve_adjoint
from jiio_plugins.solution import Solution, Stats, Status
from jiio_plugins.verification.candidates import Candidate, Judge, has_rows

if TYPE_CHECKING:
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.records import MethodResult

_AGREE = 1e-2  # model's value and tight value further apart than this (relative) disagree
# Where the relative errors of z and μ come to more than this, the loop's gradient is likely to be
# more than 25 degrees off that of the model. benchmarks/zoo.py counts where this errs.
_UNSETTLED = 0.2
# It is compared with the one that the judged state has there, and where 1 / (1 − ρ) times these
# errors is more than the first of these. Not where they themselves are more than the second.
_DOUBTFUL, _LOST = 0.1, 0.5
# Cosine of two gradients that agree: 23 degrees. The one that was followed is of the v before, and
# has turned since: 21 degrees.
_ALIGNED, _ALIGNED_BEFORE = 0.92, 0.93
_SLOW = 2.5  # least amplification of a slow row
_LAGS = 4.0  # amplification beyond which z lags behind v by more than its residual shows
# The more a residual is amplified, the smaller that of μ must be to tell an angle: up to which
# amplification, and how it is solved there.
_FINE = Anderson(max_iter=60, tol=1e-3)
_ADJOINT = (
    (4.0, Anderson(max_iter=30, tol=2e-2)),
    (15.0, Anderson(max_iter=30, tol=1e-2)),
    (math.inf, _FINE),
)
# The loss ℓ at the start is known to first order, up to ‖J_zᵀμ + ∂ℓ/∂z − μ‖ ‖f(z) − z‖ / (1 − ρ). A
# result is trusted to be better than the start beyond this share of ℓ, this many times the first
# order itself, and this amplification of the rest. Else the start is judged.
_CLEAR = 0.1
_SHIFTED = 3.0
_AMPLIFY = 10.0
_SLOWER = 3.0  # or this many times what the verification shows, where that is more
_NOISE = 100.0  # two answers are two where they are this many times the dtype's epsilon apart


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
        random, spent = _random(problem, final, doubtful)
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
    the gradient that the run's own adjoint yields there compared with the one that follows. Where z
    may have lagged behind, the last gradient that was followed is.

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
    followed = result.followed
    if followed is not None:  # a cell that repels by turning hides its slow rows behind residuals
        least = amplification.clamp(min=_SLOW)
        amplification = torch.where(groups.spread(followed.slow), least, amplification)
    doubtful = (amplification * error > _DOUBTFUL) | astray
    doubtful &= (error <= _LOST) & final.converged
    where = groups.worst(doubtful.float()) > 0
    if not bool(where.any()):
        return astray, none, none
    amplification = groups.worst(amplification)
    found = _exact(problem, result, final, where, amplification)
    right = cosine_similarity(found.gradient, found.first) > _ALIGNED
    if followed is not None:
        lags = followed.near & (followed.slow | (amplification > _LAGS))
        of_before = cosine_similarity(found.gradient, followed.gradient) > _ALIGNED_BEFORE
        right = torch.where(lags, of_before, right)
    wrong = where & ~right
    known = found.converged & doubtful
    return torch.where(known, groups.spread(wrong), astray), found.f_evals, found.vjps


def _exact(
    problem: Problem, result: MethodResult, final: Candidate, where: Tensor, amplification: Tensor
) -> Adjoint:
    """The adjoint at the state that was judged, from the run's own.

    Args:
        problem: that was solved.
        result: where the method ended.
        final: what was judged of that.
        where: problems that it is wanted of, bool ``(problems,)``.
        amplification: see :func:`_amplification`, ``(problems,)``.
    """
    at, found = (problem, result.v, final.z, result.jz_mu), None
    if problem.groups.index is None and has_rows(final.output, problem):
        for most, solver in _ADJOINT:
            some = where & (amplification <= most)
            if not bool(some.any()):
                continue
            where = where & ~some
            once = partial(solve_adjoint, *at, solver, output=final.output)
            part = problem.on_some(once, some.nonzero().squeeze(1))
            if part is None:
                return solve_adjoint(*at, _FINE)
            found = part if found is None else found.joined(part, some)
    return solve_adjoint(*at, _FINE) if found is None else found


def _never_worse(
    judge: Judge, result: MethodResult, final: Candidate, amplification: Tensor
) -> Candidate:
    """The end, or where that is better the best iterate, the surest one or the start."""
    problem, groups = judge.problem, judge.problem.groups
    amplified = _SLOWER * amplification
    # a better candidate is looked for only where the running losses make one plausible
    last = final.value if result.bounded else result.loss_last
    promising = result.loss_best < last - 0.02 * last.abs()
    final = judge.take_better(final, result.v_best, promising)
    # z may have gone over to a fixed point that the model does not find, or finds only at times
    sure = result.loss_sure
    promising = ~(final.sure_value <= sure + 0.02 * sure.abs()) & (sure < torch.inf)
    final = judge.take_better(final, result.v_sure, promising, surely=True)
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


def _random(problem: Problem, final: Candidate, doubtful: Tensor) -> tuple[Tensor, Tensor]:
    """Problems whose answer is another one at a second call, and what it costs to see that.

    Those in doubt are asked. If one of them is, all are.

    Args:
        problem: whose model is called.
        final: what was judged.
        doubtful: problems whose values may be random ones, bool ``(problems,)``.

    Returns:
        Bool ``(problems,)``, and evaluations of f, ``(rows,)``.
    """
    spent: Tensor | float = 0.0
    if problem.groups.index is None and has_rows(final.output, problem):
        ask = partial(_answers_differ, problem, final)
        found = problem.on_some(ask, doubtful.nonzero().squeeze(1))
        if found is not None:
            random, spent = found
            if bool(doubtful.all()) or not bool(random.any()):
                return random, spent
    random, of_all = _answers_differ(problem, final)
    return random, spent + of_all


def _answers_differ(
    problem: Problem, final: Candidate, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Call the model twice, and once more at the state that was judged.

    A call solves nothing. Two begin at the initial state, each with one evaluation of f. A third is
    to say once more what has been said of the state that was judged: a head that draws random
    numbers need not show at an initial state of 0.

    Args:
        problem: whose model is called.
        final: what was judged.
        rows: indices of the rows to call it on. None: all.

    Returns:
        Whether a problem has two answers, bool ``(problems,)``, and evaluations of f, ``(rows of
        the batch,)``. Of other rows both are 0.
    """
    once, z = Picard(max_iter=1), final.z if rows is None else final.z[rows]
    with torch.no_grad():
        calls = [problem.solve(final.v, once, rows=rows) for _ in range(2)]
        again = problem.solve(final.v, once, z, rows)
        said = again.output
        if rows is not None:  # an objective is of all rows
            said = final.output.index_copy(0, rows, said)
        losses = [problem.loss(output) for output in (final.output, said)]
    if rows is not None:
        losses = [loss[rows] for loss in losses]
    # beside 1: the one nearest to 0 may be of another batch, and be all rounding
    values = [torch.stack((loss, torch.ones_like(loss)), dim=1) for loss in losses]
    differ, spent = torch.zeros(2, len(z), device=z.device)
    pairs = ([c.z for c in calls], [c.fz for c in calls], values)
    for one, two in pairs:
        far = row_norm(two - one) > _NOISE * torch.finfo(one.dtype).eps * row_norm(one)
        differ = differ + far
    spent = spent + calls[0].evals + calls[1].evals + again.evals
    if rows is not None:
        differ, spent = (t.new_zeros(problem.rows).index_copy(0, rows, t) for t in (differ, spent))
    return problem.groups.worst(differ) > 0, spent


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
