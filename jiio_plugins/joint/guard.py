"""The guard: whatever runs inside, the caller's model is as it was afterwards.

:func:`guarded` is the whole of it. The parts are there for code that needs one alone, such as a
training loop, which must move buffers and gradients.
"""

from __future__ import annotations

import os
import random
import threading
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.layer import EquilibriumLayer
from jiio_plugins.joint.weights import weights_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@contextmanager
def guarded(
    model: nn.Module, *, evaluate: bool = True, freeze: bool = True, randomness: bool = False
) -> Iterator[None]:
    """Run a block on a model, and put everything back, also after an exception.

    Train/eval flags, buffers, ``requires_grad`` and ``.grad`` are as before. Threads that share a
    model take turns: its flags and buffers are one for all. A forked process finds it put back.

    Args:
        model: whose state is kept.
        evaluate: put it into eval mode meanwhile.
        freeze: its parameters are constants meanwhile, and weights that are computed from them are
            computed once (:mod:`jiio_plugins.joint.weights`).
        randomness: put the global generators of torch, NumPy and Python back, too. Needed where
            code of another library runs, which may seed them.
    """
    with _turn_at(model), _randomness_kept() if randomness else nullcontext(), ExitStack() as stack:
        _at_work[stack] = threading.get_ident()
        stack.callback(_at_work.pop, stack, None)
        for part in (flags_kept, gradients_kept, buffers_kept):
            stack.enter_context(part(model))
        if evaluate:
            model.eval()
        if freeze:
            for p in model.parameters():
                if p.requires_grad:
                    p.requires_grad_(False)
            stack.enter_context(weights_once(model))
        yield


_turns = threading.Condition()
_owner: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # the thread at work on a model
_awaited: dict[int, nn.Module] = {}  # the model that a thread waits for
_at_work: dict[ExitStack, int] = {}  # what puts a model back, and the thread that will do so


@contextmanager
def _turn_at(model: nn.Module) -> Iterator[None]:
    """One thread at a time, by the model's first equilibrium layer, which wrappers of it share."""
    key = next((m for m in model.modules() if isinstance(m, EquilibriumLayer)), model)
    me = threading.get_ident()
    with _turns:
        _awaited[me] = key
        try:
            _turns.wait_for(lambda: _may_go(key, me))
        finally:
            del _awaited[me]
        outermost = key not in _owner
        if outermost:
            _owner[key] = me
    try:
        yield
    finally:
        if outermost:
            with _turns:
                if _owner.get(key) == me:
                    del _owner[key]
                _turns.notify_all()


def _may_go(key: nn.Module, me: int) -> bool:
    """Whether nobody is at work on a model, or who is cannot go on before ``me`` is done.

    Where two threads nest models in opposite order, the second would wait for the first, which
    waits for the second. The first sleeps then, and the second may go as a call inside its own.
    """
    thread = _owner.get(key)
    if thread is None:
        return True
    while thread is not None and thread != me and thread in _awaited:
        thread = _owner.get(_awaited[thread])
    return thread == me


def _only_thread_left() -> None:
    """In a forked process: put back what the threads that are not there were at work on."""
    global _turns
    _turns = threading.Condition()  # the old one may have been held
    _awaited.clear()
    me = threading.get_ident()
    for key in [key for key, thread in _owner.items() if thread != me]:
        del _owner[key]
    for stack in [stack for stack, thread in reversed(_at_work.items()) if thread != me]:
        with suppress(ValueError):  # a part that was at it when the process forked
            stack.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_only_thread_left)


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Put the train/eval flag of every module back. Frozen TorchScript modules have none."""
    flags = [(m, m.training) for m in model.modules() if hasattr(m, "training")]
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
