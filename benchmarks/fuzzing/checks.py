"""What must hold of a call, whatever it was."""

from __future__ import annotations

import copy
import re
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins import Status

from .calls import HALF, exact, nll
from .models import D, join
from .ways import SIGMA, WAYS, measured

if TYPE_CHECKING:
    from collections.abc import Callable

    from jiio_plugins import Solution

    from .calls import Call
    from .ways import Found

TOL = {torch.float32: 1e-5, torch.float64: 1e-9}  # that the default verification asks for
TRUSTED = (Status.CONVERGED, Status.GRADIENT_UNSETTLED, Status.NO_IMPROVEMENT)


def make(call: Call) -> Found:
    """Make it. What a noisy cell draws does not depend on the calls before."""
    if getattr(call.model, "kind", "") == "noisy":
        torch.manual_seed(0)
    return WAYS[call.how](call)


def check(call: Call, again: bool) -> list[str]:
    """What does not hold of a call. ``again``: make it a second time, and a row of it alone."""
    before = str(state_of(call))
    found, error = attempt(call)
    wrong = [] if str(state_of(call)) == before else ["the caller's state was changed"]
    if error is not None:
        return wrong + wrong_error(call, error)
    if call.expected is not None:
        return [*wrong, f"no error, though one about {call.expected!r} was due"]
    assert found is not None
    wrong += wrong_numbers(call, found) or JUDGES.get(call.how, of_solution)(call, found)
    if again:
        wrong += wrong_again(call, found) + wrong_alone(call, found)
    return wrong


def attempt(call: Call) -> tuple[Found | None, Exception | None]:
    """What it finds, or how it fails."""
    try:
        return make(call), None
    except Exception as raised:
        return None, raised


def state_of(call: Call) -> list[Any]:
    """Everything of the caller's that could be changed."""
    model = call.model if isinstance(call.model, nn.Module) else nn.Module()
    noisy = getattr(model, "kind", "") == "noisy"  # what the caller draws is the caller's affair
    given = (call.x, call.labels, call.mask, *call.given)
    return [
        [] if noisy else torch.get_rng_state().tolist(),
        [(n, p.requires_grad, p.grad, p.tolist()) for n, p in model.named_parameters()],
        [(name, m.training, type(m).__name__) for name, m in model.named_modules()],
        [t.tolist() if isinstance(t, Tensor) else t for t in given],
    ]


def wrong_error(call: Call, error: Exception) -> list[str]:
    """An error is due, of a type for bad input, and it says what was wrong."""
    said = f"{type(error).__name__}: {error}"
    due = call.expected or EXCUSES.get((call.how, getattr(call.model, "kind", "")))
    if due is None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"an error without a cause: {said} ({where.filename}:{where.lineno})"]
    if not isinstance(error, (TypeError, ValueError)) or not re.search(due, str(error)):
        return [f"an error that does not speak of {due!r}: {said}"]
    return []


# Where the first evaluation is not finite these have nothing to go on with
EXCUSES = {
    (how, kind): "(?i)NaN|Inf|finite"
    for how in ("learn2learn", "deepinv")
    for kind in ("NaN", "running away", "wild")
}


def wrong_numbers(call: Call, found: Found) -> list[str]:
    """NaN, another shape or dtype, outside ball, box or mask."""
    wrong = []
    if not all(bool(torch.isfinite(t).all()) for t in found.tensors[:1]):
        wrong.append("x holds NaN or Inf")
    x = found.x
    if call.how in ("parameters", "deepinv", "learn2learn"):
        return wrong
    if x.shape != call.x.shape or x.dtype != call.x.dtype:
        return [f"x is {x.dtype} {tuple(x.shape)}"]
    if call.eps is not None and len(x):
        delta = (x.double() - call.x.double()).flatten(1)
        far = torch.linalg.vector_norm(delta, ord=call.norm, dim=1)
        eps = torch.as_tensor(call.eps).double()
        rounding = 20 * torch.finfo(x.dtype).eps
        if bool((far > eps * (1 + 1e-5) + rounding).any()):
            wrong.append(f"x is {float((far - eps).max()):g} further from the centre than allowed")
    if call.box is not None and bool(((x < call.box[0]) | (x > call.box[1])).any()):
        wrong.append("x is outside the box")
    if call.mask is not None and bool((x != call.x)[~call.mask].any()):
        wrong.append("x differs where the mask is 0")
    return wrong


