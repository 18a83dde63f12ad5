"""The guard: whatever runs inside, the caller's model is as it was afterwards."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.layer import EquilibriumLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jiio_plugins.joint.variables import Variable


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Let the block move copies of the buffers (running statistics), and put the own ones back.

    A graph made in the block may have saved them, so they are exchanged, not written over.
    """
    owners = list(model.modules())
    places = [(owner, key, b) for owner in owners for key, b in owner._buffers.items()]
    copies: dict[int, Tensor] = {}
    for owner, key, buffer in places:
        if buffer is not None and not buffer.requires_grad:  # one that does is a constant
            copies.setdefault(id(buffer), buffer.detach().clone())
            owner._buffers[key] = copies[id(buffer)]
    try:
        yield
    finally:
        for owner, key, buffer in places:
            if owner._buffers.get(key) is not buffer:  # None may have been filled
                owner._buffers[key] = buffer
        known = {(id(owner), key) for owner, key, _ in places}
        for owner in owners:
            for key in [key for key in owner._buffers if (id(owner), key) not in known]:
                del owner._buffers[key]


def same_randomness(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with the same random numbers every time, the global generators left as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if devices else []

    def replay(*args: Any) -> Any:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(cpu)
            if devices:
                torch.cuda.set_rng_state_all(cuda)
            return call(*args)

    return replay


@contextmanager
def undisturbed(
    model: nn.Module, training_mode: bool, variable: Variable, *, frozen: bool = True
) -> Iterator[None]:
    """Run with eval mode and constant parameters; put everything back, also after an exception.

    Threads that share a model take turns: its flags and buffers are one for all.
    """
    with turn_of(model), _changed_back(model, training_mode, variable, frozen):
        yield


_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


_TURNS_LOCK = threading.Lock()


def turn_of(model: nn.Module) -> threading.RLock:
    """The lock of a model: of its first equilibrium layer, which wrappers of it share."""
    layers = (module for module in model.modules() if isinstance(module, EquilibriumLayer))
    with _TURNS_LOCK:
        return _TURNS.setdefault(next(layers, model), threading.RLock())


@contextmanager
def _changed_back(
    model: nn.Module, training_mode: bool, variable: Variable, frozen: bool
) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    constants = [p for p in model.parameters() if p.requires_grad] if frozen else []
    call, call_rows = variable.call, variable.call_rows
    if training_mode:
        if any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()
        ):
            warnings.warn(
                "training_mode=True with BatchNorm in train mode: its batch statistics couple the "
                "samples, so results depend on what else is in the batch",
                stacklevel=6,
            )
        # setting instance attributes shadows the methods for this call only
        variable.call = same_randomness(call)  # type: ignore[method-assign]
        variable.call_rows = same_randomness(call_rows)  # type: ignore[method-assign]
    else:
        model.eval()
    for p in constants:
        p.requires_grad_(False)
    try:
        with buffers_kept(model):
            yield
    finally:
        for p in constants:
            p.requires_grad_(True)
        for module, training in flags:
            module.training = training
