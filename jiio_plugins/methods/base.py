"""What optimises an input: :class:`Joint` (JIIO), and what it shares with the nested loop.

That one, :class:`jiio_plugins.Nested`, takes the same steps on the variable v (the input x,
or parameters), by the same schedule; they differ in what they do about the state z and the adjoint
μ between two steps.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers import HostFlag
from jiio_plugins.equilibrium.state import row_norm, surely_finite, surely_none
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.joint.problem import Problem


class Progress(NamedTuple):
    """What a callback sees after every step."""

    iteration: int
    v: Tensor
    gradient: Tensor
    loss: Tensor
    z_residual: Tensor
    z: Tensor


@dataclass
class Path:
    """Where a method ended. Flat tensors; losses are unverified.

    Attributes:
        v, z, mu: last iterate; ``mu`` is from before the last step on v.
        jz_mu: ``J_zᵀ μ`` of it: with the ∂ℓ/∂z of where v is now, it makes the next μ.
        v_best, loss_best: iterate of least running loss per problem; after mixing, the last whose
            gain was beyond doubt, and a bound on its objective.
        bounded: whether ``loss_best`` is such a bound.
        loss_first, loss_last: running loss at the start and at the last iterate, ``(problems,)``.
        doubt_first: ‖∂ℓ/∂z‖ ‖f(z) − z‖ at the start: how far off that running loss may be.
        iterations: per row.
        z_residual, mu_residual: relative residuals of z and of the adjoint equation before the last
            step on v, ``(rows,)``.
    """

    v: Tensor
    z: Tensor
    mu: Tensor
    jz_mu: Tensor
    v_best: Tensor
    loss_best: Tensor
    loss_first: Tensor
    loss_last: Tensor
    doubt_first: Tensor
    iterations: Tensor
    z_residual: Tensor
    mu_residual: Tensor
    bounded: bool = False


Stop = Callable[[object], Tensor]


Callback = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Common part: the steps on v.

    With a ball of norm p and radius ε the step is ``v⁺ = Π(v + α_k ε · d)``, d the steepest descent
    direction of unit p-norm and α_k falling from ``step_size`` to ``final_step_size`` on a cosine.
    Without a ball it is the plain gradient step ``v⁺ = Π(v − α g)`` with α constant.

    Args:
        max_iter: steps on v. Without a ball :class:`Joint` returns no iterate that it has not
            evaluated: the last of them is not taken.
        step_size: α_0, in units of ε (one value, or one per problem); without a ball α, in units
            of v² / objective. None: 2.0 with a ball, 0.1 without.
        final_step_size: α at the last step, same units. None: with a ball 0.8 / max_iter of
            step_size, so that a short run ends in a long step; without one step_size.
        warmup: forward-only evaluations of f before the first step, at most; a row that reaches
            1e-2 needs fewer. The adjoint at a state far from the fixed point is noise. 0 is for a
            state to start with that is a fixed point already; without a state it counts as 1.
    """

    max_iter: int = 30
    step_size: float | Tensor | None = None
    final_step_size: float | Tensor | None = None
    warmup: int = 5

    def __post_init__(self) -> None:
        check_counts(self, max_iter=1, warmup=0)
        for name in ("step_size", "final_step_size"):
            value = getattr(self, name)
            steps = torch.as_tensor(0.0 if value is None else value)
            if not bool(((steps >= 0) & (steps < math.inf)).all()):
                raise ValueError(f"{name} must be finite and not negative, got {value}")

    @abc.abstractmethod
    def run(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        v: Tensor,
        stop: Stop | None = None,
        callback: Callback | None = None,
    ) -> Path:
        """Optimise from ``v`` ``(problems, d)``."""

    def restrict(self, rows: Tensor) -> Self:
        """The same method for some of the problems: theirs of the steps given one per problem."""

        def some(step: float | Tensor | None) -> float | Tensor | None:
            return step[rows] if isinstance(step, Tensor) and step.numel() > 1 else step

        return replace(
            self, step_size=some(self.step_size), final_step_size=some(self.final_step_size)
        )

    def steps(self, feasible: FeasibleSet, like: Tensor) -> list[Tensor]:
        """The step lengths α_k (times ε), ``(1 or problems, 1)`` each."""
        has_ball = feasible.radius is not None
        first = self.step_size
        if first is None:
            first = 2.0 if has_ball else 0.1
        first = _column(first, like)
        last = self.final_step_size
        if last is None:
            last = first * (0.8 / self.max_iter) if has_ball else first
        last = _column(last, like)
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
    """``(1 or problems, 1)``; a number does not make the host wait for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype).reshape(-1, 1)
    return like.new_full((1, 1), value)


class Tracker:
    """Best iterate, stopping and NaN handling, shared by the methods.

    Attributes:
        holding: problems whose v stands still because the stop condition holds, ``(problems,)``.
        finished: problems that have met it for four evaluations in a row while z moved on.
        active: 1 for the rows that still cost something, ``(rows,)``.
        none_holds: whether no problem is holding; may be False all the same.
    """

    def __init__(self, problem: Problem, v: Tensor, stop: Stop | None) -> None:
        self.groups, self.stop, self.problem = problem.groups, stop, problem
        self.v_best = v
        self.loss_best = v.new_full((len(v),), torch.inf)
        self.loss_first = self.loss_last = self.doubt = self.loss_best
        self._hold(torch.zeros(len(v), device=v.device))
        self.iterations = torch.zeros(problem.rows, device=v.device)
        self.done = HostFlag(v.device)
        self.first = True

    def see(
        self,
        v: Tensor,
        loss_rows: Tensor,
        output: object,
        b: Tensor,
        residual: Tensor,
        active: Tensor,
    ) -> None:
        """Take in an iterate: its running loss, ``∂ℓ/∂z``, ``f(z) − z``, and who paid for it."""
        self.iterations = self.iterations + active
        loss = self.groups.sum(loss_rows.detach())
        better = loss < self.loss_best
        self.v_best = torch.where(better[:, None], v, self.v_best)
        self.loss_best = torch.where(better, loss, self.loss_best)
        self.loss_last = loss
        if self.first:
            self.loss_first, self.first = loss, False
            self.doubt = self.groups.sum(row_norm(b) * row_norm(residual))
        if self.stop is not None:
            reached = self.stop(output)
            if not isinstance(reached, Tensor) or reached.dtype != torch.bool:
                raise TypeError(
                    "stop(output) must return a tensor of booleans, one per row, got "
                    f"{getattr(reached, 'dtype', type(reached).__name__)}"
                )
            if reached.shape != active.shape:
                raise ValueError(
                    f"stop(output) must return one boolean per row, shape {tuple(active.shape)}, "
                    f"got {tuple(reached.shape)}"
                )
            met = self.groups.worst((~reached).float()) == 0
            self._hold(torch.where(met, self.held + 1, torch.where(self.finished, self.held, 0.0)))

    def settle(self, problems: Tensor) -> None:
        """These problems have converged: they stand still and cost nothing from now on."""
        if not surely_none(problems):
            self._hold(torch.where(problems, self.held.clamp(min=4.0), self.held))

    def _hold(self, held: Tensor) -> None:
        self.held = held
        self.holding = held > 0
        self.finished = held >= 4
        self.active = 1.0 - self.groups.spread(self.finished.float())
        self.none_holds = surely_none(self.holding)

    def all_done(self) -> bool:
        """Whether every problem has finished (may lag on an accelerator)."""
        return self.done(self.finished.all())

    def move(self, v: Tensor, v_next: Tensor) -> Tensor:
        """``v_next`` where it is finite and the problem is not holding."""
        if self.none_holds and surely_finite(v_next):
            return v_next
        ok = torch.isfinite(v_next).all(1) & ~self.holding
        return torch.where(ok[:, None], v_next, v)

    def keep(self, now: Tensor, after: Tensor) -> Tensor:
        """``after``, but ``now`` in the rows of problems that have finished."""
        if self.none_holds:
            return after
        return torch.where(self.groups.spread(self.finished)[:, None], now, after)

    def path(
        self,
        v: Tensor,
        z: Tensor,
        mu: Tensor,
        jz_mu: Tensor,
        z_residual: Tensor,
        mu_residual: Tensor,
    ) -> Path:
        """The record of the whole run."""
        return Path(
            v,
            z,
            mu,
            jz_mu,
            self.v_best,
            self.loss_best,
            self.loss_first,
            self.loss_last,
            self.doubt,
            self.iterations,
            z_residual,
            mu_residual,
        )