def tol_of(dtype: torch.dtype) -> float:
    """Relative residual of what is called CONVERGED."""
    return TOL[dtype] if dtype in TOL else 8 * torch.finfo(dtype).eps


def of_solution(call: Call, found: Found) -> list[str]:
    """Status, residual and value of a solution, per row."""
    solution = found.solution
    if solution is None or not len(call.x) or solution.value is None:
        return []
    wrong = wrong_status(call, found.x, solution)
    if not wrong and not torch.isfinite(solution.value).logical_not().all():
        wrong += wrong_residual(call, found.x, solution)
        there, start = exact_no_grad(call, found.x), exact_no_grad(call, call.x)
        # random starts may be worse than x
        ordered = "random_starts" not in call.options
        wrong += wrong_value(call, solution, there, start, ordered, steepness(call, found.x))
    return wrong


@torch.no_grad()
def exact_no_grad(call: Call, x: Tensor) -> Tensor:
    """See :func:`exact`."""
    return exact(call, x)


def wrong_status(call: Call, x: Tensor | None, solution: Solution) -> list[str]:
    """A status that its own record contradicts. ``x``: that was found, where there is one."""
    assert solution.value is not None
    status, wrong = solution.status, []
    if bool((~torch.isfinite(solution.value) & (status != Status.NONFINITE)).any()):
        wrong.append("a value is NaN or Inf, and the status does not say so")
    residual = solution.stats.z_residual
    if len(residual) == len(status):
        converged = status == Status.CONVERGED
        if bool((converged & ~(residual <= tol_of(call.x.dtype))).any()):
            wrong.append("CONVERGED above the tolerance")
    noisy = call.model.kind == "noisy"
    if noisy and bool((trusted(status) & of_problems(call, heard(call, x, solution))).any()):
        wrong.append("a model that answers at random was trusted")
    return wrong


@torch.no_grad()
def heard(call: Call, x: Tensor | None, solution: Solution) -> Tensor:
    """Rows in which the noise is above the tolerance: not in half precision, nor in saturation."""
    if call.x.dtype in HALF:
        return torch.zeros(len(call.x), dtype=torch.bool)
    if x is None or solution.z is None:
        return torch.ones(len(call.x), dtype=torch.bool)
    u, _ = injected(call, x)
    cell, z = call.model.layers[0].cell, join(solution.z).double()
    f = z @ cell.weight.double().T + u
    low, high = torch.tanh(f - 0.05), torch.tanh(f + 0.05)
    return (high - low).norm(dim=1) > tol_of(call.x.dtype) * low.norm(dim=1)


def groups_of(call: Call) -> Tensor:
    """Problem of each row of a call on parameters, ``(rows,)``."""
    return torch.zeros(len(call.x), dtype=torch.long) if call.groups is None else call.groups


def of_problems(call: Call, rows: Tensor) -> Tensor:
    """Problems in which that holds for some row."""
    if call.how != "parameters":
        return rows
    groups = groups_of(call)
    return torch.zeros(int(groups.max()) + 1).index_add(0, groups, rows.float()) > 0


def injected(call: Call, x: Tensor) -> tuple[Tensor, Any]:
    """What the first layer is given at x, and the model, in float64."""
    model = copy.deepcopy(call.model).double()
    given = sum(g.double() for g in call.given)
    return model.encoder(x.double().flatten(1)) + model.context + given, model


def trusted(status: Tensor) -> Tensor:
    """Rows whose value is said to be right."""
    return torch.isin(status, torch.tensor([int(s) for s in TRUSTED], dtype=status.dtype))


@torch.no_grad()
def wrong_residual(call: Call, x: Tensor, solution: Solution) -> list[str]:
    """The residual of z, computed in float64, layer by layer."""
    if call.model.kind == "noisy" or solution.z is None:
        return []
    tol, (u, model) = tol_of(call.x.dtype), injected(call, x)
    states = solution.z if call.model.kind == "series" else (solution.z,)
    converged = solution.status == Status.CONVERGED
    for layer, state in zip(model.layers, states, strict=True):
        z = join(state).double()
        f = layer.cell.core(z, u)
        residual = (f - z).norm(dim=1) / f.norm(dim=1).clamp(min=1e-12)
        # the state is rounded to its dtype, and f with it
        slack = 20 * tol + 50 * torch.finfo(x.dtype).eps
        if bool((converged & ~(residual <= slack)).any()):
            return [f"CONVERGED at a residual of {float(residual[converged].max()):.1e}"]
        u = z + 0.1 * u
    return []


