"""``JIIOLearner``: a learn2learn learner that adapts a deep equilibrium model by JIIO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from learn2learn.algorithms.base_learner import BaseLearner
from learn2learn.utils import clone_module
from torch import Tensor, nn

from jiio_learn2learn._checks import (
    check_cells,
    check_constants,
    check_loss,
    check_names,
    check_replay,
    has_dropout,
    influential,
    reaches,
    same_inputs,
)
from jiio_learn2learn._pace import Pace
from jiio_learn2learn._task import Slots, TaskVariable, kept
from jiio_learn2learn.recording import Recorded, Tape, tensors_in
from jiio_plugins.equilibrium import Anderson, Implicit, StateLayout, count, count_evaluations
from jiio_plugins.implicit import adjoint_solver, attach, warn_if_loose
from jiio_plugins.joint import (
    FlatState,
    SolveMode,
    buffers_kept,
    current_mode,
    layer_mode,
    no_layer,
)
from jiio_plugins.methods import Joint, solve
from jiio_plugins.utils import is_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.equilibrium import Solver
    from jiio_plugins.solution import Residuals


@dataclass
class _TaskState:
    """What a clone knows of its task. Not in the module: clones share parts of that.

    Attributes:
        slots: where v stands in the clone.
        initial: v0, functions of the meta-parameters.
        version: how often v has changed.
        support: what the model was called with at the last adaptation.
        z: flat state of each layer where that ended.
        jz_mu: ``J_zᵀμ`` there, ``(rows, n)``.
        called_with: the model's last arguments inside a closure.
        pace: what the way of v so far tells of its step.
    """

    slots: Slots
    initial: dict[str, Tensor]
    version: int = 0
    support: Any = None
    z: list[Tensor] = field(default_factory=list)
    jz_mu: Tensor | None = None
    called_with: Any = None
    pace: Pace = field(default_factory=Pace)


@dataclass
class _Forward:
    """One pass of a clone: its task and v, what went in, the states that its layers ended in."""

    task: _TaskState
    version: int
    inputs: Any
    mode: SolveMode


class JIIOLearner(BaseLearner):
    """learn2learn's ``MAML(model, lr)`` for a deep equilibrium model with a task context.

    A clone's ``adapt(loss)`` finds ``v* = argmin_v loss(v) + reg/2 ‖v − v0‖²``. The context v, the
    state z and the adjoint μ of the whole support set advance together towards it. v0 is what the
    parameters are in the learner that was cloned. Gradients of a later loss flow through v* by
    implicit differentiation of the joint fixed point. That is the meta-gradient of the optimum
    itself, whatever iterations found it, at a memory that does not depend on their number.

    Args:
        model: reaches at least one :class:`jiio_plugins.Equilibrium` in its forward.
        lr: step size α on v, in units of v² / loss. It changes the way to v*, not v*. A loss summed
            over samples wants it divided by their number. A warning says which way to move one that
            does not come near enough to v*.
        adapt: names from ``model.named_parameters()``, of parameters used in the cell, before it or
            after it. None: those called ``context``. Where the graph of no equilibrium leads to
            them (a head alone), ``adapt`` refines the fixed point once and leaves it there.
        reg: pulls v to v0, in units of loss / v². With 0 the optimum does not depend on v0, whose
            meta-gradient is then 0. It also has to exist: a cross-entropy of separable data has
            none.
        iters: iterations at most, per call of ``adapt``. It ends at ``tol``.
        first_order: take v* for a constant, and for v0 the identity in place of ``dv*/dv0``:
            FOMAML's gradient, not the gradient of anything. It saves the implicit differentiation.
        allow_unused: leave names that do not influence the loss as they are, instead of an error.
            None: as ``allow_nograd``.
        allow_nograd: leave names whose parameter requires no gradient as they are, instead of an
            error.
        tol: relative residual of z, μ and v at which the iteration ends. None: 1e-4, in float64
            1e-9.
        memory: of Anderson's mixing of (z, μ, v), in iterations. 0 switches it off.
        adjoint: solver of the implicit differentiation. None:
            :func:`jiio_plugins.implicit.adjoint_solver`.

    Attributes:
        residuals: how accurate the implicit gradient of the last ``adapt`` is. None before, and
            with ``first_order``.

    Raises:
        ValueError, TypeError, RuntimeError: what was given, what is accepted and what to do.

    Not for: support minibatches that change between calls of ``adapt`` (the optimum of the last one
    would forget the others), and second derivatives of the query loss.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> from jiio_plugins.models import SinusoidDEQ
        >>> support, query = torch.rand(2, 10, 1)
        >>> maml = JIIOLearner(SinusoidDEQ(), lr=0.5, reg=0.1)
        >>> learner = maml.clone()
        >>> learner.adapt(mse_loss(learner(support), support.sin()))
        >>> loss = mse_loss(learner(query), query.sin())
        >>> loss.backward()  # through the adaptation, to the parameters of maml
        >>> mse_loss(maml(query), query.sin()).item(), loss.item()
        (0.56, 0.15)

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.4, where the
    meta-gradient is the first-order one. The implicit one is as in Rajeswaran, Finn, Kakade and
    Levine, "Meta-Learning with Implicit Gradients" (NeurIPS 2019).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        adapt: Sequence[str] | None = None,
        reg: float = 0.1,
        iters: int = 50,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        tol: float | None = None,
        memory: int = 10,
        adjoint: Solver | None = None,
    ) -> None:
        super().__init__(model)
        self.names = check_names(model, adapt)
        if not is_count(iters, 1):
            raise ValueError(f"iters must be an integer and at least 1, got {iters!r}")
        for name, value in (("lr", lr), ("reg", reg)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        self.lr, self.reg, self.iters = lr, reg, iters
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self.tol, self.memory, self.adjoint = tol, memory, adjoint
        self.residuals: Residuals | None = None
        self._task: _TaskState | None = None

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> JIIOLearner:
        """A learner for one task. Gradients flow back from it to this one's parameters.

        Args:
            first_order: of the clone. None: as here.
            allow_unused: of the clone. None: as here.
            allow_nograd: of the clone. None: as here.
        """
        learner: JIIOLearner = clone_module(self)
        settings = {
            "first_order": first_order,
            "allow_unused": allow_unused,
            "allow_nograd": allow_nograd,
        }
        for name, value in settings.items():
            if value is not None:
                setattr(learner, name, value)
        learner.residuals = None
        slots = Slots(learner.module, self.names)
        learner._task = _TaskState(slots, dict(zip(self.names, slots.get(), strict=True)))
        return learner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model at the current v, with every fixed point solved as the model itself does.

        A clone's output is a :class:`jiio_learn2learn.recording.Recorded` tensor (or holds such).
        """
        task = self._task
        if task is None:
            return self.module(*args, **kwargs)
        if current_mode() is not None:  # a closure's call
            task.called_with = (args, kwargs)
            return self.module(*args, **kwargs)
        warm = task.z if task.version and same_inputs(task.support, (args, kwargs)) else None
        mode = SolveMode(start=warm)
        with layer_mode(mode):
            output = self.module(*args, **kwargs)
        if not mode.z:
            raise ValueError(no_layer(self.module))
        if next(tensors_in(output), None) is None:
            raise TypeError(
                f"the model returned {type(output).__name__}, in which no tensor was found: return "
                "tensors, or tuples, lists, dicts or dataclasses of them"
            )
        tape = Tape(output, _Forward(task, task.version, (args, kwargs), mode))
        return tape.wrap(output)

    def adapt(
        self,
        loss: Tensor | Callable[[], Tensor],
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """Minimise the support loss over v, from where v is. A further call goes on from there.

        Args:
            loss: one number, computed from this clone's output by functions of torch, such as
                ``cross_entropy(learner(x), y)``. Or a function without arguments that returns it,
                which may use the adapted parameters as well.
            first_order: for this call. None: as the learner has it.
            allow_unused: for this call. None: as the learner has it.
            allow_nograd: for this call. None: as the learner has it.

        Warns:
            ConvergenceWarning: v is too far from its optimum for the implicit gradient.

        Raises:
            ValueError: the loss is not one finite number, or comes from elsewhere or from before
                the last adaptation. A name does not influence it. The support set has changed.
            TypeError: the loss is neither a tensor nor a function.
            RuntimeError: called on a learner that is no clone, or without gradients.
        """
        if self._task is None:
            raise RuntimeError(
                "adapt() would change the meta-parameters themselves: adapt a clone, "
                "learner = maml.clone(), then learner.adapt(loss)"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "adapt() needs gradients, and they are switched off here: call it outside "
                "torch.no_grad() and torch.inference_mode(), for validation too"
            )
        check_cells(self.module)
        objective, value, forward = self._objective(loss)
        check_loss(value)
        slots = self._task.slots
        names = influential(
            value,
            slots,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        anchor = [self._task.initial[name] for name in names]
        variable = TaskVariable(
            slots.some(names),
            objective,
            anchor,
            self.reg,
            [z.detach() for z in forward.mode.z],
            self.module,
            repeatable=has_dropout(self.module),  # one mask for all, or there is no optimum
        )
        first_order = self.first_order if first_order is None else first_order
        if not self.lr and not first_order:
            raise ValueError(
                "lr must be above 0: the gradient is that of the support loss's optimum, which "
                "lr=0 never comes near. To learn without adaptation give first_order=True"
            )
        with buffers_kept(self.module):
            self._solve(variable, forward, first_order)

    def _solve(self, variable: TaskVariable, forward: _Forward, first_order: bool) -> None:
        """Run the joint iteration and put its end in the module, differentiable."""
        task, fixed, fixed_residual = forward.task, None, 0.0
        if not any(any(reaches(state, variable.slots.get())) for state in forward.mode.z):
            fixed, fixed_residual = self._fixed_points(variable, forward, first_order)
        state = FlatState(StateLayout(forward.mode.layouts), variable.z, jz_mu=task.jz_mu)
        problem = variable.problem(state, fixed)
        result = solve(problem, self._method(variable.z.dtype), callback=task.pace)
        count(problem.cost)
        if first_order:
            self.residuals = None
            found = result.v + (variable.anchor - variable.anchor.detach())
        else:
            # a tiny lr makes a tiny step anywhere: how far v is from v* the curvature tells
            step, left = task.pace.measure(self.lr)
            with kept(self.module):
                found, self.residuals = attach(
                    problem, result, result.v.new_full((1, 1), step), solver=self.adjoint
                )
            self.residuals.joint.clamp_(min=max(fixed_residual, left))
            warn_if_loose(self.residuals, advice=task.pace.advice(self.lr))
        variable.slots.put(variable.parts(found))
        task.version += 1
        task.support = forward.inputs
        if fixed is None:
            task.z, task.jz_mu = problem.layout.split(result.z), result.jz_mu
        else:
            task.z, task.jz_mu = [state.detach() for state in fixed], None

    def _fixed_points(
        self, variable: TaskVariable, forward: _Forward, first_order: bool
    ) -> tuple[list[Tensor], float]:
        """Flat states of layers that v does not reach, with a gradient, and their residual.

        They go on from where the forward pass ended, which the layers' own solver decided. Whatever
        rule the layers have, they get the exact gradient, in a graph of their own.
        """
        dtype = variable.z.dtype
        mode = SolveMode(
            Anderson(max_iter=200, tol=self._tol(dtype)),
            Implicit(solver=self.adjoint or adjoint_solver(dtype)),
            [state.detach() for state in forward.mode.z],
        )
        with (
            kept(self.module),
            torch.set_grad_enabled(not first_order),
            count_evaluations() as counter,
            layer_mode(mode),
        ):
            variable(variable.start)
        return mode.z, counter.worst_residual

    def _tol(self, dtype: torch.dtype) -> float:
        return self.tol if self.tol is not None else (1e-9 if dtype == torch.float64 else 1e-4)

    def _method(self, dtype: torch.dtype) -> Joint:
        return Joint(
            max_iter=self.iters,
            step_size=self.lr,
            tol=self._tol(dtype),
            mixing="anderson",
            acceleration=self.memory,
            warmup=0,  # starts where the forward pass ended
        )

    def _objective(
        self, loss: Tensor | Callable[[], Tensor]
    ) -> tuple[Callable[[], Tensor], Tensor, _Forward]:
        """The support loss as a function of what stands in the module, its value, its origin."""
        task = self._task
        objective: Callable[[], Tensor]
        value: Tensor
        assert task is not None
        if isinstance(loss, Tensor):
            tape = getattr(loss, "tape", None)
            forward = getattr(tape, "source", None)
            if not isinstance(loss, Recorded) or not isinstance(forward, _Forward):
                raise ValueError(
                    "the loss was not computed from one output of this learner by functions of "
                    "torch, so it cannot be computed again at another v: give "
                    "adapt(loss_function(learner(x), y)), or a function, "
                    "adapt(lambda: loss_function(learner(x), y))"
                )
            if forward.task is not task:
                raise ValueError(
                    "the loss was computed from the output of another learner: give each clone "
                    "the loss of its own output"
                )
            if forward.version != task.version:
                raise ValueError(
                    "the loss is from before the last adapt(): call learner(x) again and compute "
                    "it anew, as every step of a loop does"
                )
            check_replay(loss)
            check_constants(loss, task.slots)
            objective, value = partial(self._replay, loss, forward.inputs), loss
        elif callable(loss):
            mode = SolveMode()
            with layer_mode(mode):
                value = loss()
            if not mode.z:
                raise ValueError(no_layer(self.module))
            objective = loss
            forward = _Forward(task, task.version, task.called_with, mode)
        else:
            raise TypeError(
                f"loss must be a tensor or a function that returns one, got {type(loss).__name__}"
            )
        if task.version and not same_inputs(task.support, forward.inputs):
            raise ValueError(
                "the support set has changed since the last adapt() of this clone. adapt() finds "
                "the optimum of one support set, so a second one would undo the first: give the "
                "whole support set each time, or take a new clone for another task"
            )
        return objective, value, forward

    def _replay(self, loss: Recorded, inputs: Any) -> Tensor:
        args, kwargs = inputs
        return loss.tape.replay(loss, self.module(*args, **kwargs))
