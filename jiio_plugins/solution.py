"""What a solve or an optimisation returns: a frozen record, with failure as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConvergenceWarning(UserWarning):
    """An equation was not solved to where its answer can be relied on."""


class Status(IntEnum):
    """How one sample (or one problem) ended. ``Status(k).message`` says what to change."""

    CONVERGED = 0
    MAX_ITER = 1
    DIVERGED = 2
    NONFINITE = 3
    NOT_VERIFIED = 4
    DISAGREEMENT = 5
    NO_IMPROVEMENT = 6
    STALLED = 7
    GRADIENT_UNSETTLED = 8
    UNVERIFIED = 9
    RANDOM = 10

    @property
    def message(self) -> str:
        """One line: what happened and what to change."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the fixed point converged; at an optimised input, by an independent solve",
    Status.MAX_ITER: (
        "the iteration limit came before the tolerance: raise max_iter, loosen tol, use Anderson "
        "instead of Picard, or damp the cell (Damped)"
    ),
    Status.DIVERGED: (
        "the residual grew instead of shrinking: the cell is not contractive here; damp it "
        "(Damped), use Anderson, or train with a Jacobian penalty"
    ),
    Status.NONFINITE: (
        "the model returned NaN or Inf: the best finite iterate is returned; check the input's "
        "range and the weights"
    ),
    Status.NOT_VERIFIED: (
        "the independent solve at the returned input did not reach its tolerance: do not trust "
        "this value; give it more iterations (verify=), or, where the cell does not contract, damp "
        "it (Damped) or train with a Jacobian penalty"
    ),
    Status.DISAGREEMENT: (
        "the model's own solver and the tight solve give different values: the model stops too "
        "early; tighten its solver before judging it (tol of Equilibrium, f_tol and f_max_iter of "
        "a TorchDEQ layer, more iterations of one of your own)"
    ),
    Status.NO_IMPROVEMENT: (
        "nothing better than the start was found, and the start is returned: if it is no optimum, "
        "raise max_iter, change the step size, or see whether the model detaches x, so that no "
        "gradient reaches it"
    ),
    Status.STALLED: (
        "no step lowers the residual any more: the tolerance is below what this dtype can reach "
        "(use float64 or loosen tol), or the cell is not smooth here"
    ),
    Status.GRADIENT_UNSETTLED: (
        "the value is verified, but where the loop ended its adjoint had not settled, or its state "
        "was at another fixed point, so the search did not follow the model's gradient and a "
        "better x is likely: raise max_iter (iters of a host), in a ball also max_state_steps, "
        "max_adjoint_steps or anchors of Joint, damp the cell (Damped), or use Nested with a tight "
        "solver and a max_iter as large"
    ),
    Status.UNVERIFIED: (
        "nobody has checked where the loop ended, as verify=False asked for: judge x yourself, or "
        "call with verify=None or a solver"
    ),
    Status.RANDOM: (
        "the model gives two answers to two calls with the same input, so that what was found "
        "cannot be relied on: take what is random out of it (dropout that is always on, noise "
        "in cell, encoder or head, a random initial_state), or draw it from a generator of a fixed "
        "seed at each call"
    ),
}

# The value of another status is right, or nobody was to look: with GRADIENT_UNSETTLED it is the
# search that may be bettered, and a few rows often have it.
_DOUBTFUL = (Status.NONFINITE, Status.NOT_VERIFIED, Status.DISAGREEMENT, Status.RANDOM)


def report_of(status: Tensor, stats: Any) -> str:
    """Count of each status with its message, one line each, how the adjoints ended, and the price.

    The price is told in calls of the model as well: the retardation factor of one-shot
    optimisation, which is what the whole optimisation costs over what one solve does.

    Args:
        status: :class:`Status` codes, any number of them.
        stats: :class:`Stats`, or what has arrays of the same names.

    Source of the factor: Gauger, Griewank, Hamdi, Kratzenstein, Özkaya and Slawig, "Automated
    extension of fixed point PDE solvers for optimal design with bounded retardation" (2012).
    """
    lines = _counted(status)
    adjoint = stats.costate_residual
    if adjoint is not None and len(adjoint):
        adjoint = torch.as_tensor(adjoint)
        median, worst = float(adjoint.median()), float(adjoint.max())
        lines.append(f"adjoint residual: median {median:.0e}, worst {worst:.0e}")
    f_evals, vjps = stats.verification_f_evals, stats.verification_vjps
    if stats.model_f_evals is not None and f_evals is not None and vjps is not None:
        alone = float((stats.f_evals + stats.vjps).mean()) if len(stats.f_evals) else 0.0
        call = float(stats.model_f_evals.mean()) if len(stats.model_f_evals) else 0.0
        if call > 0:  # nobody has called the model, or its evaluations cannot be seen
            verified = alone + float((f_evals + vjps).mean())
            lines.append(
                f"price per row: {alone:.3g} evaluations of f and VJPs, as much as "
                f"{alone / call:.2g} calls of the model, or {verified / call:.2g} with the "
                "verification"
            )
    return "\n".join(lines)


def doubtful_rows(status: Tensor) -> str:
    """What is to be said of rows whose value is not to be relied on. Empty where there are none.

    For hosts whose users get an x and no :class:`Solution`: in the way that those hosts warn.

    Args:
        status: :class:`Status` codes, any number of them.

    Returns:
        How many there are, and a line for each status with what to change.
    """
    doubtful = status[torch.isin(status, torch.tensor(_DOUBTFUL).to(status))]
    if not len(doubtful):
        return ""
    head = f"{len(doubtful)} of {len(status)} rows are not to be relied on:"
    return "\n".join([head, *_counted(doubtful)])


