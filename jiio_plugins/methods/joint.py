"""JIIO: state, adjoint and variable advance together.

:class:`Joint` holds the settings, and its docstring has the iteration. ``_JointIteration`` is what
all of its runs share: one evaluation of f with its graph and one VJP a step. Where v moves by
normalised steps inside a ball, ``_Relaxed`` takes z along. Where v settles, ``_Mixed`` does, by
:mod:`jiio_plugins.methods.mixing` and :mod:`jiio_plugins.methods.safeguard`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import relative, row_norm
from jiio_plugins.methods.base import Evaluation, Iteration, Method, MethodResult
from jiio_plugins.methods.mixing import MIXINGS
from jiio_plugins.methods.safeguard import Safeguard
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.solvers import FlatMap
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import BestSoFar


@dataclass(frozen=True, kw_only=True)
class Joint(Method):
    """JIIO: z, μ and v advance together. No solve is run to its end.

    One iteration, which carries z, J_zᵀμ and v, with ω = ``relaxation``::

        z     ← z + ω (f(z, v) − z)        state_steps times, the last one with its graph and with
                                           what comes before and after the layer
        μ     ← J_zᵀμ + ∂ℓ/∂z at f(z, v)   the head's gradient is free: it needs no VJP of f
        J_zᵀμ ← that of the new μ          one VJP, which yields J_vᵀμ too. In the first
                                           adjoint_warmup iterations these two lines twice
        v     ← Π(v + α ε d(J_vᵀμ + ∂ℓ/∂v))

    Here d(g) is the steepest descent direction for a gradient g, see :class:`Method`. The iteration
    deviates from the paper in these points, each measured at equal cost:

    - The adjoint carries ``J_zᵀμ`` rather than μ, so that it always holds the current ∂ℓ/∂z.
    - The head sees f(z, v) rather than z, a state one step further that is there anyway.
    - With a ball there are two evaluations of f for each VJP. ``state_steps=1`` is the paper's one.
    - The adjoint takes a second step while v makes its longest steps and μ has only just begun.
    - z is over-relaxed where the paper damps it.
    - While v moves by normalised steps there is no mixing over the history.

    The two residuals at one v tell whether ω is too long for a row. If a layer's second is not
    smaller, the row's ω is halved.

    Without a ball v settles, and the history of z, μ and v helps it to. With ``mixing``
    "quasi-newton" v takes L-BFGS steps, and z and μ follow along their secants
    (:class:`jiio_plugins.methods.mixing.QuasiNewton`). That goes far in few iterations. "anderson"
    is Anderson's method on all three at once, as in the paper
    (:class:`jiio_plugins.methods.mixing.BlockAnderson`). It settles to more digits where z and μ
    converge slowly. An iterate that makes a problem's objective worse is taken back
    (:class:`jiio_plugins.methods.safeguard.Safeguard`).

    Args:
        max_iter: steps on v. Without a ball no iterate is returned that has not been evaluated: the
            last of them is not taken.
        step_size: α_0 in units of ε, a number or one per problem. Without a ball α, in units of
            v²/objective. None: 2.0 with a ball, 0.1 without.
        final_step_size: α at the last step, in the same units. None: with a ball 0.8 / max_iter of
            step_size, without one step_size.
        warmup: forward-only evaluations of f before the first step, at most, see :class:`Method`.
        precision: dtype in which the loop runs the model under autocast, such as
            ``torch.bfloat16``. None: as the model is.
        state_steps: evaluations of f an iteration. Where there is mixing it is one.
        adjoint_warmup: iterations at the beginning that take a second VJP. Where there is mixing
            none do.
        relaxation: ω in (0, 2). Where there is mixing it is 1. With one state step more than 1
            counts as 1, as nothing would tell that it is too long.
        mixing: "quasi-newton" or "anderson", for problems without a ball.
        acceleration: memory of the mixing, in iterations. 0 switches it off.
        tol: without a ball: relative residual of all three blocks at which the loop stops.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range, another precision or another mixing.

    Not for: an f that is not contractive around its fixed point (the status tells), nor batch
    normalisation in train mode inside f.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 3.2.
    """

    state_steps: int = 2
    adjoint_warmup: int = 3
    relaxation: float = 1.5
    mixing: Literal["quasi-newton", "anderson"] = "quasi-newton"
    acceleration: int = 10
    tol: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation must be in (0, 2), got {self.relaxation}")
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing must be one of {', '.join(MIXINGS)}, got {self.mixing!r}")
        if not self.tol >= 0:
            raise ValueError(f"tol must not be negative, got {self.tol}")
        check_counts(self, state_steps=1, adjoint_warmup=0, acceleration=0)

    def start(self, problem: Problem) -> Iteration:
        """See :class:`Method`."""
        if problem.feasible.radius is None and self.acceleration:
            return _Mixed(self, problem)
        return _Relaxed(self, problem)


class _JointIteration(Iteration):
    """One evaluation of f with its graph and one VJP an iteration, warm from the last one.

    Attributes:
        jz_mu: ``J_zᵀμ``, which the adjoint is carried on by.
        mu: the last adjoint.
    """

    def __init__(self, method: Joint, problem: Problem) -> None:
        self.method, self.problem = method, problem
        self.z = problem.warm_up(problem.v_start, method.warmup)
        known = None if problem.state is None else problem.state.jz_mu
        self.jz_mu = torch.zeros_like(self.z) if known is None else known
        self.vjp_twice = 0  # iterations at the beginning that take a second VJP

    def state_steps(self, k: int) -> _StateSteps | None:
        """Steps on z before the evaluation with the graph."""
        return None

    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """See :class:`Iteration`."""
        problem = self.problem
        self.before = self.state_steps(k)
        if self.before is not None:
            problem.pay_passes(f_evals=self.before.steps * active)
        linearized = self.linearized = problem.linearize(v, self.z, advance=self.before)
        self.z = linearized.z
        loss = problem.loss(linearized.output)
        dl_dz, dl_dv = linearized.gradient(loss)
        self.mu = self.jz_mu + dl_dz
        if k < self.vjp_twice:
            self.jz_mu = _finite(linearized.jz_mu(self.mu), self.jz_mu)
            self.mu = self.jz_mu + dl_dz
            problem.pay_passes(vjps=active)
        self.jz_mu_next, jv_mu = linearized.vjp(self.mu)
        self.jz_mu_before = self.jz_mu
        gradient = (dl_dv + jv_mu).reshape(v.shape)
        problem.pay_passes(f_evals=active, vjps=active)
        r = linearized.fz - self.z
        mu_residual = relative(self.jz_mu_next - self.jz_mu_before, self.mu)
        at = self.z, r, linearized.fz, dl_dz, mu_residual
        return Evaluation(loss, linearized.output, gradient, *at)

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """See :class:`Iteration`."""
        self.mu_residual = relative(self.jz_mu_next - self.jz_mu_before, self.mu)
        return super().finish(at, v, best)


class _Relaxed(_JointIteration):
    """z by over-relaxed steps, whose length ω is halved in a row where it proves too long."""

    def __init__(self, method: Joint, problem: Problem) -> None:
        super().__init__(method, problem)
        self.vjp_twice = method.adjoint_warmup
        # with one state step there is no second residual at the same v that could halve it
        longest = 1.0 if method.state_steps == 1 else 2.0
        self.omega = torch.full_like(self.z[:, :1], min(method.relaxation, longest))

    def state_steps(self, k: int) -> _StateSteps | None:
        """None in the first iteration, after the warm-up."""
        if k == 0 or self.method.state_steps == 1 or not self.problem.layout.layouts:
            return None
        return _StateSteps(self.method.state_steps - 1, self.omega)

    def advance(self, at: Evaluation, v: Tensor, v_next: Tensor, best: BestSoFar) -> Tensor:
        """See :class:`Iteration`."""
        size = row_norm(at.r)
        if self.before is not None:
            shrank = self.before.shrank(self.problem.layout.split(at.r))
            self.omega = torch.where(shrank, self.omega, (self.omega / 2).clamp(min=0.1))
        self.z = _step(self.z, self.omega, at.r, size)
        self.jz_mu = _finite(self.jz_mu_next, self.jz_mu)
        return v_next


class _Mixed(_JointIteration):
    """z, μ and v together by a mixing over the history, safeguarded by the objective."""

    def __init__(self, method: Joint, problem: Problem) -> None:
        super().__init__(method, problem)
        self.mixing = Safeguard(MIXINGS[method.mixing](method.acceleration), problem.groups)
        self.mu_accepted = torch.zeros_like(self.z)

    def advance(self, at: Evaluation, v: Tensor, v_next: Tensor, best: BestSoFar) -> Tensor:
        """See :class:`Iteration`."""
        sum_rows, mixing = self.problem.groups.sum, self.mixing
        change = self.jz_mu_next - self.jz_mu
        merit = sum_rows(at.loss.detach() + (self.linearized.own_jz_mu * at.r).sum(1))
        error = sum_rows(row_norm(change) * row_norm(at.r))
        iterate, residuals = (self.z, self.jz_mu, v), (at.r, change, v_next - v)
        z, jz_mu, v_next = mixing(iterate, residuals, merit, error)
        self.mu_accepted = mixing.unless_rejected(self.mu_accepted, self.mu)
        best.finish(mixing.below(self.method.tol))
        self.z, self.jz_mu = best.keep(self.z, z), best.keep(self.jz_mu, jz_mu)
        return self.problem.feasible.project(v_next)

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """The last accepted iterate: the last trial has not been evaluated, it may be worse."""
        self.z, self.jz_mu, v = self.mixing.accepted
        return replace(
            super().finish(at, v, best),
            mu=self.mu_accepted,
            v_best=self.mixing.incumbent_v,
            loss_best=self.mixing.incumbent_limit,
            bounded=True,
        )


class _StateSteps:
    """Steps on z where a layer is called, so that the rest of the network runs once for all.

    Attributes:
        sizes: of each layer, ‖f(z) − z‖ before the last of them, ``(rows,)``.
    """

    def __init__(self, steps: int, omega: Tensor) -> None:
        self.steps, self.omega = steps, omega
        self.sizes: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, f: FlatMap, z: Tensor) -> Tensor:
        """One layer's flat state, taken on."""
        for _ in range(self.steps):
            r = f(z) - z
            size = row_norm(r)
            z = _step(z, self.omega, r, size)
        self.sizes.append(size)
        return z

    def shrank(self, r: Sequence[Tensor]) -> Tensor:
        """Rows in which every layer's residual ``r`` is smaller than before, ``(rows, 1)``.

        Each layer is judged by itself. A later one starts with the jump of what goes into it, and
        that this shrinks says nothing about an earlier one.
        """
        smaller = [row_norm(now) < size for now, size in zip(r, self.sizes, strict=True)]
        return torch.stack(smaller, dim=1).all(1, keepdim=True)


def _finite(new: Tensor, old: Tensor) -> Tensor:
    """``new``, but ``old`` for a row in which it holds NaN or Inf."""
    return torch.where(torch.isfinite(row_norm(new))[:, None], new, old)


def _step(z: Tensor, omega: Tensor, r: Tensor, size: Tensor) -> Tensor:
    """``z + ω r``, but z for a row in which ‖r‖ = ``size`` says that r holds NaN or Inf."""
    return torch.where(torch.isfinite(size)[:, None], torch.addcmul(z, omega, r), z)


def check_method(method: Method | None, name: str = "method") -> Method:
    """The method, or :class:`Joint` with its defaults for None.

    Args:
        method: what was given.
        name: what the message calls it.

    Raises:
        TypeError: anything but a method or None.
    """
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"{name} must be Joint(...) or Nested(...), got {method!r}")
    return method if method is not None else Joint()