def steepness(call: Call, x: Tensor) -> Tensor | float:
    """By how much the objective changes with the logits, relatively, ``(rows,)``.

    The DLR loss divides by a difference of logits, which may be next to nothing.
    """
    if call.loss != "dlr":
        return 0.0
    given = (g.double() for g in call.given)
    outputs = copy.deepcopy(call.model).double().exact(x.double(), *given).detach()
    outputs.requires_grad_()
    (slope,) = torch.autograd.grad(call.objective(outputs).sum(), outputs)
    return slope.norm(dim=1) * outputs.detach().norm(dim=1)


def wrong_value(
    call: Call,
    solution: Solution,
    there: Tensor,
    start: Tensor,
    ordered: bool,
    steep: Tensor | float = 0.0,
) -> list[str]:
    """Values that are not those of an exact solve, and ends that are worse than the start.

    Args:
        call: that was made.
        solution: what it found.
        there: the exact values at its x, one per problem.
        start: those at the start.
        ordered: whether no end may be worse.
        steep: :func:`steepness` there.
    """
    amplification, wrong = call.model.amplification, []
    if amplification is None:
        return []
    assert solution.value is not None
    status, value, dtype = solution.status, solution.value.double(), call.x.dtype
    rounding = 1e-5 if dtype not in HALF else 50 * torch.finfo(dtype).eps
    size = 1 + there.abs() + start.abs() + steep
    slack = (20 * amplification * tol_of(dtype) + rounding) * size
    converged, known = status == Status.CONVERGED, torch.isfinite(there)
    off = (value - there).abs()
    if bool((converged & known & ~(off <= slack)).any()):
        worst = float(off[converged & known].max())
        wrong.append(f"a value called CONVERGED is {worst:.1e} off (1/(1−ρ) {amplification:.0f})")
    worse = trusted(status) & (there - start > 2 * slack)
    if ordered and bool(worse.any()):
        row = int(worse.nonzero()[0, 0])
        by, name = float((there - start)[row]), Status(int(status[row])).name
        wrong.append(f"row {row}, {name}, is worse than the start by {by:.1e}")
    return wrong


def of_parameters(call: Call, found: Found) -> list[str]:
    """As of a solution, per problem: the sum over its rows."""
    solution = found.solution
    assert solution is not None
    groups = groups_of(call)
    problems = int(groups.max()) + 1
    context = found.x["context"].double().reshape(problems, -1)
    begin = call.model.context.detach().double()

    def moved_to(point: Tensor) -> Call:
        return replace(call, given=(*call.given, (point - begin)[groups]))

    if wrong := wrong_status(moved_to(context), call.x, solution):
        return wrong

    def total(point: Tensor) -> Tensor:
        values = exact_no_grad(moved_to(point), call.x)
        return values.new_zeros(problems).index_add(0, groups, values)

    there, start = total(context), total(begin.expand(problems, -1))
    return wrong_value(call, solution, there, start, ordered=True)


def of_gradient(call: Call, found: Found) -> list[str]:
    """As of a solution; and the gradient is that of the exact minimum."""
    wrong, solution = of_solution(call, found), found.solution
    assert solution is not None
    if call.x.dtype != torch.float64 or not call.model.tame or not solution.converged.all():
        return wrong
    implicit = solution.stats.implicit
    # where it says itself that it is not exact there is a warning
    if implicit is None or implicit.adjoint is None:
        return [*wrong, "the gradient has no residuals"]
    if not bool((torch.maximum(implicit.joint, implicit.adjoint) < 1e-6).all()):
        return wrong
    model = copy.deepcopy(call.model).double()
    x = found.x.double().requires_grad_()
    value = call.objective(model.exact(x)).sum()
    slope = torch.autograd.grad(value, x, create_graph=True)[0].flatten(1)
    hessian = torch.stack(
        [
            torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0].flatten(1)
            for i in range(D)
        ],
        dim=1,
    )
    direction = torch.linalg.solve(hessian, torch.ones_like(slope)[:, :, None])[:, :, 0]
    (right,) = torch.autograd.grad((direction.detach() * slope).sum(), model.encoder.bias)
    return wrong + off_by(found.gradient, -right, 1e-3)