def _counted(status: Tensor) -> list[str]:
    """A line for each status there is: how many rows have it, and its message."""
    codes, counts = torch.unique(status.cpu(), return_counts=True)
    return [
        f"{int(n)} × {Status(int(c)).name}: {Status(int(c)).message}"
        for c, n in zip(codes, counts, strict=True)
    ]


@dataclass
class Residuals:
    """How far an implicit gradient can be trusted, one entry per problem.

    Attributes:
        joint: relative residual ``‖F(q) − q‖ / ‖q‖`` of the solution ``q = (z, μ, v)``, the largest
            of the three blocks, ``(problems,)``. A block with a norm below a thousand roundings
            counts as zero, and is not divided by it.
        adjoint: ``‖F(λ) − λ‖ / ‖F(λ)‖`` of the equation for λ, ``(problems,)``. None before a
            gradient was taken.
        adjoint_evals: products with ``(∂F/∂q)ᵀ`` that took, ``(problems,)``. None likewise.
    """

    joint: Tensor
    adjoint: Tensor | None = None
    adjoint_evals: Tensor | None = None


@dataclass(frozen=True)
class Stats:
    """What it cost and how well it ended, one entry per row or per problem.

    Attributes:
        f_evals: evaluations of the cell f, float ``(rows,)``. Everything used to choose the answer
            is in it. The final verification, which every method shares, is not.
        vjps: vector-Jacobian products, float ``(rows,)``.
        iterations: iterations of the loop, ``(rows,)``.
        z_residual: ``‖f(z) − z‖ / ‖f(z)‖`` of the returned state, ``(rows,)``.
        costate_residual: the same of the adjoint equation at the loop's last iterate, ``(rows,)``.
        verification_f_evals: evaluations spent in the final verification, ``(rows,)``.
        verification_vjps: VJPs spent there, ``(rows,)``.
        verification_seconds: what it took, in seconds by the host's clock.
        model_f_evals: those of them that ``model(x)`` itself takes, ``(rows,)``.
        model_value: the objective by ``model(x)`` with the model's own solver, ``(problems,)``.
        model_output: that call's output.
        implicit: with ``differentiable=True``: how accurate the gradient of ``x`` is
            (:class:`Residuals`).
    """

    f_evals: Tensor
    vjps: Tensor
    iterations: Tensor
    z_residual: Tensor
    costate_residual: Tensor | None = None
    verification_f_evals: Tensor | None = None
    verification_vjps: Tensor | None = None
    verification_seconds: float = 0.0
    model_f_evals: Tensor | None = None
    model_value: Tensor | None = None
    model_output: Any = None
    implicit: Residuals | None = None

    def summary(self) -> dict[str, float]:
        """Means per row as plain floats (this synchronises with an accelerator)."""
        out = {}
        for name in ("f_evals", "vjps", "iterations", "z_residual", "costate_residual"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel():
                out[name] = float(tensor.double().mean())
        return out


_TENSORS = ("x", "z", "costate", "value", "output", "status", "stats")


@dataclass(frozen=True, repr=False)
class Solution:
    """Result of :func:`solve_fixed_point` or :func:`optimize_input`.

    Attributes:
        x: the optimised input, or a dict of the optimised parameters. None for a plain solve.
        z: the equilibrium state, a tensor or tuple as the cell has it. Of several layers, a tuple
            over them.
        costate: the adjoint μ in the layout of ``z``, or None.
        value: verified objective ℓ per problem, ``(problems,)``. None for a plain solve, and with
            ``verify=False``.
        status: :class:`Status` codes, int8, ``(rows,)`` of a plain solve, else ``(problems,)``.
        stats: costs and residuals.
        output: ``model(x)`` from the verification solve, or None.
    """

    x: Tensor | Mapping[str, Tensor] | None
    z: Any
    costate: Any
    value: Tensor | None
    status: Tensor
    stats: Stats
    output: Any = None

    @property
    def converged(self) -> Tensor:
        """Boolean mask of entries whose status is ``Status.CONVERGED``."""
        return self.status == Status.CONVERGED

    def report(self) -> str:
        """Count of each status with its message, one line each, how the adjoints ended, the price.

        The price is told in f evaluations and VJPs, and in calls of the model.
        """
        return report_of(self.status, self.stats)

    def __repr__(self) -> str:
        """One line: how the problems ended, the largest residual, and where the tensors are."""
        ended = Counter(self.status.tolist())
        statuses = ", ".join(f"{n} {Status(code).name}" for code, n in sorted(ended.items()))
        parts = [statuses or "no problems"]
        if self.stats.z_residual.numel():
            parts.append(f"residual of z up to {float(self.stats.z_residual.max()):.1e}")
        there = [name for name in _TENSORS if getattr(self, name) is not None]
        return f"Solution({'; '.join(parts)}; tensors in .{', .'.join(there)}; print() says more)"

    def __str__(self) -> str:
        """A few lines to read: how the problems ended, their values, and what they cost."""
        problems = f"{len(self.status)} problem{'s' * (len(self.status) != 1)}"
        if isinstance(self.x, Tensor):
            lines = [f"{problems}, x {tuple(self.x.shape)}"]
        else:
            lines = [f"{problems}, {', '.join(self.x) if self.x else 'a fixed point each'}"]
        if len(self.status):
            lines.append(self.report())
        if self.value is not None and self.stats.model_value is not None and len(self.value):
            lines.append(
                f"mean value {float(self.value.mean()):.4g}, "
                f"by the model's own answer {float(self.stats.model_value.mean()):.4g}"
            )
        costs = (f"{name} {value:.3g}" for name, value in self.stats.summary().items())
        return "\n".join([*lines, f"mean per row: {', '.join(costs)}"])
