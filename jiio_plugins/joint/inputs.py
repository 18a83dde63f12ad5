"""What comes in: model, input and what goes with it, checked."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jiio_plugins.constraints import check_constraint
from jiio_plugins.equilibrium.layer import is_one_problem
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import ParameterVariable, Variable
from jiio_plugins.utils.checks import check_floating, outside_inference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.constraints import Constraint
    from jiio_plugins.joint.problem import FlatState, Objective


def problem_of(
    model: nn.Module,
    x: Tensor,
    objective: Objective,
    *,
    constraint: Constraint | None = None,
    given: Sequence[Tensor] = (),
    variables: Sequence[str] | None = None,
    groups: Tensor | None = None,
    start: Tensor | None = None,
    state: FlatState | None = None,
    training_mode: bool = False,
) -> Problem:
    """The problem of optimising a model's input, or parameters of it, everything checked.

    Args:
        model: any module whose forward reaches an equilibrium layer. It is called as
            ``model(x, *given)``.
        x: its input, ``(rows, ...)``, floating point, finite.
        objective: ``objective(output) -> (rows,)``, minimised.
        constraint: the set, around x unless it names a centre. None: no bounds.
        given: what else the model takes, tensors ``(rows, ...)``.
        variables: names of parameters to optimise instead of x. None: x is optimised.
        groups: with ``variables``, the problem of each row, integers ``(rows,)``. None: one for
            all.
        start: where x starts, shaped like x. None: at x.
        state: where z and μ start. None: from scratch.
        training_mode: leave the model's train/eval flags as they are.

    Raises:
        TypeError, ValueError: bad input. The message says what was given and what is accepted.
    """
    constraint = check_constraint(constraint)
    if not callable(objective):
        raise TypeError(f"objective must be a function of the model's output, got {objective!r}")
    model = unwrap(model)
    x = check_input(x)
    if isinstance(variables, str):
        raise TypeError(f"variables must be a list of names, got the string {variables!r}")
    one = is_one_problem(model)
    given = check_given(given, None if one else len(x))
    if groups is not None:
        groups = check_groups(groups, variables, 1 if one else len(x))
    parts = model.modules()
    if training_mode and any(m.training and isinstance(m, _BatchNorm) for m in parts):
        warnings.warn(
            "training_mode=True with BatchNorm in train mode: its batch statistics couple the "
            "samples, so results depend on what else is in the batch",
            stacklevel=3,
        )
    if variables is None:
        variable = Variable(model, x, given, repeatable=training_mode, one=one)
        start = start[None] if one and start is not None else start
    else:
        names = list(variables)
        variable = ParameterVariable(
            model, x, names, groups, given, repeatable=training_mode, one=one
        )
    with torch.no_grad():
        return Problem(variable, objective, constraint, start=start, state=state, share_start=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The module whose forward the loop calls: without DistributedDataParallel.

    Raises:
        TypeError: no module, or DataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise TypeError(
            "DataParallel splits the batch over threads, which the joint loop cannot follow: pass "
            "model.module, or use DistributedDataParallel"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module  # the loop needs no gradient hooks
        return inner
    return model


def check_gradients_possible(name: str) -> None:
    """Raise in inference mode. ``name`` is what the message calls the caller.

    Raises:
        RuntimeError: it is on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} needs gradients, which torch.inference_mode() forbids: call it outside "
            "(torch.no_grad() is no hindrance)"
        )


def check_input(x: Tensor, name: str = "x") -> Tensor:
    """The input, if it is finite, batch first and floating point.

    Args:
        x: the input, ``(rows, ...)``.
        name: what the message calls it.

    Returns:
        x itself, or a copy of one made in inference mode.

    Raises:
        TypeError: no tensor, or of integers or complex numbers.
        ValueError: no batch, NaN or Inf.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be one tensor, got {type(x).__name__}. torch.from_numpy makes one of an "
            "array. Several inputs go in as one, flattened and concatenated, and a wrapper of the "
            "model splits them"
        )
    check_floating(x, name)
    if x.ndim < 2:
        raise ValueError(f"{name} must be batch first, (batch, ...), got shape {tuple(x.shape)}")
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = int((~finite.reshape(len(x), -1).all(1)).nonzero()[0])
        raise ValueError(f"{name} holds NaN or Inf (first in sample {bad}): clean the input")
    return outside_inference(x)


def check_given(given: Any, rows: int | None) -> tuple[Tensor, ...]:
    """What else the model takes.

    Args:
        given: tensors ``(rows, ...)``, in a tuple or a list.
        rows: rows of the batch. None: there is no batch, and any shape will do.

    Raises:
        TypeError: anything but tensors in a tuple or a list.
        ValueError: another number of rows.
    """
    if not isinstance(given, (tuple, list)) or not all(isinstance(t, Tensor) for t in given):
        got = "a tensor" if isinstance(given, Tensor) else repr(given)
        raise TypeError(
            f"given must be a tuple or list of tensors, model(x, *given), got {got}. What is no "
            "tensor goes into a module that holds it and calls the model"
        )
    for t in given:
        if rows is not None and t.shape[:1] != (rows,):
            raise ValueError(
                f"each tensor of given must have a row per sample, ({rows}, ...), got "
                f"{tuple(t.shape)}: expand what is the same for all"
            )
    return tuple(outside_inference(t) for t in given)


def check_groups(groups: Tensor, variables: Sequence[str] | None, rows: int) -> Tensor:
    """Which problem each row belongs to, as long integers without gaps.

    Args:
        groups: integers ``0 … P−1``, ``(rows,)``.
        variables: names of what is optimised. None: the input, of which each row has its own.
        rows: rows of the batch.

    Raises:
        TypeError: no tensor.
        ValueError: another shape or dtype, gaps, or no ``variables``.
    """
    if variables is None:
        raise ValueError("groups= says which rows share a variable: it needs variables=")
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups must be a tensor of integers, got {type(groups).__name__}")
    dtype = groups.dtype
    if groups.shape != (rows,) or dtype.is_floating_point or dtype == torch.bool:
        raise ValueError(
            f"groups must hold one integer per row, shape ({rows},), got {dtype} "
            f"{tuple(groups.shape)}"
        )
    seen = groups.unique()
    if not torch.equal(seen, torch.arange(len(seen), device=groups.device, dtype=seen.dtype)):
        raise ValueError(f"groups must be numbered 0 … P−1 without gaps, got {seen.tolist()}")
    return groups.long()
