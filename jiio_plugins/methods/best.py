"""The best iterate of a run, and which problems have finished."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers import HostFlag
from jiio_plugins.equilibrium.state import surely_finite, surely_none

if TYPE_CHECKING:
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.records import Evaluation, Stop


class BestSoFar:
    """Best iterate, stopping and NaN handling.

    Args:
        problem: what is optimised.
        stop: ``stop(output) -> (rows,)`` booleans, or None.

    Attributes:
        v: iterate of least running loss, ``(problems, d)``.
        loss: that loss, ``(problems,)``.
        v_sure: of the iterates at which z was solved for from the initial state, that of least
            loss, ``(problems, d)``.
        loss_sure: that loss, ``(problems,)``. It is inf where there was none.
        loss_first: the loss at the start, see :class:`MethodResult`, ``(problems,)``.
        shift_first: by how much that differs from the running loss, ``(problems,)``.
        error_first: how far off ``loss_first`` may be, ``(problems,)``.
        loss_last: running loss at the last evaluation, ``(problems,)``.
        iterations: so far, ``(rows,)``.
        active: 1 for the rows that still cost something, else 0, ``(rows,)``.
        met: evaluations in a row at which the stop condition has held, ``(problems,)``.
        finished: problems that cost nothing more, bool ``(problems,)``: that has been four of them
            while z moved on, or they are at rest.
        free: problems whose v moves, bool ``(problems,)``: they have not finished, and the stop
            condition does not hold.
        resting: problems that were at rest at the last evaluation, bool ``(problems,)``.
        all_free: whether all of them do. On an accelerator, where asking would make the host wait,
            it is always False.
        carried: names of the tensors that are taken from one iteration to the next.
    """

    carried = (
        *("v", "loss", "loss_first", "shift_first", "error_first", "loss_last", "iterations"),
        *("met", "free", "finished", "active", "resting"),
    )

    def __init__(self, problem: Problem, stop: Stop | None) -> None:
        self.groups, self.stop = problem.groups, stop
        v = self.v = problem.v_start
        self.loss = v.new_full((len(v),), torch.inf)
        self.v_sure, self.loss_sure = v, self.loss
        self.loss_first = self.shift_first = self.error_first = self.loss_last = self.loss
        self.met = torch.zeros(len(v), device=v.device)
        self.resting = self.met > 0
        self._stand(self.resting)
        self.iterations = torch.zeros(problem.rows, device=v.device)
        self.flag = HostFlag(v.device)
        self.first = True

    def update(
        self, v: Tensor, at: Evaluation, anchored: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Take in what was found at ``v``.

        Where z turns out to have been at another fixed point than the one that a solve from the
        initial state finds, no loss so far is that of the model. The best iterate is then among
        those to come.

        Args:
            v: the variable, ``(problems, d)``.
            at: the evaluation there.
            anchored: see :attr:`Iteration.anchored`.

        Raises:
            TypeError: the stop condition is not of booleans.
            ValueError: it has another shape than ``(rows,)``.
        """
        self.iterations = self.iterations + self.active
        loss = self.groups.sum(at.loss)
        if anchored is not None:
            looked, elsewhere = anchored
            surer = looked & (loss < self.loss_sure)
            self.v_sure = torch.where(surer[:, None], v, self.v_sure)
            self.loss_sure = torch.where(surer, loss, self.loss_sure)
            self.loss = torch.where(elsewhere, torch.inf, self.loss)
        better = loss < self.loss
        self.v = torch.where(better[:, None], v, self.v)
        self.loss = torch.where(better, loss, self.loss)
        self.loss_last = loss
        if self.first:
            self.first = False
            self.loss_first = loss + self.groups.sum(at.shift)
            self.shift_first = self.groups.sum(at.shift.abs())
            self.error_first = self.groups.sum(at.shift_error)
        if self.stop is not None:
            # z lags behind v, so the condition may hold for a moment only: four in a row count
            met = self.groups.worst((~self._reached(self.stop, at.output)).float()) == 0
            self.met = torch.where(met, self.met + 1, 0.0)
            self._stand(self.finished | (self.met >= 4))

    def _reached(self, stop: Stop, output: object) -> Tensor:
        reached, shape = stop(output), self.active.shape
        if not isinstance(reached, Tensor) or reached.dtype != torch.bool:
            raise TypeError(
                "stop(output) must return a tensor of booleans, one per row, got "
                f"{getattr(reached, 'dtype', type(reached).__name__)}"
            )
        if reached.shape != shape:
            raise ValueError(
                f"stop(output) must return one boolean per row, shape {tuple(shape)}, "
                f"got {tuple(reached.shape)}"
            )
        return reached

    def finish(self, problems: Tensor) -> None:
        """Let these problems, bool ``(problems,)``, stand still and cost nothing more."""
        if not surely_none(problems):
            self._stand(self.finished | problems)

    def rest(self, problems: Tensor) -> None:
        """Finish those, bool ``(problems,)``, that are at rest for the second time in a row."""
        self.finish(problems & self.resting)
        self.resting = problems

    def _stand(self, finished: Tensor) -> None:
        """Who has finished, and so who moves."""
        self.finished, on = finished, ~finished
        self.active = self.groups.spread(on.float())
        self.free = on if self.stop is None else on & (self.met == 0)
        self.all_free = self.free.device.type == "cpu" and bool(self.free.all())

    def all_finished(self) -> bool:
        """Whether every problem has finished. On an accelerator the answer may lag."""
        return self.flag(self.finished.all())

    def move(self, v: Tensor, v_next: Tensor) -> Tensor:
        """The proposed v where it is finite and its problem free, else the old one.

        Args:
            v: where the step starts, ``(problems, d)``.
            v_next: where it ends, ``(problems, d)``.
        """
        if self.all_free and surely_finite(v_next):
            return v_next
        # v stands still so that z can catch up, and show whether the condition holds
        largest = torch.linalg.vector_norm(v_next, math.inf, dim=1)
        return torch.where(((largest < math.inf) & self.free)[:, None], v_next, v)

    def keep(self, now: Tensor, after: Tensor) -> Tensor:
        """The new tensor, but the old one in the rows of problems that have finished.

        Args:
            now: what there is, ``(rows, ...)``.
            after: what would come next, ``(rows, ...)``.
        """
        if self.all_free:
            return after
        return torch.where(self.groups.spread(self.finished)[:, None], now, after)
