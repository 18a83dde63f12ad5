"""JIIO: state, adjoint and variable advance together.

:class:`Joint` holds the settings, and its docstring has the iteration. What all of its runs share
is in :mod:`jiio_plugins.methods.iteration`. Where v moves by normalised steps inside a ball,
:mod:`jiio_plugins.methods.relaxed` takes z along. Where v settles, ``_Mixed`` does, by
:mod:`jiio_plugins.methods.mixing` and :mod:`jiio_plugins.methods.safeguard`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from jiio_plugins.equilibrium.state import row_norm
from jiio_plugins.methods.base import Method
from jiio_plugins.methods.iteration import JointIteration
from jiio_plugins.methods.mixing import MIXINGS
from jiio_plugins.methods.relaxed import Following, Relaxed
from jiio_plugins.methods.safeguard import Safeguard
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.best import BestSoFar
    from jiio_plugins.methods.records import Evaluation, MethodResult
    from jiio_plugins.methods.round import Iteration


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
      A row whose residual of z is below an eighth of that of μ takes the one with the graph alone,
      as its gradient hangs on μ. That is on a CPU, where rows can be told apart.
    - The adjoint takes a second step while v makes its longest steps.
    - z is over-relaxed where the paper damps it.
    - In an L2 ball a v that swings about its point of rest takes shorter steps, see
      :func:`jiio_plugins.methods.swings.overshoot`. That too is on a CPU.
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

    They settle more tightly as v comes to rest. The first step is the longest, and decides which
    maximum a row ends in. It is not taken where z or μ has not settled before it.

    There may be several fixed points. A state that follows v may go over to one that the model's
    own solve, which starts anew, does not find. So slow rows in which z or μ has not settled at
    some v are solved from the initial state ``anchors`` times during the run. They go on from there
    where that is elsewhere. What they were worth is then forgotten, but for the best v that such a
    solve was at, which is judged at the end too. A solve ends at 1 % of its first residual, or
    after max(15, max_iter / 2) evaluations of f.

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
            v²/objective. None: 2.0 with a ball, but 30 / max_iter up to 3.0 in an L2 ball, and 0.1
            without one.
        final_step_size: α at the last step, in the same units. None: with a ball 0.8 / max_iter of
            step_size (of 2.0, where that is None), without one step_size.
        warmup: forward-only evaluations of f before the first step, at most, see :class:`Method`.
        precision: dtype in which the loop runs the model under autocast, such as
            ``torch.bfloat16``. None: as the model is.
        state_steps: evaluations of f an iteration, at most. Where there is mixing it is one.
        max_state_steps: the same of a slow row, at most. No more than ``state_steps`` switches the
            control off: all rows then count as fast.
        max_adjoint_steps: VJPs an iteration of a slow row, at most.
        anchors: times that slow rows which have not settled are solved from the initial state,
            evenly spread over the run, at most once in five iterations. There are none where a
            state to start with is given. None: once in ten iterations, and at least once.
        adjoint_warmup: iterations at the beginning that take a second VJP. Where there is mixing
            none do. None: a quarter of them, and at least 3.
        relaxation: ω in (0, 2). Where there is mixing it is 1. With one state step more than 1
            counts as 1, as nothing would tell that it is too long.
        mixing: "quasi-newton" or "anderson", for problems without a ball.
        acceleration: memory of the mixing, in iterations. 0 switches it off.
        gap_tol: with a ball: a problem leaves where its v is at rest, see :class:`Method`.
        tol: without a ball: relative residual of all three blocks at which the loop stops.
        capture: on CUDA, with a ball: record an iteration as a CUDA graph once the run is steady,
            and replay it, so that the host dispatches no kernels one by one. ``make gpu`` tells
            what that saves. The model and the objective must leave all numbers on the device.
            Iterations with slow rows run as without it, and so do all where there is a callback.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range, another precision or another mixing.

    Not for: an f whose fixed point Anderson's method does not find (the status tells), nor batch
    normalisation in train mode inside f.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 3.2.
    """

    state_steps: int = 2
    max_state_steps: int = 6
    max_adjoint_steps: int = 6
    anchors: int | None = None
    adjoint_warmup: int | None = None
    relaxation: float = 1.5
    mixing: Literal["quasi-newton", "anderson"] = "quasi-newton"
    acceleration: int = 10
    gap_tol: float = 2e-3
    tol: float = 1e-4
    capture: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation must be in (0, 2), got {self.relaxation}")
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing must be one of {', '.join(MIXINGS)}, got {self.mixing!r}")
        if not self.tol >= 0:
            raise ValueError(f"tol must not be negative, got {self.tol}")
        least = {"state_steps": 1, "max_state_steps": 1, "max_adjoint_steps": 1}
        optional = ("adjoint_warmup", "anchors")
        least.update({name: 0 for name in optional if getattr(self, name) is not None})
        check_counts(self, **least, acceleration=0)

    def start(self, problem: Problem) -> Iteration:
        """See :class:`Method`."""
        if problem.feasible.radius is None and self.acceleration:
            return _Mixed(self, problem)
        settings = {name: getattr(self, name) for name in Following._fields}
        if self.adjoint_warmup is None:
            settings["adjoint_warmup"] = max(3, self.max_iter // 4)
        if self.anchors is None:
            settings["anchors"] = max(1, self.max_iter // 10)
        return Relaxed(self, problem, Following(**settings), self.capture)


class _Mixed(JointIteration):
    """z, μ and v together by a mixing over the history, safeguarded by the objective."""

    def __init__(self, method: Joint, problem: Problem) -> None:
        super().__init__(method, problem)
        self.tol = method.tol
        self.mixing = Safeguard(MIXINGS[method.mixing](method.acceleration), problem.groups)
        self.mu_accepted = torch.zeros_like(self.z)

    def advance(self, at: Evaluation, v: Tensor, v_next: Tensor, best: BestSoFar) -> Tensor:
        """See :class:`Iteration`."""
        sum_rows, mixing = self.problem.groups.sum, self.mixing
        change = self.jz_mu_next - self.jz_mu
        merit = sum_rows(at.loss + (self.linearized.own_jz_mu * at.r).sum(1))
        error = sum_rows(row_norm(change) * row_norm(at.r))
        iterate, residuals = (self.z, self.jz_mu, v), (at.r, change, v_next - v)
        z, jz_mu, v_next = mixing(iterate, residuals, merit, error)
        self.mu_accepted = mixing.unless_rejected(self.mu_accepted, self.mu)
        best.finish(mixing.below(self.tol))
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
