"""The problem that a method works on: model, objective, constraint and variable on flat tensors.

A :class:`Problem` knows how to call the model, in whatever joint mode is asked for. A method asks
it for a state to start with (:meth:`Problem.warm_up`), for passes with derivatives
(:meth:`Problem.linearize`) and for solves (:meth:`Problem.solve`). It keeps the count of what all
that cost. Methods see the variable v as ``(problems, d)`` and the layers' states z as
``(rows, n)``, whatever shapes the model has.

What v stands for is in :mod:`jiio_plugins.joint.variables`. What the layers do in a call is in
:mod:`jiio_plugins.joint.modes`. The loop that works on a problem is
:meth:`jiio_plugins.methods.Method.run`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from jiio_plugins.constraints import Constraint, FeasibleSet
from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.counting import Cost
from jiio_plugins.equilibrium.layer import is_one_problem, wants_whole_batch
from jiio_plugins.equilibrium.mode import layer_mode
from jiio_plugins.equilibrium.recognition import no_layer, servable
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.equilibrium.some_rows import REFUSALS, warn_of_refusal
from jiio_plugins.equilibrium.state import StateLayout, flatten
from jiio_plugins.joint.guard import Replay
from jiio_plugins.joint.linearization import Linearization
from jiio_plugins.joint.modes import IterateMode, RecordMode, SolveMode
from jiio_plugins.joint.solved import Solved, WarmUp
from jiio_plugins.utils.trees import map_leaves

if TYPE_CHECKING:
    from jiio_plugins.equilibrium.solvers import FlatMap, Solver
    from jiio_plugins.joint.modes import Advance, Apart
    from jiio_plugins.joint.variables import Variable

Objective = Callable[[Any], Tensor]
Found = TypeVar("Found")

# Relative residual of a state to start with. In a ball the first step on v is the longest, and it
# moves z by more. A state that is given is near already.
_WARM, _WARM_IN_A_BALL = 1e-2, 0.1


@dataclass(frozen=True)
class FlatState:
    """All layers' states side by side, for a later pass of the same rows.

    Attributes:
        layout: how they are packed.
        z: state, ``(rows, n)``.
        mu: μ, ``(rows, n)``. None where it is not known.
        jz_mu: ``J_zᵀμ``, ``(rows, n)``. None where it is not known.
    """

    layout: StateLayout
    z: Tensor
    mu: Tensor | None = None
    jz_mu: Tensor | None = None


class Problem:
    """``min_v ℓ(h(z*))  s.t.  z* = f(z*, v),  v ∈ C``, and what it has cost so far.

    Args:
        variable: v, with the model that it enters.
        objective: ℓ, ``objective(output) -> (rows,)``.
        constraint: C around the variable's start, or a set that is bound already. None: no bounds.
        start: where v starts, flat or as the variable. None: at the variable's own start.
        state: where z and ``J_zᵀμ`` start. None: from scratch.
        share_start: look whether all rows start at one and the same input, as latents at zero do,
            and then warm up one for all. The host waits for an accelerator once.
        fixed: flat state of each layer, with its graph, where v reaches none of them. They stand
            still: z and μ are ``(rows, 0)``, and no f is evaluated.

    Attributes:
        rows: of the batch.
        groups: which problem each row belongs to.
        feasible: C.
        v_start: ``(problems, d)``, in C.
        state: as given. None where the layers are fixed.
        cost: that of all layers together, ``(rows,)`` each.
        whole: whether all rows must be called together: a layer says so, or the model has been seen
            to fail on some.

    Raises:
        ValueError: a state of another number of rows.
    """

    def __init__(
        self,
        variable: Variable,
        objective: Objective,
        constraint: Constraint | None = None,
        *,
        start: Tensor | None = None,
        state: FlatState | None = None,
        share_start: bool = False,
        fixed: Sequence[Tensor] | None = None,
    ) -> None:
        self.variable, self.objective, self.constraint = variable, objective, constraint
        self.rows, self.groups = variable.rows, variable.groups
        if state is not None and len(state.z) != self.rows:
            raise ValueError(f"state must be of the rows of x, {self.rows}, got {len(state.z)}")
        self.state = None if fixed is not None else state
        self.share_start, self.fixed = share_start, fixed
        self._precision: torch.dtype | None = None
        self._trying = False  # to call the model on some of the rows
        self.whole = wants_whole_batch(variable.model)
        self._layout = None if state is None else state.layout
        if fixed is not None:
            self._layout = StateLayout(())
        self.feasible = self._bound(variable.start).detach()
        first = variable.start if start is None else start
        flat = first.flatten(1).clone()  # a search may end in its start
        self.v_start = self.feasible.project(flat)
        nothing = torch.zeros(self.rows, device=variable.start.device)
        self.cost = Cost(nothing, nothing)

    def _bound(self, around: Tensor) -> FeasibleSet:
        if self.constraint is None:
            return FeasibleSet(around.detach().flatten(1))
        return self.constraint.bind(around)

    def live(self) -> Problem:
        """The same with the graphs of all that the caller gave, to be differentiated."""
        other = copy.copy(self)
        other.variable = self.variable.live()
        other.feasible = self._bound(self.variable.origin)
        return other

    @property
    def layout(self) -> StateLayout:
        """The layers' states in one flat matrix. The first pass tells.

        Raises:
            RuntimeError: there was none yet.
        """
        if self._layout is None:
            raise RuntimeError("no layer has been called yet: solve or warm_up comes first")
        return self._layout

    @contextmanager
    def in_precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Call the model under autocast to ``dtype`` meanwhile. None: as it is."""
        before, self._precision = self._precision, dtype
        try:
            yield
        finally:
            self._precision = before

    def call(self, v: Tensor, rows: Tensor | None = None) -> Any:
        """The model's output, in the joint mode that is set.

        Args:
            v: the variable, ``(problems, d)``.
            rows: indices of the rows to call it on. None: all.

        Raises:
            TypeError: the model refuses an input of another precision than its own.
        """
        if self._precision is None:
            try:
                return self.variable(v, rows)
            except RuntimeError as error:
                self._explain_dtype(error)
                raise
        with torch.autocast(v.device.type, dtype=self._precision):
            output = self.variable(v, rows)
        # the objective and the stop test are the caller's, who knows the model without autocast
        halves = (torch.float16, torch.bfloat16)
        return map_leaves(output, Tensor, lambda t: t.float() if t.dtype in halves else t)

    def _explain_dtype(self, error: RuntimeError) -> None:
        """Say what does not fit together, where torch has refused the dtypes of input and model.

        Some models convert their input, so this cannot be told before they are called.
        """
        variable = self.variable
        own = {p.dtype for p in variable.model.parameters() if p.is_floating_point()}
        refused = any(words in str(error) for words in ("dtype", "scalar type", "type ("))
        others = [
            (name, dtype)
            for name, dtype in variable.dtypes
            if dtype.is_floating_point and dtype not in own
        ]
        if refused and len(own) == 1 and others:
            (dtype,), (name, other) = own, others[0]
            model = f" or model.to({other})" if name == "x" else ""
            raise TypeError(
                f"{'the input' if name == 'x' else name} is {other} and the model's parameters are "
                f"{dtype}: convert one of them, with {name}.to({dtype}){model}"
            ) from error

    @property
    def row_separable(self) -> bool:
        """Whether the model may be called on some of the rows, as far as is known."""
        return not (self.variable.repeatable or self.whole)

    def on_some(self, call: Callable[[Tensor], Found], rows: Tensor) -> Found | None:
        """``call(rows)``. None, with a warning, where the model can only be called on all rows.

        What the whole batch has found so far must not be lost for that.

        Args:
            call: calls the model on the rows of these indices.
            rows: indices of some rows.
        """
        if not self.row_separable:
            return None
        if self._trying or self._layout is None:  # there is another way, or nothing to be lost
            return call(rows)
        self._trying = True
        try:
            return call(rows)
        except REFUSALS as error:
            self.whole = True
            warn_of_refusal("the model", error)
            return None
        finally:
            self._trying = False

    def _one_start(self) -> bool:
        """Whether one row can be warmed up for all."""
        alone = self.variable.rows_see_v_alone and self.row_separable
        if not self.share_start or not alone:
            return False
        return all(bool((t == t[:1]).all()) for t in (self.v_start, *self.variable.given))

    @property
    def f_evals(self) -> Tensor:
        """Evaluations of f so far, ``(rows,)``."""
        return torch.as_tensor(self.cost.f_evals)

    @property
    def vjps(self) -> Tensor:
        """Vector-Jacobian products so far, ``(rows,)``."""
        return torch.as_tensor(self.cost.vjps)

    def pay(
        self,
        f_evals: Tensor | float | None = None,
        vjps: Tensor | float | None = None,
        times: float = 1,
    ) -> None:
        """Add to the cost, which is the sum of all layers'.

        Args:
            f_evals: evaluations of f, a number or ``(rows,)``. None: there were none.
            vjps: vector-Jacobian products, likewise.
            times: how often both are paid.
        """
        for name, paid in (("f_evals", f_evals), ("vjps", vjps)):
            if paid is not None:
                total = torch.add(torch.as_tensor(getattr(self.cost, name)), paid, alpha=times)
                self.cost = self.cost._replace(**{name: total})

    def pay_passes(
        self, f_evals: Tensor | float | None = None, vjps: Tensor | float | None = None
    ) -> None:
        """Add to the cost where every layer is evaluated as often.

        Args:
            f_evals: evaluations of f a layer, a number or ``(rows,)``. None: there were none.
            vjps: vector-Jacobian products a layer, likewise.
        """
        self.pay(f_evals, vjps, len(self.layout.layouts))

    def loss(self, output: Any) -> Tensor:
        """The objective of what the model returned, ``(rows,)``, checked.

        Raises:
            TypeError: it is not real floating point.
            ValueError: it is not one value per row.
        """
        with uncompiled():  # it is differentiated as often as the model is
            value = self.objective(output)
        if not isinstance(value, Tensor) or value.shape != (self.rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if self.variable.one:
                raise ValueError(
                    "a layer has batch_dim=None, so its states are of one problem, and "
                    f"objective(output) must return one value, shape (1,), got {got}: sum over "
                    "what is in it, .sum().reshape(1). With whole_batch=True instead each row is "
                    "a problem"
                )
            raise ValueError(
                f"objective(output) must return one value per row, shape ({self.rows},), "
                f"got {got}; use reduction='none'"
            )
        if not value.is_floating_point():
            raise TypeError(
                f"objective(output) must return real floating-point values, got {value.dtype}: "
                "nothing can be differentiated by class indices; of complex ones take .abs()"
            )
        return value

    def run_layers(self, mode: SolveMode, v: Tensor, rows: Tensor | None = None) -> Any:
        """The model's output, its layers solving as a mode says.

        Args:
            mode: how they solve. It holds their states afterwards.
            v: the variable, ``(problems, d)``.
            rows: indices of the rows to call it on. None: all.

        Raises:
            ValueError: the forward reaches no equilibrium layer.
        """
        try:
            with layer_mode(mode):
                output = self.call(v, rows)
        except RuntimeError as error:
            if not mode.z and servable(self.variable.model):  # it fails without a graph
                raise ValueError(no_layer(self.variable.model)) from error
            raise
        if not mode.z:
            raise ValueError(no_layer(self.variable.model))
        wanted = self.rows if rows is None else len(rows)
        if any(len(z) != wanted for z in mode.z):
            of_one = is_one_problem(self.variable.model)
            if of_one and not self.variable.one:
                raise ValueError(
                    "a layer has batch_dim=None, so x is one problem, which is not to be judged "
                    "sample by sample: use optimize_input, with an objective of one value. With "
                    "whole_batch=True instead each row is a problem"
                )
            raise ValueError(
                f"states must be batch first: the model was called on {wanted} rows, the states of "
                f"its layers have {[len(z) for z in mode.z]}. Say which dimension of them the "
                "batch is, Equilibrium(cell, batch_dim=1) or adapt(model, batch_dim=1), or None "
                "for all layers where x is one problem, as the nodes of one graph. Flatten what "
                "belongs to one sample"
            )
        if self._layout is None:
            self._layout = StateLayout(mode.layouts)
        return output

    def solve(
        self,
        v: Tensor,
        solver: Solver | None = None,
        start: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Solved:
        """Solve all layers at ``v``, for all rows or some.

        Args:
            v: the variable, ``(problems, d)``.
            solver: of all layers. None: every layer does what it does outside an optimisation.
            start: flat state to start from, ``(rows, n)``. None: the layers' own.
            rows: indices of the rows to solve. None: all.

        Raises:
            ValueError: the forward reaches no equilibrium layer.
        """

        def solve(rows: Tensor | None, start: Tensor | None = start) -> Solved:
            parts = None if start is None else self.layout.split(start)
            mode = SolveMode(start=parts) if solver is None else IterateMode(solver, parts)
            with torch.no_grad():
                output = self.run_layers(mode, v, rows)
            moved = mode.moved if isinstance(mode, IterateMode) else []
            return Solved(output, torch.cat(mode.z, dim=1), mode.results, moved)

        if rows is None:
            return solve(None)
        found = self.on_some(solve, rows)
        return solve(None, None).restrict(rows) if found is None else found

    def warm_up(self, v: Tensor, max_iter: int) -> WarmUp:
        """A state to start with: the one given or the initial one, some steps on.

        Where all rows start at the same input, one is solved for all.

        Args:
            v: the variable, ``(problems, d)``.
            max_iter: steps at most. A row that reaches a relative residual of 0.1 in a ball, else
                or with a state given 1e-2, needs fewer.
        """
        unknown = torch.zeros(self.rows, device=v.device)
        if self.fixed is not None:
            return WarmUp(v.new_zeros(self.rows, 0), unknown)
        known = None if self.state is None else self.state.z
        if known is not None and not max_iter:
            return WarmUp(known, unknown)
        near = known is not None or self.feasible.radius is None
        solver = Anderson(max_iter=max(1, max_iter), tol=_WARM if near else _WARM_IN_A_BALL)
        shared = known is None and self._one_start()
        rows = torch.zeros(1, dtype=torch.long, device=v.device) if shared else None
        found = self.solve(v, solver, known, rows)
        if shared and not self.row_separable:  # it was seen just now
            return self.warm_up(v, max_iter)
        self.pay(f_evals=found.evals / self.rows if shared else found.evals)
        # one step further for free, unless it is the step that overflows
        z = torch.where(torch.isfinite(found.fz), found.fz, found.z)
        error, tiny = found.residual * found.amplification, torch.finfo(z.dtype).tiny
        rate = (error / (error + found.travelled).clamp(min=tiny)) ** (1 / found.evals)
        return WarmUp(z.expand(self.rows, -1).contiguous(), rate.expand(self.rows))

    def evaluate(self, v: Tensor, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """``f(z, v)`` without a graph, ``(rows, n)``.

        Args:
            v: the variable, ``(problems, d)``.
            z: state of the rows that are evaluated, flat.
            rows: their indices. None: all.
        """
        mode = RecordMode(self.layout.split(z))
        with torch.no_grad(), layer_mode(mode):
            self.call(v, rows)
        return flatten([f.detach() for parts in mode.f for f in parts]).to(z.dtype)

    def linearize(
        self,
        v: Tensor,
        z: Tensor,
        rows: Tensor | None = None,
        *,
        answer_fz: bool = True,
        advance: Advance | None = None,
        apart: Callable[[], Apart | None] | None = None,
    ) -> Linearization:
        """One evaluation of f with its graph.

        Args:
            v: the variable, ``(problems, d)``.
            z: state of the rows that are evaluated, flat.
            rows: their indices. None: all.
            answer_fz: see :class:`jiio_plugins.joint.RecordMode`.
            advance: takes each layer's state on where the layer is called, before the evaluation.
                None: nothing does.
            apart: which rows have a graph of their own, see :class:`jiio_plugins.joint.RecordMode`.
                Only where v enters the model as its input. None: none.
        """
        if self.fixed is not None:
            mode = RecordMode(self.fixed, empty=z)
        else:
            steps = advance
            if advance is not None and self.variable.repeatable:
                steps = _repeatably(advance)
            if not self.variable.rows_see_v_alone:  # v may enter f by more than its injection
                apart = None
            parts = self.layout.split(z)
            mode = RecordMode(parts, answer_fz=answer_fz, advance=steps, apart=apart)
        return Linearization(lambda leaf: self.call(leaf, rows), v, mode)


def _repeatably(advance: Advance) -> Advance:
    """``advance`` with the same random numbers at every evaluation, which are left as they were.

    What comes after, the evaluation with the graph among it, then draws them too.
    """

    def advance_repeatably(f: FlatMap, z: Tensor) -> Tensor:
        replay = Replay()

        def repeated(z: Tensor) -> Tensor:
            with replay():
                return f(z)

        return advance(repeated, z)

    return advance_repeatably
