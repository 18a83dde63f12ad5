"""One joint iteration: an evaluation of f with its graph and one VJP, warm from the last one.

:class:`JointIteration` is what all runs of :class:`jiio_plugins.methods.Joint` share, and how rows
leave a run. How z follows v is in :mod:`jiio_plugins.methods.relaxed` where v moves by normalised
steps inside a ball, and in :mod:`jiio_plugins.methods.mixing` where v settles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import by_row, relative, row_norm, surely_none
from jiio_plugins.methods.records import Evaluation, MethodResult
from jiio_plugins.methods.round import Iteration

if TYPE_CHECKING:
    from jiio_plugins.joint.linearization import Linearization
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Method
    from jiio_plugins.methods.best import BestSoFar
    from jiio_plugins.methods.steps import StateSteps


class JointIteration(Iteration):
    """One evaluation of f with its graph and one VJP an iteration, warm from the last one.

    On a CPU a row that has finished is left out, where the model can be called on some of the rows.
    Else it is computed with the others: its v stands still, and z and μ settle there.

    Args:
        method: the settings.
        problem: what is optimised.

    Attributes:
        jz_mu: ``J_zᵀμ``, which the adjoint is carried on by.
        mu: the last adjoint.
        rows: indices of the rows that are computed, which all that is kept per row belongs to.
            None: all.
        leaves: whether this is what becomes of rows that have finished. Else the kind of iteration
            keeps them itself.
        ends: names of what is known of a row when it leaves.
        per_row: names of what a kind of iteration keeps per row besides.
    """

    leaves = False
    ends: tuple[str, ...] = ("z", "mu", "jz_mu", "mu_residual")
    per_row: tuple[str, ...] = ()

    def __init__(self, method: Method, problem: Problem) -> None:
        self.method, self.problem = method, problem
        self.z, self.rate = problem.warm_up(problem.v_start, method.warmup)
        known = None if problem.state is None else problem.state.jz_mu
        self.jz_mu = torch.zeros_like(self.z) if known is None else known
        self.vjp_twice = 0  # iterations at the beginning that take a second VJP
        self.rows: Tensor | None = None
        self.together = False  # whether all rows have one graph in any case
        self._last: Evaluation | None = None
        self._ended: dict[str, Tensor] = {}
        self._called: Tensor | None = None  # the rows that the model has been called on

    def prepare(self, k: int, v: Tensor, active: Tensor) -> None:
        """What there is to do before z is taken on.

        Args:
            k: number of the iteration, from 0 on.
            v: the variable, ``(problems, d)``.
            active: 1 for the rows that still cost something, ``(rows that are computed,)``.
        """

    def state_steps(self, k: int, active: Tensor) -> StateSteps | None:
        """Steps on z before the evaluation with the graph."""
        return None

    def products(self, linearized: Linearization, dl_dz: Tensor, active: Tensor) -> Tensor:
        """``J_vᵀμ``, ``(problems, d)``, and on the way the next ``J_zᵀμ``."""
        self.jz_mu_before = self.jz_mu
        self.jz_mu_next, jv_mu = linearized.vjp(self.mu)
        self.pay_vjps(active)
        self.mu_residual = relative(self.jz_mu_next - self.jz_mu_before, self.mu)
        return jv_mu

    def second_product(self, linearized: Linearization, dl_dz: Tensor, active: Tensor) -> None:
        """A step on the adjoint before the one that yields the gradient."""
        self.jz_mu = finite_or(linearized.jz_mu(self.mu), self.jz_mu)
        self.mu = self.jz_mu + dl_dz
        self.pay_vjps(active)

    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """See :class:`Iteration`."""
        problem, before, every = self.problem, dict(vars(self)), active
        active = self._leave(active)
        self.prepare(k, v, active)
        self.before = self.state_steps(k, active)
        linearized = self._linearize(v)
        if linearized is None:  # the model refuses so few: no more leave from here on
            vars(self).update(before)
            return self.evaluate(k, v, every)
        before.clear()  # of the last iteration no state is needed from here on
        if self.rows is None:
            self._last = None
        self.linearized = linearized
        layers = len(problem.layout.layouts)
        evals = layers if self.before is None else layers + self.before.evals
        if isinstance(evals, Tensor):
            problem.pay(f_evals=self.spread(evals * active))
        else:  # as many in every row
            problem.pay(f_evals=self.spread(active), times=evals)
        self.z = linearized.z
        output = linearized.output
        if self.rows is not None and self._last is not None:  # an objective is of all rows
            output = self._last.output.index_copy(0, self.rows, output)
        loss = problem.loss(output)
        dl_dz = linearized.gradient(loss)
        self.mu = self.jz_mu + dl_dz
        if k < self.vjp_twice:
            self.second_product(linearized, dl_dz, active)
        gradient = linearized.by_v(self.products(linearized, dl_dz, active))
        self.r = linearized.fz - self.z
        at = self.z, self.r, linearized.fz, dl_dz, self.mu_residual, linearized.own_jz_mu
        return self._of_all(Evaluation(loss, output, gradient, *at))

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """See :class:`Iteration`."""
        if self.rows is not None:
            self._end()
            for name, t in self._ended.items():
                setattr(self, name, t)
            self.rows = None
        return replace(super().finish(at, v, best), mu_error=self.mu_residual)

    # Rows that leave ----------------------------------------------------------------------------

    def restrict(self, rows: Tensor) -> None:
        """Go on with these of the rows that were computed so far, by their indices among them."""
        self.rows = rows if self.rows is None else self.rows[rows]
        for name in {*self.ends, *self.per_row}:
            setattr(self, name, getattr(self, name)[rows])

    def spread(self, t: Tensor) -> Tensor:
        """What belongs to the rows that are computed, ``(rows of the batch,)``, else 0."""
        if self.rows is None:
            return t
        return t.new_zeros(self.problem.rows).index_copy(0, self.rows, t)

    def pay_vjps(self, rows: Tensor) -> None:
        """A product of each layer in these of the rows that are computed, 1 or 0 each."""
        self.problem.pay_passes(vjps=self.spread(rows))

    def _linearize(self, v: Tensor) -> Linearization | None:
        """The pass with its graph. None where rows have just left, and cannot be left out."""
        z, before = self.z, self.before

        def call(rows: Tensor | None) -> Linearization:
            apart = None if before is None or self.together else lambda: before.apart
            found = self.problem.linearize(v, z, rows, advance=before, apart=apart)
            if before is not None and before.apart is not None and found.apart is None:
                self.together = True  # the cell refuses, or there are several layers
            return found

        if self.rows is self._called:
            return call(self.rows)
        assert self.rows is not None
        found = self.problem.on_some(call, self.rows)
        self._called = self.rows
        return found

    def _leave(self, active: Tensor) -> Tensor:
        """``active`` of the rows that are computed from now on."""
        if self._last is None or not self.leaves or active.device.type != "cpu":
            return active
        now = active if self.rows is None else active[self.rows]
        if surely_none(now == 0) or not self._may_leave_out(self._last.output):
            return now
        self._end()
        rows = now.nonzero().squeeze(1)
        self.restrict(rows)
        return now[rows]

    def _may_leave_out(self, output: Any) -> bool:
        """Whether the model may be called on some rows, and what it returns be put together."""
        problem = self.problem
        if not problem.row_separable or problem.fixed is not None:
            return False
        a_problem_each = problem.groups.problems == problem.rows
        of_rows = isinstance(output, Tensor) and output.ndim > 0 and len(output) == problem.rows
        return a_problem_each and of_rows

    def _end(self) -> None:
        """Keep what is known now of the rows that are computed."""
        for name in self.ends:
            now = getattr(self, name)
            of_all = now if self.rows is None else self._ended[name].index_copy(0, self.rows, now)
            self._ended[name] = of_all

    def _of_all(self, new: Evaluation) -> Evaluation:
        """The evaluation of all rows. Those that have finished keep their last one."""
        last, rows = self._last, self.rows
        if last is not None and rows is not None:
            put = [last[k].index_copy(0, rows, new[k]) for k in range(3, len(new))]
            gradient = last.gradient.index_copy(0, rows, new.gradient[rows])
            new = Evaluation(new.loss, new.output.detach(), gradient, *put)
        output = new.output.detach() if isinstance(new.output, Tensor) else new.output
        self._last = new._replace(loss=new.loss.detach(), output=output)
        return self._last


def finite_or(new: Tensor, old: Tensor) -> Tensor:
    """``new``, but ``old`` for a row in which it holds NaN or Inf."""
    return by_row(row_norm(new) < torch.inf, new, old)
