"""One round of a run: z, μ and the loss at v, the best iterate, and the step on v.

What a method does about the state z and the adjoint μ in it is its :class:`Iteration`. All else is
:class:`Round`.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch

from jiio_plugins.equilibrium.state import surely_none
from jiio_plugins.methods.records import MethodResult, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.best import BestSoFar
    from jiio_plugins.methods.records import Callback, Evaluation


class Iteration(abc.ABC):
    """One run of a method: what it does about z and μ between two steps on v.

    Attributes:
        z: state, flat, ``(rows, n)``.
        mu: adjoint μ, ``(rows, n)``.
        jz_mu: ``J_zᵀμ``, ``(rows, n)``.
        mu_residual: ``‖J_zᵀμ + ∂ℓ/∂z − μ‖ / ‖μ‖`` at the last evaluation, ``(rows,)``.
        anchored: problems whose z has just been solved for from the initial state, and those of
            them in which that was elsewhere, bool ``(problems,)`` each. None: z is a warm one.
        capture: whether steady iterations are to be captured where the device can
            (:mod:`jiio_plugins.methods.captured`).
        carried: names of the tensors that it takes from one iteration to the next.
    """

    anchored: tuple[Tensor, Tensor] | None = None
    capture: bool = False
    carried: tuple[str, ...] = ("z", "mu", "jz_mu", "mu_residual")
    z: Tensor
    mu: Tensor
    jz_mu: Tensor
    mu_residual: Tensor

    @abc.abstractmethod
    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """Take z and μ on at ``v``, and tell the loss and its gradient there.

        Args:
            k: number of the iteration, from 0 on.
            v: the variable, ``(problems, d)``.
            active: 1 for the rows that still cost something, else 0, ``(rows,)``.
        """

    def move(
        self, v: Tensor, step: Tensor, to: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The step on v, and where it ends. Here it is as long as the schedule says.

        Args:
            v: where it starts, ``(problems, d)``.
            step: its length by the schedule, ``(1 or problems, 1)``.
            to: ``length -> v⁺`` in the constraint set, ``(problems, d)``.

        Returns:
            Its length, ``(1 or problems, 1)``, and v⁺.
        """
        return step, to(step)

    def advance(self, at: Evaluation, v: Tensor, v_next: Tensor, best: BestSoFar) -> Tensor:
        """Take z and μ along with v, and say where v goes. Here that is ``v_next``.

        Args:
            at: the evaluation at ``v``.
            v: where the step starts, ``(problems, d)``.
            v_next: where a plain step ends, in the constraint set, ``(problems, d)``.
            best: which problems still move.

        Returns:
            The next v, ``(problems, d)``.
        """
        return v_next

    def gradient_error(self, at: Evaluation) -> Tensor:
        """How wrong the gradient may be, relatively, ``(rows,)``. Here what residuals say.

        Args:
            at: the evaluation.
        """
        return torch.maximum(at.z_residual, at.mu_residual)

    def steady(self, k: int) -> bool:
        """Whether iteration k and those to come do the same, but for what their tensors hold.

        As far as the host knows. Here they never do.

        Args:
            k: number of the iteration, from 0 on.
        """
        return False

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """The record of the whole run.

        Args:
            at: the last evaluation.
            v: where the run ended, ``(problems, d)``.
            best: the best iterate, and what it knows of the others.
        """
        return MethodResult(
            v=v,
            z=self.z,
            mu=self.mu,
            jz_mu=self.jz_mu,
            v_best=best.v,
            loss_best=best.loss,
            v_sure=best.v_sure,
            loss_sure=best.loss_sure,
            loss_first=best.loss_first,
            shift_first=best.shift_first,
            error_first=best.error_first,
            loss_last=best.loss_last,
            iterations=best.iterations,
            z_residual=at.z_residual,
            mu_residual=self.mu_residual,
        )


class Round:
    """What :meth:`jiio_plugins.methods.Method.run` does once for each step on v.

    Args:
        problem: what is optimised.
        iteration: what the method does about z and μ.
        best: the best iterate.
        direction: where v goes, ``(gradient, v) -> direction``.
        gap_tol: share of the first-order gain below which v is at rest.
        callback: called with a :class:`Progress` after every evaluation. None: nothing is.

    Attributes:
        v: the variable, ``(problems, d)``.
        at: the last evaluation.
    """

    def __init__(
        self,
        problem: Problem,
        iteration: Iteration,
        best: BestSoFar,
        direction: Callable[[Tensor, Tensor], Tensor],
        gap_tol: float,
        callback: Callback | None,
    ) -> None:
        self.feasible, self.groups = problem.feasible, problem.groups
        self.iteration, self.best, self.callback = iteration, best, callback
        self.direction, self.gap_tol = direction, gap_tol
        self.v = problem.v_start
        self.at: Evaluation | None = None

    def __call__(self, k: int, step: Tensor) -> None:
        """Evaluate at v, and take v on.

        Args:
            k: number of the step, from 0 on.
            step: its length, ``(1 or problems, 1)``.
        """
        v, best, iteration, feasible = self.v, self.best, self.iteration, self.feasible
        self.at = None  # it need not outlive the next one's making
        at = self.at = iteration.evaluate(k, v, best.active)
        best.update(v, at, iteration.anchored)
        if self.callback is not None:
            known = at.z_residual, at.z, at.mu_residual
            self.callback(Progress(k, v, at.gradient, at.loss, *known))
        direction = self.direction(at.gradient, v)
        step, v_next = iteration.move(
            v, step, lambda length: feasible.project(torch.addcmul(v, length, direction))
        )
        if feasible.norm not in (None, 1) and self.gap_tol:
            small = _gains_little(self.gap_tol, feasible, at.gradient, step, v, v_next)
            if not surely_none(small):
                # a gradient that is off by an angle has rest where its square is left
                error = self.groups.worst(iteration.gradient_error(at))
                small = small & (error <= self.gap_tol**0.5)
            best.rest(small)
        self.v = best.move(v, iteration.advance(at, v, v_next, best))


def _gains_little(
    share: float, feasible: FeasibleSet, gradient: Tensor, step: Tensor, v: Tensor, v_next: Tensor
) -> Tensor:
    """Whether a step still gains less than a share of what all have, ``(problems,)``.

    To first order. It does not where v⁺ is no gain over the center.
    """
    assert feasible.radius is not None
    gained = (gradient * (feasible.center - v_next)).sum(1, keepdim=True)
    gains = (gradient * (v - v_next)).sum(1, keepdim=True)
    limit = torch.addcdiv(gains, gains, step / feasible.radius) / share
    return (gained > limit.clamp(min=0)).squeeze(1)
