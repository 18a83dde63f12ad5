"""Adversarial attacks on classifiers: labels, norms and restarts on top of ``optimize_input``.

The adapters of ART and torchattacks call :func:`attack`. They only translate their toolkit's words.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.counting import Cost, count, counting_into
from jiio_plugins.equilibrium.layer import is_one_problem, wants_whole_batch
from jiio_plugins.equilibrium.solvers import Solver
from jiio_plugins.equilibrium.some_rows import REFUSALS, warn_of_refusal
from jiio_plugins.joint.inputs import check_input, problem_of
from jiio_plugins.losses import attack_objective, hit
from jiio_plugins.methods.joint import check_method
from jiio_plugins.optimize import optimize_input
from jiio_plugins.solution import Solution, Stats, Status
from jiio_plugins.threat_model import ThreatModel
from jiio_plugins.utils.checks import is_count, outside_inference
from jiio_plugins.utils.trees import map_leaves
from jiio_plugins.verification import Judge, default_verifier

if TYPE_CHECKING:
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.losses import Loss
    from jiio_plugins.methods.base import Method
    from jiio_plugins.methods.records import Callback


def attack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    norm: float,
    eps: float | Tensor,
    loss: Loss = "cross-entropy",
    targeted: bool = False,
    lower: float | Tensor | None = None,
    upper: float | Tensor | None = None,
    mask: Tensor | None = None,
    random_starts: int = 0,
    generator: torch.Generator | None = None,
    early_stop: bool = False,
    method: Method | None = None,
    retry: Method | None = None,
    verify: bool | Solver | None = None,
    training_mode: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """Adversarial examples ``max_x L(model(x), y)  s.t.  ‖x − x₀‖_p ≤ ε,  lower ≤ x ≤ upper``.

    Args:
        model: returns logits ``(rows, classes)``. It has an equilibrium layer.
        x: images ``(rows, ...)``, inside the box.
        labels: integers ``(rows,)``: the true classes, or with ``targeted`` the wanted ones.
        norm: 1, 2 or inf.
        eps: ε in the units of x, a number or one per sample, ``(rows,)``.
        loss: "cross-entropy", "dlr" (difference of logits ratio) or "margin".
        targeted: minimise the loss of ``labels`` instead of maximising it.
        lower: least pixel value, a number or broadcastable to x. None: no bound.
        upper: largest pixel value, likewise.
        mask: broadcastable to x. Entries where it is 0 or False keep their value. None: all may
            change.
        random_starts: 0: start at x. k: up to k random starts in the ball, the best kept per
            sample. A sample that has succeeded is not started again.
        generator: of the random starts. None: a fixed seed, so that the call is deterministic.
        early_stop: stop a sample once it has been adversarial for four evaluations in a row.
        method: :class:`Joint` (default) or :class:`Nested`.
        retry: a longer method, run once more from x on the samples that have not succeeded. Where
            these are few it costs little. A short run for all and a long one for the few reaches
            further than one of their mean length. None: there is no second run.
        verify: solver of the final check, or False to leave it out, see :func:`optimize_input`.
            Several random starts and a retry need it.
        training_mode: leave the model's train/eval flags as they are.
        callback: called with a :class:`jiio_plugins.methods.Progress` after every step.

    Returns:
        A :class:`Solution` whose ``value`` is the negative loss (the loss with ``targeted``).
        :func:`is_adversarial` tells success. Costs add up over restarts and the retry. Verification
        then decides which samples go on, so it counts among ``f_evals``.

    Raises:
        TypeError, ValueError: bad input.
        RuntimeError: called in inference mode.

    Example:
        >>> solution = attack(model, x, y, norm=2, eps=0.3, lower=0, upper=1)
        >>> is_adversarial(solution, y)
        tensor([ True, False, False, False])

    Source: Gurumurthy et al. (NeurIPS 2021), section 4.3. DLR: Croce and Hein (ICML 2020), eq. 6
    and 7.
    """
    threat = ThreatModel(norm=norm, eps=eps, lower=lower, upper=upper, mask=mask)
    if not is_count(random_starts, 0):
        raise ValueError(f"random_starts must be an integer, not negative, got {random_starts!r}")
    x = check_input(x)
    attack_objective(loss, labels, targeted)  # its errors first
    if len(labels) != len(x):
        raise ValueError(f"labels must hold one class per sample ({len(x)}), got {len(labels)}")
    if isinstance(model, nn.Module) and is_one_problem(model):
        raise ValueError(
            "a layer has batch_dim=None, so x is one problem, where an attack has one for each "
            "label: use optimize_input with an objective of one value, such as "
            "attack_objective(...)(output).sum().reshape(1), or whole_batch=True in its place"
        )
    labels = outside_inference(labels)
    feasible = threat.around(x).bind(x)  # its errors first, also for an empty batch
    numbers = not any(isinstance(t, Tensor) for t in (eps, lower, upper))
    if numbers and threat.norm == math.inf and threat.span < float(eps):
        warnings.warn(
            f"eps is {float(eps):g} where the box is {threat.span:g} wide, so that every image in "
            "it is allowed. 8 of 255 levels are eps=8/255 where pixels go from 0 to 1",
            stacklevel=2,
        )

    def draw() -> Tensor:
        return feasible.sample(generator).reshape(x.shape)

    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    attempts = [(draw, method)] * random_starts or [(lambda: x, method)]
    if retry is not None:
        attempts.append((lambda: x, check_method(retry, "retry")))
    chosen = len(attempts) > 1  # by what verification says of the attempt before
    if chosen and verify is False:
        raise ValueError(
            "verify=False leaves nothing to choose between attempts by: use at most one random "
            "start and no retry, or let verify be None or a solver"
        )

    def search(start: Tensor, how: Method | None, rows: Tensor | None = None) -> Solution:
        wanted = labels if rows is None else labels[rows]
        found = optimize_input(
            model,
            start if rows is None else start[rows],
            attack_objective(loss, wanted, targeted),
            method=how if rows is None or how is None else how.restrict(rows),
            constraint=feasible if rows is None else feasible.restrict(rows),
            verify=verify,
            training_mode=training_mode,
            stop=(lambda output: hit(output, wanted, targeted)) if early_stop else None,
            callback=callback,
        )
        return _with_verification_paid(found) if chosen else found

    if not len(x):
        return search(x, method)
    (start, how), *later = attempts
    best = search(start(), how)
    whole = wants_whole_batch(model)
    for start, how in later:
        drawn = start()
        rows = (~is_adversarial(best, labels, targeted)).nonzero().squeeze(1)
        if not len(rows):
            break
        found = None
        if not whole:
            try:
                found = search(drawn, how, rows)
            except REFUSALS as error:  # what has been found so far must not be lost for that
                warn_of_refusal("the model", error, stacklevel=2)
                whole = True
        if found is None:
            found = _of_rows(search(drawn, how), rows)
        best = _better(best, found, rows, labels, targeted)
        if whole:
            objective = attack_objective(loss, labels, targeted)
            assert isinstance(best.x, Tensor)
            problem = problem_of(model, best.x, objective, training_mode=training_mode)
            best = _judged_together(problem, best, verify)
    return best


def _of_rows(found: Solution, rows: Tensor) -> Solution:
    """Some rows of a solution."""

    def some(t: Tensor) -> Tensor:
        return t[rows]

    stats = map_leaves(found.stats, Tensor, some)
    parts = {f.name: map_leaves(getattr(found, f.name), Tensor, some) for f in fields(found)}
    return replace(found, **{**parts, "stats": stats})


def _judged_together(problem: Problem, best: Solution, verify: bool | Solver | None) -> Solution:
    """The solution, whose rows come from several batches, by what the model says of them in one.

    Args:
        problem: at the x of the solution.
        best: the solution.
        verify: of the attack.
    """
    v = problem.v_start
    judge = Judge(problem, verify if isinstance(verify, Solver) else default_verifier(v.dtype))
    with problem.variable.guarded(), counting_into(()):
        found = judge.everything(v)
    count(Cost(f_evals=judge.f_evals))
    status = best.status.masked_fill(~found.converged, Status.NOT_VERIFIED)
    stats = replace(
        best.stats,
        f_evals=best.stats.f_evals + judge.f_evals,
        z_residual=found.residual,
        model_value=found.model_value,
        model_output=found.model_output,
    )
    return replace(
        best,
        z=problem.layout.unpack(found.z),
        value=found.value,
        output=found.output,
        status=status.masked_fill(~torch.isfinite(found.value), Status.NONFINITE),
        stats=stats,
    )


def _with_verification_paid(found: Solution) -> Solution:
    """The solution with its verification among the costs of the search."""
    stats = found.stats
    f_evals, vjps = stats.verification_f_evals, stats.verification_vjps
    assert f_evals is not None  # there are samples
    assert vjps is not None
    count(Cost(f_evals, vjps, -f_evals, -vjps, -stats.verification_seconds))
    paid = replace(
        stats,
        f_evals=stats.f_evals + f_evals,
        vjps=stats.vjps + vjps,
        verification_f_evals=torch.zeros_like(f_evals),
        verification_vjps=torch.zeros_like(vjps),
        verification_seconds=0.0,
    )
    return replace(found, stats=paid)


def is_adversarial(solution: Solution, labels: Tensor, targeted: bool = False) -> Tensor:
    """Samples that succeed by ``model(x)`` itself and by the tight solve too, bool ``(rows,)``.

    Args:
        solution: of :func:`attack`.
        labels: integers ``(rows,)``: the true classes, or with ``targeted`` the wanted ones.
        targeted: whether the attack was.

    Raises:
        ValueError: the solution was found with ``verify=False``.
    """
    if solution.output is None and len(solution.status):
        raise ValueError(
            "the solution was found with verify=False, so nobody has checked it: judge "
            "model(solution.x), or let verify be None or a solver"
        )
    tight = hit(solution.output, labels, targeted)
    return tight & hit(solution.stats.model_output, labels, targeted)


def _better(old: Solution, new: Solution, rows: Tensor, labels: Tensor, targeted: bool) -> Solution:
    """``old`` with the samples ``rows`` replaced where ``new`` (those samples alone) is better.

    Success is better than none, then the lower value. Costs add up.
    """
    assert old.value is not None
    assert new.value is not None
    # these rows of old have not succeeded
    take = is_adversarial(new, labels[rows], targeted) | (new.value < old.value[rows])
    to, source = rows[take], take.nonzero().squeeze(1)

    def put(into: Any, values: Any) -> Any:
        if isinstance(into, Tensor):
            # a run may end with a state in more than half precision, or not
            return into.index_copy(0, to, values[source].to(into.dtype))
        if into is None:
            return None
        return tuple(put(a, b) for a, b in zip(into, values, strict=True))

    def add(total: Any, more: Any) -> Any:
        return total.index_add(0, rows, more) if isinstance(total, Tensor) else total + more

    spent = {"iterations", *Cost._fields}
    stats = {
        f.name: (add if f.name in spent else put)(
            getattr(old.stats, f.name), getattr(new.stats, f.name)
        )
        for f in fields(Stats)
    }
    names = ("x", "z", "costate", "value", "status", "output")
    merged = {n: put(getattr(old, n), getattr(new, n)) for n in names}
    return replace(old, stats=Stats(**stats), **merged)
