"""The guard: whatever runs inside, the caller's model is as it was afterwards.

:func:`guarded` is the whole of it. The parts are there for code that needs one alone, such as a
training loop, which must move buffers and gradients.
"""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.layer import EquilibriumLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@contextmanager
def guarded(
    model: nn.Module, *, evaluate: bool = True, freeze: bool = True, randomness: bool = False
) -> Iterator[None]:
    """Run a block on a model, and put everything back, also after an exception.

    Train/eval flags, buffers, ``requires_grad`` and ``.grad`` are as before. Threads that share a
    model take turns: its flags and buffers are one for all.

    Args:
        model: whose state is kept.
        evaluate: put it into eval mode meanwhile.
        freeze: its parameters are constants meanwhile.
        randomness: put the global generators of torch, NumPy and Python back, too. Needed where
            code of another library runs, which may seed them.
    """
    with ExitStack() as stack:
        stack.enter_context(_turn_of(model))
        for part in (flags_kept, gradients_kept, buffers_kept):
            stack.enter_context(part(model))
        if randomness:
            stack.enter_context(_randomness_kept())
        if evaluate:
            model.eval()
        if freeze:
            for p in model.parameters():
                if p.requires_grad:
                    p.requires_grad_(False)
        yield


_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def _turn_of(model: nn.Module) -> threading.RLock:
    """The lock of a model: of its first equilibrium layer, which wrappers of it share."""
    layers = (module for module in model.modules() if isinstance(module, EquilibriumLayer))
    with _TURNS_LOCK:
        return _TURNS.setdefault(next(layers, model), threading.RLock())


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Put the train/eval flag of every module back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put every parameter's ``requires_grad`` and ``.grad`` back."""
    # what stands for a parameter may be a result, which has neither of its own
    before = [(p, p.requires_grad, p.grad) for p in model.parameters() if p.is_leaf]
    try:
        yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Let the block move copies of the buffers (running statistics), and put the own ones back.

    A graph made in the block may have saved the copies, so buffers are exchanged, not written over.
    """
    owners = list(model.modules())
    before = [(owner, dict(_buffers_of(owner))) for owner in owners]
    copies: dict[int, Tensor] = {}
    for owner, own in before:
        for key, buffer in own.items():
            if buffer is not None and not buffer.requires_grad:  # one that does is a constant
                copies.setdefault(id(buffer), buffer.detach().clone())
                owner._buffers[key] = copies[id(buffer)]
    try:
        yield
    finally:
        for owner, own in before:
            now = dict(_buffers_of(owner))
            for key, buffer in own.items():
                if now.get(key) is not buffer:  # None may have been filled
                    owner._buffers[key] = buffer
            for key in now.keys() - own.keys():
                del owner._buffers[key]


def _buffers_of(module: nn.Module) -> Iterable[tuple[str, Tensor | None]]:
    """Name and buffer, as ``named_buffers`` reads them, with those that are None.

    The buffers of a TorchScript module are no dict: they can be read by ``items`` and assigned.
    """
    return module._buffers.items()


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


@contextmanager
def _randomness_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state)
    try:
        with torch.random.fork_rng(_cuda_devices()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class Replay:
    """torch's random numbers as they would be drawn now, again and again.

    ``with replay():`` runs a block on them and leaves the global generators as they were.
    """

    def __init__(self) -> None:
        self.devices = _cuda_devices()
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if self.devices else []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw them once more."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            if self.devices:
                torch.cuda.set_rng_state_all(self.cuda)
            yield
