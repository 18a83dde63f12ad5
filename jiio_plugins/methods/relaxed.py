"""z and μ along with a v that moves by normalised steps inside a ball.

:class:`Relaxed` is the iteration that :class:`jiio_plugins.methods.Joint` describes: over-relaxed
steps on z where the cell contracts well, and in slow rows as many mixed ones as it takes to settle
z and μ at each v. The steps on z are in :mod:`jiio_plugins.methods.steps`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers import Anderson, HostFlag
from jiio_plugins.equilibrium.state import by_row, relative, row_norm, surely_none
from jiio_plugins.methods.inverse import SecantInverse
from jiio_plugins.methods.iteration import JointIteration
from jiio_plugins.methods.records import Followed
from jiio_plugins.methods.round import Iteration
from jiio_plugins.methods.steps import MEMORY, StateSteps
from jiio_plugins.methods.swings import overshoot, shortened

if TYPE_CHECKING:
    from collections.abc import Callable

    from jiio_plugins.joint.linearization import Linearization
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Method
    from jiio_plugins.methods.best import BestSoFar
    from jiio_plugins.methods.records import Evaluation, MethodResult

# A row is slow where a mixed evaluation brings z nearer to its fixed point by no less than this, or
# where plain steps lose it: ω has been halved three times, or μ has this relative residual.
_SLOW = 0.6
_SHORT = 0.2
_LOST = 0.5
_BEGIN = 3  # iterations in which the residual of μ says only that it has just begun
_GROWN = 1.0  # unless it is no smaller than this: J_zᵀ makes μ larger
# A slow row's z and μ have settled where a mixed step moves them by less (relative). As v comes to
# rest, what they are off by is more and more of what is left to be gained. The first step is the
# longest, and the loss at the start is told from there.
_SETTLED_FIRST, _SETTLED_THEN, _SETTLED_LAST = 0.02, 0.1, 0.02
# A fast row takes no step on z alone where its residual is below this share of that of μ.
_AHEAD = 0.125
_LOOSER = 2.0  # z, times that: the adjoint is what the step on v hangs on
_ANCHORED = 5  # iterations that an anchor serves at least: it costs as much as they do
# Evaluations of f that an anchor may take in any run: it need only tell one fixed point from
# another. In a long one it may take half as many as there are iterations.
_ANCHOR_LEAST = 15
_ELSEWHERE = 0.1  # z further than this from the anchor (relative) is at another fixed point
_NEAR = 0.1  # a step on v of less than this share of its way from the center hardly turns gradients


class _Anchor(Anderson):
    """Solves from the initial state until the residual is 1 % of what it was there."""

    @property
    def reduction(self) -> float:
        return 1e-2


class Following(NamedTuple):
    """How z and μ follow v. The fields are those of :class:`jiio_plugins.methods.Joint`."""

    state_steps: int
    max_state_steps: int
    max_adjoint_steps: int
    anchors: int
    adjoint_warmup: int
    relaxation: float


class Relaxed(JointIteration):
    """z by over-relaxed steps where the cell contracts well, by mixed ones where it does not.

    Attributes:
        omega: length of the relaxed steps, ``(rows, 1)``. It is halved where it proves too long.
        slow: rows whose z and μ are settled at each v, bool ``(rows,)``.
        spares: whether a fast row may do without steps on z.
        lags: rows whose z is not well ahead of μ, bool ``(rows,)``.
        unsure: slow rows whose z may have gone over to another fixed point, bool ``(rows,)``: it or
            μ has not settled at some v, or z was at another one when that was last looked at.
        shortens: whether steps on v are shortened where it swings.
        overshoot: by how much whole moves of v are too long, ``(problems, 1)``.
        v_last: where the last gradient was taken, ``(problems, d)``.
        v_before: where the one before it was taken, likewise.
        z_start: state before it was taken on at this v, ``(rows, n)``.
    """

    leaves = True
    ends = (*JointIteration.ends, "slow")
    per_row = ("omega", "slow", "unsure", "lags")
    carried = (*Iteration.carried, "omega", "slow", "unsure", "v_last")

    def __init__(
        self, method: Method, problem: Problem, following: Following, capture: bool = False
    ) -> None:
        super().__init__(method, problem)
        # a graph draws other random numbers than the rounds before it
        self.capture = capture and not problem.variable.repeatable
        self.following = following
        self.vjp_twice, self.share = following.adjoint_warmup, _SETTLED_FIRST
        # with one state step there is no second residual at the same v that could halve it
        longest = 1.0 if following.state_steps == 1 else 2.0
        self.omega = torch.full_like(self.z[:, :1], min(following.relaxation, longest))
        layers = bool(problem.layout.layouts)
        self.controlled = layers and following.max_state_steps > following.state_steps > 1
        self.slow = (self.rate > _SLOW) & self.controlled
        self.unsure = torch.zeros_like(self.slow)
        # on an accelerator, and where rows cannot be told apart, a step left out saves nothing
        on_cpu = self.z.device.type == "cpu"
        self.spares = self.controlled and on_cpu and problem.row_separable
        self.v_last, self.overshoot = problem.v_start, torch.ones_like(problem.v_start[:, :1])
        # on an accelerator the operations that tell a swing cost about what they save
        self.shortens = self.controlled and on_cpu and problem.feasible.norm == 2
        if self.shortens:
            self.carried = (*self.carried, "overshoot")
        self.lags = torch.ones_like(self.slow)
        self.some_slow = HostFlag(self.z.device, known=True)
        # z follows v from where it is, and so it may stay with a fixed point that a solve from the
        # initial state no longer finds. Given a state, that is what z is meant to follow. In train
        # mode another solve would draw other random numbers
        fresh = problem.state is None and not problem.variable.repeatable
        parts = min(following.anchors, method.max_iter // _ANCHORED) + 1 if fresh else 1
        self.anchors = {round(k * method.max_iter / parts) for k in range(1, parts)}
        self.anchor = _Anchor(max_iter=max(_ANCHOR_LEAST, method.max_iter // 2), tol=0.0)
        self.inverse: SecantInverse | None = None
        self.recalled: Tensor | None = None  # the rows that these are of, None: all
        self.mu_last: tuple[Tensor, Tensor, Tensor] | None = None  # μ, (J_zᵀ − I) μ, slow rows

    def prepare(self, k: int, v: Tensor, active: Tensor) -> None:
        """See :class:`JointIteration`. Whether there are slow rows, and how far they settle."""
        last, self.v_before, self.v_last = self.method.max_iter - 1, self.v_last, v
        self.first, part = k == 0 and last > _BEGIN, k / max(1, last)  # few steps cannot spare one
        self.share = _SETTLED_THEN ** (1 - part) * _SETTLED_LAST**part if k else _SETTLED_FIRST
        self.adjoint_begun = k > _BEGIN
        self.control, self.anchored = self._any_slow(), None
        if k in self.anchors and self.control and not surely_none(self.unsure):
            self._anchor(v, active)
        self.z_start = self.z

    def move(
        self, v: Tensor, step: Tensor, to: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Iteration`."""
        if not self.shortens:
            return super().move(v, step, to)
        radius, known = self.problem.feasible.radius, self.overshoot
        assert radius is not None
        length = shortened(step, radius, known)
        v_next = to(length)
        self.overshoot = overshoot(v_next - v, v - self.v_before, known)
        if torch.equal(self.overshoot, known):
            return length, v_next
        length = shortened(step, radius, self.overshoot)
        return length, to(length)

    def _any_slow(self) -> bool:
        """Whether there may be slow rows."""
        return self.controlled and self.some_slow(self.slow.any())

    def steady(self, k: int) -> bool:
        """See :class:`Iteration`. They are where the adjoint has begun and no row is slow."""
        return k > _BEGIN and k >= self.vjp_twice and not self._any_slow()

    def _anchor(self, v: Tensor, active: Tensor) -> None:
        """Solve slow rows from the initial state, and go on from there where that is elsewhere."""
        problem, unsure, rows, among = self.problem, self.unsure & (active > 0), self.rows, None
        if v.device.type == "cpu" and problem.row_separable:
            among = unsure.nonzero().squeeze(1)
            rows = among if rows is None else rows[among]
        found = problem.solve(v, self.anchor, rows=rows)
        z, evals = found.fz, found.evals
        if among is not None:
            z = self.z.index_copy(0, among, z)
            evals = torch.zeros_like(active).index_copy(0, among, evals)
        problem.pay(f_evals=self.spread(evals * unsure))
        # NaN is no state to go on from
        far = _ELSEWHERE + found.amplification * found.residual  # it may not have arrived itself
        if among is not None:
            far = far.new_zeros(len(active)).index_copy(0, among, far)
        elsewhere = unsure & (row_norm(z - self.z) > far * row_norm(z))
        self.z = torch.where(elsewhere[:, None], z, self.z)
        self.unsure = elsewhere
        worst = problem.groups.worst
        looked, left = (worst(self.spread(rows.float())) > 0 for rows in (unsure, elsewhere))
        self.anchored = looked, left

    def state_steps(self, k: int, active: Tensor) -> StateSteps | None:
        """No relaxed ones in the first iteration, after the warm-up."""
        following = self.following
        if following.state_steps == 1 or not self.problem.layout.layouts:
            return None
        lags = self.lags if self.spares and k > 1 else None  # the first step on v is the longest
        if self.control:
            most = following.max_state_steps - 1 + (0 if k else following.max_state_steps)
            slow = self.slow & (active > 0)
            steps = following.state_steps - 1 if k else 0
            share = _LOOSER * self.share
            return StateSteps(steps, self.omega, slow, most, share, self.method.precision, lags)
        return StateSteps(following.state_steps - 1, self.omega, lags=lags) if k else None

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
        self.pay_vjps(active)
        running, rows, before = self.slow & (active > 0), linearized.apart, self.jz_mu
        if rows is None:

            def product(mu: Tensor, last: bool) -> tuple[Tensor, Tensor]:
                return linearized.vjp(mu, last=last)

            found = self._settle(product, self.mu, before, dl_dz, running)
            self.mu, self.jz_mu_before, settled, jz_mu, jv_mu = found
        else:

            def product(mu: Tensor, last: bool) -> tuple[Tensor, Tensor]:
                return linearized.jz_mu_apart(mu), mu

            some = self.mu[rows], before[rows], dl_dz[rows], running[rows]
            found = self._settle(product, *some, rows)
            whole = self.mu, before, before
            put = [t.index_copy(0, rows, x) for t, x in zip(whole, found[:3], strict=True)]
            self.mu, self.jz_mu_before, settled = put
            jz_mu, jv_mu = linearized.vjp(self.mu)
        self.mu_residual = relative(jz_mu - self.jz_mu_before, self.mu)
        self.jz_mu_next = by_row(self.slow, settled, jz_mu)
        return jv_mu

    def _settle(
        self,
        product: Callable[[Tensor, bool], tuple[Tensor, Tensor]],
        mu: Tensor,
        before: Tensor,
        dl_dz: Tensor,
        running: Tensor,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Products until the adjoint has settled in the rows that are running.

        Args:
            product: ``(μ, last) -> (J_zᵀμ, J_vᵀμ)``, where ``last`` says that no other follows.
            mu: μ to begin with, ``(rows, n)``.
            before: ``J_zᵀμ`` that it is made of, ``(rows, n)``.
            dl_dz: ``∂ℓ/∂z``, ``(rows, n)``.
            running: bool ``(rows,)``.
            rows: which rows these are, indices among those that are computed. None: all.

        Returns:
            The last μ, the ``J_zᵀμ`` that it is made of, the one to go on with, and the product.
        """
        settled, memory, most = before, self._recall(rows), self.following.max_adjoint_steps
        for k in range(most):
            if k:
                mu = by_row(running, settled + dl_dz, mu)
                before = by_row(running, settled, before)
                paid = running.float()
                if rows is not None:
                    paid = paid.new_zeros(len(self.z)).index_copy(0, rows, paid)
                self.pay_vjps(paid)
            jz_mu, jv_mu = product(mu, k + 1 == most)
            change = jz_mu - mu
            if self.mu_last is not None:
                # J_z does not depend on ∂ℓ/∂z, so that pairs hold from one v to the next
                mu_last, change_last, known = self.mu_last
                pair = mu - mu_last, change - change_last
                memory.learn(*pair, row_norm(mu), running & known)
            slow = self.slow if rows is None else self.slow[rows]
            self.mu_last = mu, change, slow
            move = memory(jz_mu - before)
            size = row_norm(move)
            running = running & (size < torch.inf)
            settled = by_row(running, before + move, settled)
            running = running & (size > self.share * row_norm(mu))
            if surely_none(running):
                break
        self.unsettled = running
        return mu, before, settled, jz_mu, jv_mu

    def _recall(self, rows: Tensor | None) -> SecantInverse:
        """The pairs of these rows, and in ``mu_last`` their last product, as far as there were any.

        On a CPU only slow rows have any. On an accelerator nobody may ask which these are.
        """
        if self.inverse is None or not len(self.inverse.count):  # all that had any have left
            self.mu_last = None
            like = self.z if rows is None else self.z[rows]
            self.inverse = SecantInverse(like, MEMORY, self.method.precision)
        elif not _same(rows, self.recalled):
            every = torch.arange(len(self.z), device=self.z.device)
            old = every if self.recalled is None else self.recalled
            place = torch.full_like(every, -1).index_copy(0, old, every[: len(old)])
            self._keep(place if rows is None else place[rows])
        self.recalled = rows
        return self.inverse

    def _keep(self, place: Tensor) -> None:
        """Go on with the pairs and the last product of these places, −1 for a row without any."""
        if self.inverse is not None:
            self.inverse = self.inverse.restrict(place)
        if self.mu_last is not None:
            mu, change, slow = (t[place] for t in self.mu_last)
            self.mu_last = mu, change, slow & (place >= 0)

    def advance(self, at: Evaluation, v: Tensor, v_next: Tensor, best: BestSoFar) -> Tensor:
        """See :class:`Iteration`."""
        z, split, size = self.z, self.problem.layout.split, row_norm(self.r)
        if self.before is not None and self.before.steps:
            parts = split(self.r)
            shrank = self.before.shrank([size] if len(parts) == 1 else [*map(row_norm, parts)])
            self.omega = torch.where(shrank, self.omega, (self.omega / 2).clamp(min=0.1))
        if self.spares:
            ahead = relative(self.r, self.linearized.fz) < _AHEAD * self.mu_residual
            self.lags = ~ahead  # where either is NaN too
        # a row in which something is NaN or Inf goes back to where the iteration began
        self.z = by_row(size < torch.inf, torch.addcmul(z, self.omega, self.r), self.z_start)
        self.z_start = self.z  # the old one need not outlive this
        if self.before is not None and self.before.slow is not None:
            self.z = self.before.settled(split(z), split(self.r), split(self.z))
            if self.adjoint_begun:
                self.unsure = self.unsure | self._unsettled()
        if self.controlled:
            long = self.omega[:, 0] >= _SHORT * self.following.relaxation
            lags = ~(long & (self.mu_residual < (_LOST if self.adjoint_begun else _GROWN)))
            before, self.slow = self.slow, self.slow | lags
            if not self.adjoint_begun:
                lost = lags & ~before
                if self.first and self.control:
                    lost = lost | self._unsettled()
                v_next = self._not_along(lost, v, v_next)
        # the residual is finite where they are
        self.jz_mu = by_row(self.mu_residual < torch.inf, self.jz_mu_next, self.jz_mu)
        return v_next

    def _unsettled(self) -> Tensor:
        """Slow rows whose z or μ would have moved on, had they been given more steps."""
        assert self.before is not None
        mu = self.unsettled
        if self.linearized.apart is not None:
            mu = torch.zeros_like(self.slow).index_copy(0, self.linearized.apart, mu)
        return mu | self.before.unsettled

    def _not_along(self, lost: Tensor, v: Tensor, v_next: Tensor) -> Tensor:
        """``v_next``, but v where a row's gradient is one of nothing settled.

        The first steps are the longest. They decide which maximum a row ends in.
        """
        if surely_none(lost):
            return v_next
        wrong = self.problem.groups.worst(self.spread(lost.float())) > 0
        return torch.where(wrong[:, None], v, v_next)

    def gradient_error(self, at: Evaluation) -> Tensor:
        """See :class:`Iteration`. A slow row's residuals are small anyway, its last moves tell."""
        known = super().gradient_error(at)
        if not self.control:
            return known
        moved = torch.where(self._unsettled(), torch.inf, self.share)
        return torch.where(self.spread(self.slow.float()) > 0, self.spread(moved), known)

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """See :class:`Iteration`."""
        result, feasible = super().finish(at, v, best), self.problem.feasible
        if feasible.radius is None:
            return result
        near = row_norm(v - self.v_last) <= _NEAR * row_norm(v - feasible.center)
        slow = self.problem.groups.worst(self.slow.float()) > 0
        return replace(result, followed=Followed(at.gradient, near, slow))

    def restrict(self, rows: Tensor) -> None:
        """See :class:`JointIteration`."""
        place = torch.full_like(self.slow, -1, dtype=torch.long)
        place[rows] = torch.arange(len(rows), device=rows.device)
        super().restrict(rows)
        if self.recalled is None:
            self._keep(rows)
        else:
            stay = (place[self.recalled] >= 0).nonzero().squeeze(1)
            self._keep(stay)
            self.recalled = place[self.recalled[stay]]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
