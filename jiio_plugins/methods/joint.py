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

from jiio_plugins.equilibrium.solvers import Anderson, HostFlag
from jiio_plugins.equilibrium.state import relative, row_norm, surely_none
from jiio_plugins.methods.base import Evaluation, Iteration, Method, MethodResult
from jiio_plugins.methods.inverse import SecantInverse
from jiio_plugins.methods.mixing import MIXINGS
from jiio_plugins.methods.safeguard import Safeguard
from jiio_plugins.methods.steps import MEMORY, StateSteps, relaxed
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from jiio_plugins.joint.linearization import Linearization
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import BestSoFar

# A row is slow where a mixed evaluation brings z nearer to its fixed point by no less than this, or
# where plain steps lose it: ω has been halved three times, or μ has this relative residual.
_SLOW = 0.6
_SHORT = 0.2
_LOST = 0.5
_BEGIN = 3  # iterations in which the residual of μ says only that it has just begun
_SETTLED_ADJOINT = 0.05  # a slow row's μ has settled where a mixed step moves it by less (relative)
_ANCHOR = Anderson(max_iter=30, tol=1e-2)  # tells one fixed point from another
_ANCHORED = 10  # iterations that an anchor serves at least: it costs as much as half of them
_ELSEWHERE = 0.1  # z further than this from the anchor (relative) is at another fixed point


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

    That serves a cell that contracts well. The warm-up tells which rows have one, and so do the
    residuals of z and μ in every iteration. In a *slow* row
    z and μ are settled at each v before the step on v is taken, by as few steps as it needs::

        z     ← z + B (f(z, v) − z)        at most max_state_steps times, the last one with its
                                           graph, until one moves z by little
        J_zᵀμ ← J_zᵀμ + C (J_zᵀ(J_zᵀμ + ∂ℓ/∂z) − J_zᵀμ)
                                           at most max_adjoint_steps VJPs, likewise

    B and C are ``(I − J_z)⁻¹`` and its transpose as far as secant pairs tell
    (:class:`jiio_plugins.methods.inverse.SecantInverse`): B by those seen at this v, C by the last
    ones. So it does not matter whether plain iteration creeps or even leaves the fixed point.

    A state that follows v may stay with a fixed point that the model's own solve, which starts
    anew, no longer finds. So slow rows are solved from the initial state ``anchors`` times during
    the run, and go on from there where that is elsewhere.

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
        max_state_steps: the same of a slow row, at most. No more than ``state_steps`` switches the
            control off: all rows then count as fast.
        max_adjoint_steps: VJPs an iteration of a slow row, at most.
        anchors: times that slow rows are solved from the initial state, evenly spread over the run,
            and at most once in ten iterations. There are none where a state to start with is given.
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

    Not for: an f whose fixed point Anderson's method does not find (the status tells), nor batch
    normalisation in train mode inside f.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 3.2.
    """

    state_steps: int = 2
    max_state_steps: int = 4
    max_adjoint_steps: int = 4
    anchors: int = 2
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
        least = {"state_steps": 1, "max_state_steps": 1, "max_adjoint_steps": 1}
        check_counts(self, **least, anchors=0, adjoint_warmup=0, acceleration=0)

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
        self.z, self.rate = problem.warm_up(problem.v_start, method.warmup)
        known = None if problem.state is None else problem.state.jz_mu
        self.jz_mu = torch.zeros_like(self.z) if known is None else known
        self.vjp_twice = 0  # iterations at the beginning that take a second VJP

    def state_steps(self, k: int, active: Tensor) -> StateSteps | None:
        """Steps on z before the evaluation with the graph."""
        return None

    def products(self, linearized: Linearization, dl_dz: Tensor, active: Tensor) -> Tensor:
        """``J_vᵀμ``, ``(problems, d)``, and on the way the next ``J_zᵀμ``."""
        self.jz_mu_before = self.jz_mu
        self.jz_mu_next, jv_mu = linearized.vjp(self.mu)
        self.problem.pay_passes(vjps=active)
        self.mu_residual = relative(self.jz_mu_next - self.jz_mu_before, self.mu)
        return jv_mu

    def second_product(self, linearized: Linearization, dl_dz: Tensor, active: Tensor) -> None:
        """A step on the adjoint before the one that yields the gradient."""
        self.jz_mu = _finite(linearized.jz_mu(self.mu), self.jz_mu)
        self.mu = self.jz_mu + dl_dz
        self.problem.pay_passes(vjps=active)

    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """See :class:`Iteration`."""
        problem = self.problem
        self.before = self.state_steps(k, active)
        linearized = self.linearized = problem.linearize(v, self.z, advance=self.before)
        if self.before is not None:
            problem.pay(f_evals=self.before.evals * active)
        problem.pay_passes(f_evals=active)
        self.z = linearized.z
        loss = problem.loss(linearized.output)
        dl_dz, dl_dv = linearized.gradient(loss)
        self.mu = self.jz_mu + dl_dz
        if k < self.vjp_twice:
            self.second_product(linearized, dl_dz, active)
        gradient = (dl_dv + self.products(linearized, dl_dz, active)).reshape(v.shape)
        r = linearized.fz - self.z
        at = self.z, r, linearized.fz, dl_dz, self.mu_residual
        return Evaluation(loss, linearized.output, gradient, *at)

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """See :class:`Iteration`."""
        return replace(super().finish(at, v, best), mu_error=self.mu_residual)


class _Relaxed(_JointIteration):
    """z by over-relaxed steps where the cell contracts well, by mixed ones where it does not.

    Attributes:
        omega: length of the relaxed steps, ``(rows, 1)``. It is halved where it proves too long.
        slow: rows whose z and μ are settled at each v, bool ``(rows,)``.
        unsure: slow rows whose z may have followed another fixed point, bool ``(rows,)``.
    """

    def __init__(self, method: Joint, problem: Problem) -> None:
        super().__init__(method, problem)
        self.vjp_twice = method.adjoint_warmup
        # with one state step there is no second residual at the same v that could halve it
        longest = 1.0 if method.state_steps == 1 else 2.0
        self.omega = torch.full_like(self.z[:, :1], min(method.relaxation, longest))
        layers = bool(problem.layout.layouts)
        self.controlled = layers and method.max_state_steps > method.state_steps > 1
        self.slow = (self.rate > _SLOW) & self.controlled
        self.unsure, self.none_slow = self.slow, HostFlag(self.z.device)
        # z follows v from where it is, and so it may stay with a fixed point that a solve from the
        # initial state no longer finds. Given a state, that is what z is meant to follow. In train
        # mode another solve would draw other random numbers
        fresh = problem.state is None and problem.row_separable
        parts = min(method.anchors, method.max_iter // _ANCHORED) + 1 if fresh else 1
        self.anchors = {round(k * method.max_iter / parts) for k in range(1, parts)}
        self.inverse: SecantInverse | None = None
        self.mu_last: tuple[Tensor, Tensor, Tensor] | None = None  # μ, (J_zᵀ − I) μ, slow rows

    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """See :class:`Iteration`."""
        self.adjoint_begun = k > max(self.method.adjoint_warmup, _BEGIN)
        self.control = self.controlled and not self.none_slow(~self.slow.any())
        if k in self.anchors and self.control and not surely_none(self.unsure):
            self._anchor(v, active)
        return super().evaluate(k, v, active)

    def _anchor(self, v: Tensor, active: Tensor) -> None:
        """Solve slow rows from the initial state, and go on from there where that is elsewhere."""
        problem, unsure, rows = self.problem, self.unsure & (active > 0), None
        if v.device.type == "cpu" and problem.row_separable:
            rows = unsure.nonzero().squeeze(1)
        found = problem.solve(v, _ANCHOR, rows=rows)
        z, evals = found.fz, found.evals
        if rows is not None:
            z = self.z.index_copy(0, rows, z)
            evals = torch.zeros_like(active).index_copy(0, rows, evals)
        problem.pay(f_evals=evals * unsure)
        # NaN is no state to go on from
        elsewhere = unsure & (row_norm(z - self.z) > _ELSEWHERE * row_norm(z))
        self.z = torch.where(elsewhere[:, None], z, self.z)
        self.jz_mu = torch.where(elsewhere[:, None], 0.0, self.jz_mu)
        self.unsure = elsewhere

    def state_steps(self, k: int, active: Tensor) -> StateSteps | None:
        """No relaxed ones in the first iteration, after the warm-up."""
        method = self.method
        if method.state_steps == 1 or not self.problem.layout.layouts:
            return None
        if self.control:
            most = method.max_state_steps - 1 + (0 if k else method.max_state_steps)
            slow = self.slow & (active > 0)
            return StateSteps(method.state_steps - 1 if k else 0, self.omega, slow, most)
        return StateSteps(method.state_steps - 1, self.omega) if k else None

    def second_product(self, linearized: Linearization, dl_dz: Tensor, active: Tensor) -> None:
        """None for slow rows, which take as many as they need."""
        if not self.control:
            super().second_product(linearized, dl_dz, active)
        elif not surely_none(fast := ~self.slow):
            before = self.jz_mu
            super().second_product(linearized, dl_dz, active * fast)
            self.jz_mu = torch.where(fast[:, None], self.jz_mu, before)
            self.mu = self.jz_mu + dl_dz

    def products(self, linearized: Linearization, dl_dz: Tensor, active: Tensor) -> Tensor:
        """More than one for slow rows whose adjoint has not settled."""
        if not self.control:
            return super().products(linearized, dl_dz, active)
        method, running = self.method, self.slow & (active > 0)
        if self.inverse is None:
            self.inverse = SecantInverse(self.z, MEMORY)
        self.jz_mu_before = settled = self.jz_mu
        for k in range(method.max_adjoint_steps):
            if k:
                self.mu = torch.where(running[:, None], settled + dl_dz, self.mu)
                self.jz_mu_before = torch.where(running[:, None], settled, self.jz_mu_before)
            last = k + 1 == method.max_adjoint_steps
            jz_mu, jv_mu = linearized.vjp(self.mu, last=last)
            self.problem.pay_passes(vjps=running if k else active)
            change = jz_mu - self.mu
            if self.mu_last is not None:
                # J_z does not depend on ∂ℓ/∂z, so that pairs hold from one v to the next
                mu_last, change_last, known = self.mu_last
                pair = self.mu - mu_last, change - change_last
                self.inverse.learn(*pair, row_norm(self.mu), running & known)
            self.mu_last = self.mu, change, self.slow
            r = jz_mu - self.jz_mu_before
            move = self.inverse(r)
            size = row_norm(move)
            running = running & torch.isfinite(size)
            settled = torch.where(running[:, None], self.jz_mu_before + move, settled)
            running = running & (size > _SETTLED_ADJOINT * row_norm(self.mu))
            if surely_none(running):
                break
        self.mu_residual = relative(r, self.mu)
        self.jz_mu_next = torch.where(self.slow[:, None], settled, jz_mu)
        return jv_mu

    def advance(self, at: Evaluation, v: Tensor, v_next: Tensor, best: BestSoFar) -> Tensor:
        """See :class:`Iteration`."""
        z, split = self.z, self.problem.layout.split
        if self.before is not None and self.before.steps:
            shrank = self.before.shrank(split(at.r))
            self.omega = torch.where(shrank, self.omega, (self.omega / 2).clamp(min=0.1))
        self.z = relaxed(z, self.omega, at.r, row_norm(at.r))
        if self.before is not None and self.before.slow is not None:
            settled = self.before.settled(split(z), split(at.r))
            self.z = torch.where(self.before.slow[:, None], settled, self.z)
        if self.controlled and self.adjoint_begun:
            lost = (self.omega[:, 0] < _SHORT * self.method.relaxation) | ~(at.mu_residual < _LOST)
            self.unsure = self.unsure | (lost & ~self.slow)
            self.slow = self.slow | lost
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


def _finite(new: Tensor, old: Tensor) -> Tensor:
    """``new``, but ``old`` for a row in which it holds NaN or Inf."""
    return torch.where(torch.isfinite(row_norm(new))[:, None], new, old)


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
