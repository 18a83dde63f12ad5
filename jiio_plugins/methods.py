"""What optimises an input: :class:`Joint` (JIIO), and what it shares with the nested loop.

That one, :class:`jiio_plugins.nested.Nested`, takes the same steps on the variable v (the input x,
or parameters), by the same schedule; they differ in what they do about the state z and the adjoint
μ between two steps.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import torch
from torch import Tensor

from jiio_plugins._state import check_counts, nowhere, relative, row_norm, surely_finite
from jiio_plugins.mixing import MIXINGS, Descent
from jiio_plugins.solvers import FlatMap, HostFlag

if TYPE_CHECKING:
    from jiio_plugins._problem import Problem
    from jiio_plugins.constraints import FeasibleSet


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
        self, v: Tensor, loss_rows: Tensor, output: object, b: Tensor, residual: Tensor,
        active: Tensor,
    ) -> None:  # fmt: skip
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
        if not nowhere(problems):
            self._hold(torch.where(problems, self.held.clamp(min=4.0), self.held))

    def _hold(self, held: Tensor) -> None:
        self.held = held
        self.holding = held > 0
        self.finished = held >= 4
        self.active = 1.0 - self.groups.spread(self.finished.float())
        self.none_holds = nowhere(self.holding)

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
        self, v: Tensor, z: Tensor, mu: Tensor, jz_mu: Tensor, z_residual: Tensor,
        mu_residual: Tensor,
    ) -> Path:  # fmt: skip
        """The record of the whole run."""
        return Path(
            v, z, mu, jz_mu, self.v_best, self.loss_best, self.loss_first, self.loss_last,
            self.doubt, self.iterations, z_residual, mu_residual,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Joint(Method):
    """JIIO: z, μ and v advance together; no solve is run to its end.

    One iteration at ``(z, w, v)``, where ``w`` stands for ``J_zᵀμ`` and ω = ``relaxation``::

        z ← z + ω (f(z, v) − z)            state_steps times, the last one with its graph and with
                                           what comes before and after the layer
        μ = w + ∂ℓ/∂z at f(z, v)           the head's gradient is free: it needs no VJP of f
        w ← J_zᵀ μ                         one VJP, which yields J_vᵀμ too; in the first
                                           adjoint_warmup iterations these two lines twice
        v ← Π(v + α d(J_vᵀμ + ∂ℓ/∂v))

    Deviations from the paper, each measured at equal cost: the adjoint carries ``J_zᵀμ`` rather
    than μ, so that it always holds the current ∂ℓ/∂z; the head sees f(z, v) rather than z, a state
    one step further that is there anyway; with a ball, two evaluations of f for each VJP
    (``state_steps=1`` is the paper's one), a second step of the adjoint while v makes its longest
    steps and μ has only just begun, z over-relaxed where the paper damps it, and no mixing over the
    history while v moves by normalised steps. The two residuals at one v tell whether ω is
    too long for a row: if a layer's second is not smaller, the row's ω is halved.

    Without a ball v settles, and the history of z, μ and v helps it to (``mixing``): by L-BFGS
    steps of v that z and μ follow along their secants (:class:`jiio_plugins.mixing.QuasiNewton`),
    which goes far in few iterations; or by Anderson's method on all three at once as in the paper
    (:class:`jiio_plugins.mixing.BlockAnderson`), which settles to more digits where z and μ
    converge slowly. An iterate that makes a problem's objective worse is taken back
    (:class:`jiio_plugins.mixing.Descent`).

    Args:
        state_steps: evaluations of f an iteration; one where there is mixing.
        adjoint_warmup: iterations at the beginning that take a second VJP; 0 where there is mixing.
        relaxation: ω in (0, 2). With one state step more than 1 counts as 1, as nothing would tell
            that it is too long; 1 where there is mixing.
        mixing: "quasi-newton" or "anderson", for problems without a ball.
        acceleration: memory of the mixing, in iterations; 0 switches it off.
        tol: without a ball: relative residual of all three blocks at which the loop stops.

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

    def run(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        v: Tensor,
        stop: Stop | None = None,
        callback: Callback | None = None,
    ) -> Path:
        """See :class:`Method`."""
        z = problem.warm_up(v, self.warmup)
        mix = None
        if feasible.radius is None and self.acceleration:
            mix = Descent(MIXINGS[self.mixing](self.acceleration), problem.groups)
        relaxation = self.relaxation if mix is None else 1.0
        # with one state step there is no second residual at the same v that could halve it
        longest = 1.0 if self.state_steps == 1 else 2.0
        omega = torch.full_like(z[:, :1], min(relaxation, longest))
        track = Tracker(problem, v, stop)
        w = torch.zeros_like(z) if problem.jz_mu_start is None else problem.jz_mu_start
        mu_accepted = torch.zeros_like(z)
        for k, step in enumerate(self.steps(feasible, v)):
            active = track.active
            before = None
            if k > 0 and mix is None and self.state_steps > 1 and z.shape[1]:
                before = _StateSteps(self.state_steps - 1, omega)
                problem.pay_passes(f_evals=before.steps * active)
            lin = problem.linearize(v, z, advance=before)
            z = z if before is None else lin.z
            loss = problem.loss(lin.output)
            b, direct = lin.gradient(loss)
            mu = w + b
            if mix is None and k < self.adjoint_warmup:
                w = _finite(lin.jz_mu(mu), w)
                mu = w + b
                problem.pay_passes(vjps=active)
            jz_mu, jv_mu = lin.vjp(mu)
            gradient = (direct + jv_mu).reshape(v.shape)
            problem.pay_passes(f_evals=active, vjps=active)
            r = lin.f - z
            track.see(v, loss, lin.output, b, r, active)
            if callback is not None:
                callback(Progress(k, v, gradient, loss.detach(), relative(r, lin.f), z))
            w_before = w
            v_next = feasible.project(v + step * feasible.descent_direction(gradient, v))
            if mix is None:
                size = row_norm(r)
                if before is not None:
                    assert problem.layout is not None
                    shrank = before.shrank(problem.layout.split(r))
                    omega = torch.where(shrank, omega, (omega / 2).clamp(min=0.1))
                z = _step(z, omega, r, size)
                w = _finite(jz_mu, w)
            else:
                change = jz_mu - w
                value = problem.groups.sum(loss.detach() + (lin.own_jz_mu * r).sum(1))
                doubt = problem.groups.sum(row_norm(change) * row_norm(r))
                z_next, w_next, v_next = mix((z, w, v), (r, change, v_next - v), value, doubt)
                mu_accepted = mix.unless_worse(mu_accepted, mu)
                track.settle(mix.below(self.tol))
                z, w = track.keep(z, z_next), track.keep(w, w_next)
                v_next = feasible.project(v_next)
            v = track.move(v, v_next)
            if track.all_done():
                break
        z_residual, mu_residual = relative(r, lin.f), relative(jz_mu - w_before, mu)
        if mix is not None:  # the last trial has not been evaluated: it may be worse
            z, w, v = mix.accepted
            path = track.path(v, z, mu_accepted, w, z_residual, mu_residual)
            return replace(path, v_best=mix.safe_v, loss_best=mix.safe_limit, bounded=True)
        return track.path(v, z, mu, w, z_residual, mu_residual)


class _StateSteps:
    """Steps on z where a layer is visited, so that the rest of the network runs once for all.

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

        Each by itself: a later layer starts with the jump of what goes into it, and that it
        shrinks says nothing about an earlier one.
        """
        smaller = [row_norm(now) < size for now, size in zip(r, self.sizes, strict=True)]
        return torch.stack(smaller, dim=1).all(1, keepdim=True)


def _finite(new: Tensor, old: Tensor) -> Tensor:
    """``new``; ``old`` for a row in which it holds NaN or Inf."""
    return torch.where(torch.isfinite(row_norm(new))[:, None], new, old)


def _step(z: Tensor, omega: Tensor, r: Tensor, size: Tensor) -> Tensor:
    """``z + ω r``; z for a row in which ‖r‖ = ``size`` says that r holds NaN or Inf."""
    return torch.where(torch.isfinite(size)[:, None], torch.addcmul(z, omega, r), z)
