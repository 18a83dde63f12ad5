"""The one loop over the variable, and what all methods share.

A method optimises the variable v: the input x, or parameters of the model. :meth:`Method.run` is
the loop, and one turn of it is a :class:`jiio_plugins.methods.round.Round`. What a method does
about the state z and the adjoint μ between two steps on v is its :class:`Iteration`. :func:`solve`
runs a method where nothing of the caller's is disturbed.

Read on in :mod:`jiio_plugins.methods.joint`, where z, μ and v advance together, and in
:mod:`jiio_plugins.methods.nested`, the two solves that this replaces. What a method works on is a
:class:`jiio_plugins.joint.Problem`. What it found is judged in :mod:`jiio_plugins.verification`.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, final

import torch
from torch import Tensor

from jiio_plugins.equilibrium.counting import counting_into
from jiio_plugins.methods.best import BestSoFar
from jiio_plugins.methods.captured import Captured, can_capture
from jiio_plugins.methods.round import Iteration, Round
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.records import Callback, MethodResult, Stop

# α_0 by default, in units of ε. In an L2 ball a short run takes longer steps, so that all of them
# together are about as long as half of _WAY.
_FIRST, _LONGEST, _WAY = 2.0, 3.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """The steps on v, and the loop that takes them.

    With a ball of norm p and radius ε the step is ``v⁺ = Π(v + α_k ε · d)``. Here d is the steepest
    descent direction of unit p-norm, and α_k falls from ``step_size`` to ``final_step_size`` on a
    cosine. Without a ball it is the plain gradient step ``v⁺ = Π(v − α g)``, whose α is constant
    unless a ``final_step_size`` is given.

    In a ball v comes to rest where the projection takes a step back. A problem leaves at the second
    iteration in a row in which a step gains little to first order, for a gradient g and a ball
    around c::

        (1 + 1/α) gᵀ(v⁺ − v) / gᵀ(v⁺ − c) < gap_tol

    Args:
        max_iter: steps on v. Without a ball :class:`Joint` returns no iterate that it has not
            evaluated: the last of them is not taken.
        step_size: α_0 in units of ε, a number or one per problem. Without a ball α, in units of
            v²/objective. None: 2.0 with a ball, but 30 / max_iter up to 3.0 in an L2 ball, where a
            short run goes further by longer steps. 0.1 without one.
        final_step_size: α at the last step, in the same units. None: with a ball 0.8 / max_iter of
            step_size (of 2.0, where that is None), so that a short run ends in a long step.
            Without one it is step_size.
        warmup: forward-only evaluations of f before the first step, at most. A row that reaches a
            relative residual of 0.1 with a ball, else or with a state given 1e-2, needs fewer. The
            adjoint at a state far from the fixed point is noise. 0 is for a state to start with
            that is a fixed point already. Without a state it counts as 1.
        precision: dtype in which the loop runs the model under autocast, such as
            ``torch.bfloat16``. v and the solvers' states stay as they are, and so does the final
            verification. None: as the model is.
        gap_tol: share of the first-order gain so far below which v is at rest. On a sphere it is
            the square of the angle between v − c and d. Only where the gradient has settled: the
            residuals of z and μ tell it, or where a cell contracts slowly their last moves. Not in
            an L1 ball, where a step moves one entry. 0: all problems take all steps.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range, or another precision.
    """

    max_iter: int = 30
    step_size: float | Tensor | None = None
    final_step_size: float | Tensor | None = None
    warmup: int = 5
    precision: torch.dtype | None = None
    gap_tol: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, max_iter=1, warmup=0)
        if not self.gap_tol >= 0:
            raise ValueError(f"gap_tol must not be negative, got {self.gap_tol}")
        for name in ("step_size", "final_step_size"):
            value = getattr(self, name)
            steps = torch.as_tensor(0.0 if value is None else value)
            if not bool(((steps >= 0) & (steps < math.inf)).all()):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"precision must be torch.bfloat16, torch.float16 or None, got {self.precision!r}"
            )

    @abc.abstractmethod
    def start(self, problem: Problem) -> Iteration:
        """What goes on between the steps of one run on ``problem``."""

    def directions(self, feasible: FeasibleSet) -> Callable[[Tensor, Tensor], Tensor]:
        """Where v goes in one run: ``(gradient, v) -> direction``, all ``(problems, d)``.

        The steepest descent of the set. A method that remembers gradients, such as Adam, has
        others.
        """
        return feasible.descent_direction

    @final
    def run(
        self, problem: Problem, *, stop: Stop | None = None, callback: Callback | None = None
    ) -> MethodResult:
        """Optimise from ``problem.v_start``.

        Args:
            problem: what to optimise.
            stop: ``stop(output) -> (rows,)`` booleans. A problem for which it holds four
                evaluations in a row is finished. None: no problem is.
            callback: called with a :class:`Progress` after every evaluation. None: nothing is.

        Raises:
            TypeError: ``stop`` returns anything but booleans.
            ValueError: it returns another shape, or the step sizes are not one per problem.
        """
        best = BestSoFar(problem, stop)
        with problem.in_precision(self.precision):
            iteration = self.start(problem)
            direction = self.directions(problem.feasible)
            turn = Round(problem, iteration, best, direction, self.gap_tol, callback)
            captured = iteration.capture and callback is None and can_capture(turn.v.device)
            once = Captured(turn, problem) if captured else turn
            for k, step in enumerate(self.steps(problem.feasible, turn.v)):
                once(k, step)
                if best.all_finished():
                    break
        assert turn.at is not None
        return iteration.finish(turn.at, turn.v, best)

    def restrict(self, rows: Tensor) -> Self:
        """The method for the problems of these indices, with their step sizes if each has one."""

        def some(step: float | Tensor | None) -> float | Tensor | None:
            return step[rows] if isinstance(step, Tensor) and step.numel() > 1 else step

        return replace(
            self, step_size=some(self.step_size), final_step_size=some(self.final_step_size)
        )

    def steps(self, feasible: FeasibleSet, like: Tensor) -> list[Tensor]:
        """The step lengths ``α_k ε``, ``(1 or problems, 1)`` each. Without a ball they are α_k.

        Args:
            feasible: the constraint set, whose radius is ε.
            like: v, ``(problems, d)``, for dtype and device.

        Raises:
            ValueError: the step sizes are neither one nor one per problem.
        """
        has_ball = feasible.radius is not None
        first = self.step_size
        if first is None:
            first = _FIRST if has_ball else 0.1
        last = self.final_step_size
        if last is None:
            last = first * (0.8 / self.max_iter) if has_ball else first
        if self.step_size is None and feasible.norm == 2:
            first = min(max(_FIRST, _WAY / self.max_iter), _LONGEST)
        first, last = _column(first, like), _column(last, like)
        for name, value in (("step_size", first), ("final_step_size", last)):
            if len(value) not in (1, len(like)):
                raise ValueError(
                    f"{name} must hold one value or one per problem ({len(like)}), got {len(value)}"
                )
        scale = feasible.radius if feasible.radius is not None else like.new_ones(1, 1)
        share = torch.arange(self.max_iter, dtype=like.dtype, device=like.device)
        mix = 0.5 * (1 + torch.cos(math.pi * share / max(1, self.max_iter - 1)))
        return list(scale * (last + (first - last) * mix[:, None, None]))


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """``(1 or problems, 1)``. A number does not make the host wait for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype).reshape(-1, 1)
    return like.new_full((1, 1), value)


def solve(
    problem: Problem, method: Method, *, stop: Stop | None = None, callback: Callback | None = None
) -> MethodResult:
    """Run a method where nothing of the caller's is disturbed.

    The problem keeps the costs per row. What its layers would report one by one counts twice, so
    open counters are told nothing here.

    Args:
        problem: what to optimise.
        method: how.
        stop: see :meth:`Method.run`.
        callback: see :meth:`Method.run`.

    Raises:
        TypeError, ValueError: see :meth:`Method.run`.
    """
    with torch.enable_grad(), problem.variable.guarded(), counting_into(()):
        return method.run(problem, stop=stop, callback=callback)
