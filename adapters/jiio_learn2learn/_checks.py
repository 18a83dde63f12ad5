"""What a learner accepts, and the errors that say so."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_learn2learn.recording import tensors_in
from jiio_plugins import Equilibrium
from jiio_plugins.implicit import graph_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_learn2learn._task import Slots
    from jiio_learn2learn.recording import Recorded


_GENERATED = (torch.jit.ScriptModule, torch.fx.GraphModule)


def check_names(model: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    """The parameters to adapt. By default those called ``context``.

    Args:
        model: the module that holds them.
        names: of ``model.named_parameters()``. None: the default.

    Raises:
        TypeError: no module, one that learn2learn cannot clone, or a string in place of a list.
        ValueError: names that the model does not have, or none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, part in model.named_modules():
        # the class of compiled modules has no public name
        if isinstance(part, _GENERATED) or type(part).__name__ == "OptimizedModule":
            raise TypeError(
                "model must be made of modules that learn2learn can clone, got one that was "
                f"scripted, traced or compiled ({name or 'itself'}): give the module that it was "
                "made of"
            )
    if names is not None and not isinstance(names, Iterable):
        raise TypeError(
            f"adapt must be a list of names, got {names!r}: what else MAML takes by position is "
            "named here, such as first_order=True"
        )
    if isinstance(names, str):
        raise TypeError(f"adapt must be a list of names, got the string {names!r}: [{names!r}]")
    there = [name for name, _ in model.named_parameters()]
    if names is None:
        names = [name for name in there if name.rpartition(".")[2] == "context"]
        if not names:
            raise ValueError(
                "the model has no parameter called 'context': say which parameters to adapt, "
                f"adapt=[...]. There are {', '.join(there)}"
            )
    missing = [name for name in names if name not in there]
    if missing or not names:
        raise ValueError(
            f"adapt must name parameters of the model; {missing or 'an empty list'} given, there "
            f"are {', '.join(there)}"
        )
    return tuple(dict.fromkeys(names))


def check_loss(loss: Any) -> None:
    """Raise unless ``loss`` is one finite number with a graph.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, no gradient, NaN or Inf.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must be one number, got shape {tuple(loss.shape)}: use reduction='mean'"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no gradient: it was detached, or computed under torch.no_grad(), or no "
            "parameter of the model requires a gradient"
        )
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(
            f"the loss is {loss.detach().item()}: nothing can be adapted to it. Check the support "
            "set and the weights"
        )


def check_replay(loss: Recorded) -> None:
    """Raise where computing the recorded loss again does not give the same value.

    Raises:
        ValueError: it gives another.
    """
    with torch.no_grad():
        again = loss.tape.replay(loss)
    was = loss.detach()
    slack = torch.finfo(was.dtype).eps ** 0.5
    if not torch.allclose(again, was, rtol=slack, atol=slack, equal_nan=True):
        raise ValueError(
            "computing the recorded loss again gives another value: it draws random numbers, or "
            "tensors that it uses were changed since. Keep them as they are, or give a function, "
            "adapt(lambda: loss_function(learner(x), y))"
        )


def check_constants(loss: Recorded, slots: Slots) -> None:
    """Raise where the recorded loss holds something that depends on the adapted parameters.

    Args:
        loss: the support loss.
        slots: the adapted parameters, where they stand.

    Raises:
        ValueError: names the parameters.
    """
    current = slots.get()
    for constant in loss.tape.constants():
        if not constant.requires_grad:
            continue
        found = [n for n, r in zip(slots.names, reaches(constant, current), strict=True) if r]
        if found:
            raise ValueError(
                f"the loss holds a term that was computed from the adapted {', '.join(found)} "
                "outside the model's output, such as a weight decay, and would stay what it was "
                "while they change: use reg=, or give a function, "
                "adapt(lambda: loss_function(learner(x), y) + penalty(learner))"
            )


def influential(
    loss: Tensor, slots: Slots, allow_unused: bool, allow_nograd: bool
) -> tuple[str, ...]:
    """The adapted names that can and do influence the loss.

    Args:
        loss: the support loss, a scalar with a graph.
        slots: the adapted parameters, where they stand.
        allow_unused: leave out names that do not influence it.
        allow_nograd: leave out names whose parameter requires no gradient.

    Raises:
        ValueError: such a name that is not to be left out, or none that remains.
    """
    current = slots.get()
    constant = [n for n, t in zip(slots.names, current, strict=True) if not t.requires_grad]
    if constant and not allow_nograd:
        raise ValueError(
            f"adapt names {', '.join(constant)}, which requires no gradient: requires_grad_(True), "
            "or leave it as it is with allow_nograd=True"
        )
    reached = reaches(loss, current)
    unused = [n for n, r in zip(slots.names, reached, strict=True) if not r and n not in constant]
    if unused and not allow_unused:
        raise ValueError(
            f"adapt names {', '.join(unused)}, which does not influence the loss: name others, or "
            "leave it as it is with allow_unused=True"
        )
    names = tuple(n for n, r in zip(slots.names, reached, strict=True) if r)
    if not names:
        raise ValueError("none of the parameters named in adapt can change the loss")
    return names


def check_cells(module: nn.Module) -> None:
    """Raise or warn where a cell is not the same function at every call.

    Raises:
        ValueError: active dropout in a cell.
    """
    for layer in module.modules():
        if not isinstance(layer, Equilibrium):
            continue
        for name, part in layer.cell.named_modules():
            if not part.training:
                continue
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
                raise ValueError(
                    f"the cell holds active dropout ({name}): it is another function at every "
                    "call and has no fixed point. Put it in eval mode, set p=0, or move it out of "
                    "the cell"
                )
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                warnings.warn(
                    f"the cell holds BatchNorm in train mode ({name}): its batch statistics couple "
                    "the samples and differ between support and query. Use GroupNorm, or put it "
                    "in eval mode",
                    stacklevel=3,
                )


def has_dropout(module: nn.Module) -> bool:
    """Whether some dropout is active."""
    return any(
        part.training and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        for part in module.modules()
    )


def same_inputs(first: Any, second: Any) -> bool:
    """Whether two calls got the same tensors.

    Args:
        first: arguments of a call, in nested tuples, lists and dicts. None: there was no such call.
        second: arguments of the other.
    """
    if first is None:
        return False
    ours, theirs = list(tensors_in(first)), list(tensors_in(second))
    return len(ours) == len(theirs) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def reaches(result: Tensor, targets: Sequence[Tensor]) -> list[bool]:
    """Which of the targets the graph of a result leads to.

    Args:
        result: a tensor with a graph.
        targets: tensors that it may have been made of.
    """
    nodes = set(graph_of(result))
    edge = torch.autograd.graph.get_gradient_edge
    return [t.requires_grad and edge(t).node in nodes for t in targets]