def of_training(call: Call, found: Found) -> list[str]:
    """The gradient of the loss at the returned x, by Newton's method."""
    if call.x.dtype != torch.float64 or not call.model.tame:
        return []
    model = copy.deepcopy(call.model)
    value = call.objective(model.exact(found.x)).mean()
    return off_by(found.gradient, torch.autograd.grad(value, model.encoder.bias)[0], 1e-4)


def off_by(gradient: Any, right: Tensor, allowed: float) -> list[str]:
    """What is said of a gradient that is not the right one."""
    gap = float((gradient - right).norm() / (1e-6 + right.norm()))
    return [] if gap <= allowed else [f"a gradient is {gap:.1e} off, relatively"]


def of_reconstruction(call: Call, found: Found) -> list[str]:
    """As of a solution, with the variational problem written out."""
    solution, settings = found.solution, call.options["settings"]
    assert solution is not None
    if wrong := wrong_status(call, found.x, solution):
        return wrong
    if settings["range_penalty"] is not None:
        return []
    training = call.model.training
    y, physics = measured(call)
    call.model.train(training)
    model = copy.deepcopy(call.model).double()

    @torch.no_grad()
    def value(w: Tensor) -> Tensor:
        image = physics.A(model.exact(w.double()).unflatten(1, (1, 2, 2)))
        data = (image - y.double()).square().flatten(1).sum(1) / (2 * SIGMA**2)
        return data + settings["latent_penalty"] * w.double().square().sum(1) / 2

    there, start = value(found.x), value(torch.zeros_like(found.x))
    # values are large against σ²
    return wrong_value(call, solution, there, start, ordered=True)


def of_learner(call: Call, found: Found) -> list[str]:
    """The support loss and its pull: no worse than at the start."""
    if not call.model.tame:
        return []
    begin = call.model.context.detach().double()
    moved = found.x.double() - begin

    def total(by: Tensor) -> float:
        spread = by.expand(len(call.x), -1)
        outputs = copy.deepcopy(call.model).double().exact(call.x.double(), spread).detach()
        pull = call.options["reg"] / 2 * by.square().sum()
        return float(nll(outputs, call.labels).mean() + pull)

    there, start = total(moved), total(torch.zeros_like(moved))
    slack = 1e-3 * (1 + abs(start))
    return [] if there <= start + slack else [f"the loss grew from {start:.4g} to {there:.4g}"]


JUDGES: dict[str, Callable[[Call, Found], list[str]]] = {
    "parameters": of_parameters,
    "gradient": of_gradient,
    "training": of_training,
    "deepinv": of_reconstruction,
    "learn2learn": of_learner,
}


def wrong_again(call: Call, found: Found) -> list[str]:
    """The same bits, but for a model that answers at random."""
    second, error = attempt(call)
    if second is None:
        return [f"the second time, an error: {type(error).__name__}: {error}"]
    pairs = zip(second.tensors, found.tensors, strict=True)
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    return [] if same or call.model.kind == "noisy" else ["the same call gave another x"]


def wrong_alone(call: Call, found: Found) -> list[str]:
    """In float64 and with contraction, where rounding is not amplified."""
    alone = call.how in ("optimize", "attack", "deepinv", "gradient", "training")
    if not alone or call.x.dtype != torch.float64 or not call.model.tame or len(call.x) < 2:
        return []
    if "random_starts" in call.options:
        return []
    one, error = attempt(call.rows(slice(1, 2)))
    if one is None:
        return [f"row 1 alone, an error: {type(error).__name__}: {error}"]
    if one.solution is None or found.solution is None:
        gap, size = float((one.x - found.x[1:2]).abs().max()), 1.0
    else:
        value: Any = one.solution.value
        gap = float((value - found.solution.value[1:2]).abs())  # type: ignore[index]
        size = 1 + float(value.abs())
    if not gap <= 1e-5 * size:
        return [f"row 1 alone has another answer, by {gap:.1e}"]
    return []
