"""``check(model, x)``: what a model is like, before anything is run on it.

Each measurement relies on nothing but the joint mode. What cannot be measured is said, and the rest
goes on.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jiio_plugins import plots
from jiio_plugins.equilibrium.adjoints import Implicit
from jiio_plugins.equilibrium.counting import Counter, RowCounter, counting_into
from jiio_plugins.equilibrium.foreign import adapt, unadapt
from jiio_plugins.equilibrium.layer import is_one_problem
from jiio_plugins.equilibrium.recognition import no_layer, recognise, servable
from jiio_plugins.equilibrium.solvers import Anderson, iterate
from jiio_plugins.equilibrium.some_rows import REFUSALS
from jiio_plugins.equilibrium.state import relative, row_norm
from jiio_plugins.joint.guard import Replay
from jiio_plugins.joint.inputs import problem_of
from jiio_plugins.joint.modes import SolveMode, layers_as
from jiio_plugins.solution import ConvergenceWarning
from jiio_plugins.utils.files import write_json
from jiio_plugins.utils.trees import leaves
from jiio_plugins.verification import default_verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jiio_plugins.equilibrium.cell import CellMap
    from jiio_plugins.equilibrium.layer import LayerDefaults
    from jiio_plugins.joint.problem import Problem

_CURVE = 40  # evaluations that a residual curve shows
_POWER = 20  # products of the estimate of ρ
_EASY, _SLOW = 0.9, 1.0  # ρ up to which the defaults do, and up to which plain iteration converges
_NEAR = 1e-3  # relative: two answers are one
_GOOD = 0.95  # cosine of a gradient that may be trusted
_TIGHT = 400  # evaluations, and products, that the exact gradient may take
_PAGE = 'the page "Cells that do not contract"'  # by its title, which site and repository have
_SETTLED = 1e-2  # residual of an adjoint that it may be read off

Curve = list[tuple[float, float]]


@dataclass
class Diagnosis:
    """What :func:`check` found. What it could not find out is None.

    Attributes:
        layers: the equilibrium layers, name in the model -> what each is.
        lines: to write, so that everything here takes the model.
        settings: to start with, as they are written.
        batch_first: whether the states have a row for each of x.
        repeatable: whether two calls give the same, to the bit.
        on_some_rows: whether it may be called on some of the rows.
        independent: whether the other rows leave a row alone.
        rate: estimate of ρ, the largest eigenvalue of J_z in modulus, over the rows the largest.
        evaluations: of f a row, in one call of the model: mean and largest.
        residual: relative residual that the model stops at, the largest.
        gradient_cosine: of the model's own gradient with the exact one, the smallest of the rows
            whose fixed point was found.
        gradient_ratio: its length over that of the exact one, of that row.
        plain: relative residuals of plain iteration, median and largest, one pair an evaluation.
        anderson: those of Anderson's method.
        sentences: all of it in plain words, the verdict first.
    """

    layers: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    settings: str | None = None
    batch_first: bool | None = None
    repeatable: bool | None = None
    on_some_rows: bool | None = None
    independent: bool | None = None
    rate: float | None = None
    evaluations: tuple[float, float] | None = None
    residual: float | None = None
    gradient_cosine: float | None = None
    gradient_ratio: float | None = None
    plain: Curve = field(default_factory=list)
    anderson: Curve = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The sentences, one a line."""
        return "\n".join(self.sentences)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON.

        Raises:
            OSError: it could not be written. An older file is kept.
        """
        write_json(path, asdict(self), indent=2)

    def plot(self, path: str | Path) -> None:
        """Draw the residual curves, if there are any.

        Raises:
            ImportError: matplotlib is missing.
        """
        rate = "" if self.rate is None else f", ρ about {self.rate:.2f}"
        solves = {"plain iteration": self.plain, "Anderson": self.anderson}
        title = f"median, and dotted the worst row{rate}"
        plots.save(path, plots.residuals(solves, title=title))


def check(
    model: nn.Module,
    x: Tensor,
    objective: Callable[[Any], Tensor] | None = None,
    *,
    given: Sequence[Tensor] = (),
) -> Diagnosis:
    """Say what a model is like, which lines to write, and which settings to start with.

    A model that :func:`jiio_plugins.adapt` would serve is adapted meanwhile.

    Args:
        model: any module, called as ``model(x, *given)``. It is looked at in eval mode.
        x: a few samples, ``(rows, ...)``, two at least, that differ.
        objective: what gradients are taken of, ``objective(output) -> (rows,)``. None: the square
            of the first tensor in the output.
        given: what else the model takes, tensors ``(rows, ...)``.

    Returns:
        A :class:`Diagnosis`. ``print`` it for a page of sentences.

    Raises:
        TypeError, ValueError: model or x is no input for anything here.

    Example:
        >>> found = check(model, x)
        >>> found.independent, found.on_some_rows, found.repeatable
        (True, True, True)
        >>> print(found.sentences[0])
        Start with method=Joint(): the defaults.
    """
    one = isinstance(model, nn.Module) and is_one_problem(model)
    if objective is not None and not callable(objective):
        raise TypeError(
            f"objective must be a function of the model's output, got {type(objective).__name__}: "
            "what else the model takes goes in given=(...)"
        )
    objective = objective or (_sum_of_squares if one else _square)
    problem = problem_of(model, x, objective, given=given)
    if problem.rows < 2 and not one:
        raise ValueError(f"x must have two rows at least, got {problem.rows}")
    found = Diagnosis(layers=recognise(model))
    if not found.layers:
        found.sentences.append(f"Nothing to work on: {no_layer(model)}.")
        return found
    adapted = servable(model)
    _lines(found)
    try:
        if adapted:
            adapt(model)
        with (
            torch.enable_grad(),
            problem.variable.guarded(),
            counting_into(()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", ConvergenceWarning)  # a sentence says it
            _look(problem, found)
    except REFUSALS as error:
        found.sentences.insert(0, f"Not all could be looked at, as the model raises: {error}")
    finally:
        for name in adapted:
            unadapt(model.get_submodule(name))
    return found


def _lines(found: Diagnosis) -> None:
    names = ", ".join(name or "the model itself" for name in found.layers)
    foreign = any(kind != "ready" for kind in found.layers.values())
    if foreign:
        kinds = ", ".join(sorted({k for k in found.layers.values() if k != "ready"}))
        found.lines = ["import jiio_plugins", "model = jiio_plugins.adapt(model)"]
        found.sentences.append(f"{names}: recognised as {kinds}. Write: {'; '.join(found.lines)}.")
    else:
        found.sentences.append(f"{names} is a layer with a joint mode: nothing has to be written.")


def _look(problem: Problem, found: Diagnosis) -> None:
    say, v = found.sentences.append, problem.v_start
    try:
        own = problem.solve(v)
    except ValueError as error:
        if "batch first" not in str(error):
            raise
        found.batch_first = False
        found.sentences.insert(0, f"Not batch first: {str(error).partition(': ')[2]}.")
        return
    found.batch_first = True
    if problem.variable.one:
        say("The states are of one problem: x is optimised as a whole.")
    else:
        say(f"Batch first: {problem.rows} rows of x, and as many of each state.")
    with counting_into((counter := RowCounter(torch.zeros(problem.rows, device=v.device)),)):
        again = problem.solve(v)
    evals = counter.f_evals_by_row
    found.evaluations = float(evals.mean()), float(evals.max())
    residual = relative(problem.evaluate(v, own.z) - own.z, own.z)
    found.residual = float(residual.max())
    if found.evaluations[1]:
        say(
            f"A call takes {found.evaluations[0]:.0f} evaluations of f a row, "
            f"{found.evaluations[1]:.0f} at most, and stops at a relative residual of "
            f"{found.residual:.1e} at worst."
        )
    else:
        say(
            "What a call costs is not counted, as the layer runs a solver of its own. It stops at "
            f"a relative residual of {found.residual:.1e} at worst."
        )
    first, second = _first(own.output), _first(again.output)
    found.repeatable = torch.equal(first, second)
    if found.repeatable:
        say("It is the same function twice, to the bit.")
    else:
        f = problem.evaluate(v, own.z)
        where = "cell" if not torch.equal(f, problem.evaluate(v, own.z)) else "start or solver"
        say(
            f"It is not the same function twice: its {where} is random, and answers differ by "
            f"{_apart(first, second):.1e}. Draw the numbers once, in the model's forward."
        )
    tight = problem.solve(v, default_verifier(v.dtype))
    if not problem.variable.one:
        _rows(problem, found, tight.z)
    _contraction(problem, found, tight.z)
    _gradient(problem, found, tight.converged)
    _settings(found, bool(tight.converged.all()))


def _rows(problem: Problem, found: Diagnosis, z: Tensor) -> None:
    """Whether rows are independent, and may be called without the others.

    One evaluation at one state tells. Two solves need not end at the same state, where the cell
    hardly contracts.
    """
    say, v = found.sentences.append, problem.v_start
    some = torch.tensor([0, problem.rows - 1], device=v.device)
    some, replay = some if problem.rows > 2 else some[:1], Replay()

    def seen(v: Tensor, z: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with replay():
            at = problem.linearize(v, z, rows)
        return at.fz, _first(at.output)

    def apart(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], rows: Tensor) -> float:
        pairs = zip(one, two, strict=True)
        return max(_apart(a[: len(rows)], b[rows]) for a, b in pairs)

    def others(t: Tensor) -> Tensor:
        other = t.clone()
        other[1:] = t[1:].roll(1, 0) if len(t) > 2 else 0.5 * (t[:1] + t[1:])
        return other

    whole = seen(v, z)
    if len(whole[1]) == problem.rows:
        found.independent = apart(seen(others(v), others(z)), whole, some[:1]) < _NEAR
    try:
        if problem.whole:
            raise ValueError("whole_batch=True says so")
        problem.run_layers(SolveMode(), v, some)  # its own solver may refuse them too
        found.on_some_rows = apart(seen(v, z[some], some), whole, some) < _NEAR
        reason = "what it says of a row changes"
    except REFUSALS as error:
        found.on_some_rows, reason = False, str(error).partition("\n")[0]
    if found.independent:
        say("Rows are independent: other rows leave a row's answer alone.")
    elif found.independent is not None:
        say("Rows are not independent: a row's answer changes with the others in its batch.")
    if found.on_some_rows:
        say("It may be called on some of the rows.")
    else:
        say(f"It may not be called on some of the rows ({reason}): all are judged together.")


class _CurveMode(SolveMode):
    """Every layer is iterated plainly and by Anderson's method, and the residuals are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[Tensor] = []
        self.anderson: list[Tensor] = []

    def solve(self, layer: LayerDefaults, f: CellMap, flat: Tensor) -> Tensor:
        """See :class:`SolveMode`."""

        def noting(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
            def call(z: Tensor) -> Tensor:
                fz = f(z)
                kept.append(relative(fz - z, fz))
                return fz

            return call

        plain, z = noting(self.plain), flat
        for _ in range(_CURVE):
            z = plain(z)
        solver = Anderson(max_iter=_CURVE, tol=100 * torch.finfo(flat.dtype).eps)
        return iterate(noting(self.anderson), flat, solver).z


def _contraction(problem: Problem, found: Diagnosis, z: Tensor) -> None:
    v, mode = problem.v_start, _CurveMode()
    with torch.no_grad():
        problem.run_layers(mode, v)
    found.plain, found.anderson = (
        [(float(r.median()), float(r.max())) for r in curve[:_CURVE]]
        for curve in (mode.plain, mode.anderson)
    )
    linearized = problem.linearize(v, z, answer_fz=False)
    generator = torch.Generator(v.device).manual_seed(0)
    mu = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    sizes = []
    for k in range(_POWER):
        mu = linearized.vjp(mu, last=k + 1 == _POWER)[0]
        size = row_norm(mu)
        sizes.append(size)
        mu = mu / size.clamp(min=torch.finfo(z.dtype).tiny)[:, None]
    # a pair of complex eigenvalues turns, so the mean of several products
    rate = torch.stack(sizes[_POWER // 2 :]).log().mean(0).exp()
    found.rate, median = float(rate.max()), float(rate.median())
    kind = (
        "contracts well"
        if found.rate <= _EASY
        else "contracts slowly"
        if found.rate < _SLOW
        else "does not contract in the worst row, where plain iteration leaves the fixed point"
    )
    found.sentences.append(
        f"f {kind}: ρ is about {found.rate:.2f} in the worst row, {median:.2f} in the median. "
        f"After {len(found.plain)} evaluations plain iteration is at a residual of "
        f"{found.plain[-1][1]:.1e} in the worst row, after {len(found.anderson)} "
        f"Anderson's method at {found.anderson[-1][1]:.1e}."
    )


def _gradient(problem: Problem, found: Diagnosis, solved: Tensor) -> None:
    """Compare the model's own gradient with the exact one in the rows whose z was found."""
    v = problem.v_start
    solved = problem.groups.worst((~solved).float()) == 0
    if not bool(solved.any()):
        found.sentences.append(
            "How good the model's own gradient is cannot be said: no fixed point was found at "
            "which there would be an exact one."
        )
        return

    def gradient() -> Tensor:
        leaf = v.clone().requires_grad_()
        value = problem.loss(problem.call(leaf)).sum()
        return torch.autograd.grad(value, leaf)[0]

    solver = Anderson(max_iter=_TIGHT, tol=default_verifier(v.dtype).tol)
    counter, exact_rule = Counter(), layers_as(solver=solver, adjoint=Implicit(solver=solver))
    with exact_rule, counting_into((counter,)):
        exact = gradient()
    worst_adjoint = counter.worst_adjoint_residual
    if not worst_adjoint < _SETTLED:
        found.sentences.append(
            f"How good the model's own gradient is cannot be said: in {_TIGHT} products the exact "
            f"adjoint is still at a residual of {worst_adjoint:.0e}."
        )
        return
    try:
        own = gradient()
    except RuntimeError as error:
        found.sentences.append(f"The model's own gradient cannot be had: {error}.")
        return
    own, exact = own[solved], exact[solved]
    of = "" if bool(solved.all()) else f", of the {len(own)} whose fixed point was found"
    cosine = cosine_similarity(own.double(), exact.double(), dim=1)
    worst = int(cosine.argmin())
    found.gradient_cosine = float(cosine[worst])
    found.gradient_ratio = float(own[worst].norm() / exact[worst].norm())
    good = "good" if _is_good(found.gradient_cosine) else "not to be trusted"
    found.sentences.append(
        f"The model's own gradient is {good}: its cosine with the exact one is "
        f"{found.gradient_cosine:.3f} at worst, where its length is {found.gradient_ratio:.2f} of "
        f"that, and {float(cosine.median()):.3f} in the median{of}."
    )


def _is_good(cosine: float | None) -> bool:
    """Whether nothing is known against a gradient."""
    return cosine is None or cosine >= _GOOD


def _settings(found: Diagnosis, solved: bool) -> None:
    rate = found.rate if found.rate is not None else 0.0
    if not solved:
        found.settings = "Joint(max_iter=80)"
        why = (
            f"a tight solve has not converged in {default_verifier(torch.float32).max_iter} "
            "evaluations. Compare with Nested(solver=Anderson(max_iter=200, tol=1e-4)), which "
            "costs far more. What is found may not be verified: give that more, "
            "verify=Anderson(max_iter=1000, tol=1e-5)"
        )
        if rate >= _SLOW:
            why += f", or damp the cell (Damped), see {_PAGE} for others with the same fixed points"
    elif rate <= _EASY:
        found.settings, why = "Joint()", "the defaults"
    elif rate < _SLOW:
        found.settings, why = "Joint(max_iter=80)", "slow rows take more steps"
    else:
        found.settings = "Joint(max_iter=80)"
        why = f"plain iteration is repelled. Compare with Nested(), and see {_PAGE}"
    verdict = [f"Start with method={found.settings}: {why}."]
    faults = {
        "two calls differ": found.repeatable is False,
        "rows are not independent": found.independent is False,
        "the model's own gradient is not to be trusted": not _is_good(found.gradient_cosine),
    }
    if any(faults.values()):
        verdict.append(f"Mind, see below: {', '.join(k for k, there in faults.items() if there)}.")
    found.sentences[:0] = verdict


def _first(output: Any) -> Tensor:
    """The first tensor of what a model returned, a row each."""
    first: Tensor = next(leaves(output, Tensor))
    return first.detach()


def _square(output: Any) -> Tensor:
    first: Tensor = next(leaves(output, Tensor))
    return first.flatten(1).square().sum(1)


def _sum_of_squares(output: Any) -> Tensor:
    return _square(output).sum().reshape(1)


def _apart(a: Tensor, b: Tensor) -> float:
    """Relative distance."""
    if a.shape != b.shape:
        return torch.inf
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float32).tiny))
