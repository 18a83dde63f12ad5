"""Recording what is computed from a model's output, so that it can be computed again from another.

A toolkit hands over ``loss``, one number, where a joint optimisation needs a function: the loss at
every iterate. The output that the caller's code gets is made of :class:`Recorded` tensors. These
are ordinary tensors with their gradient, which note every torch function applied to them on a
:class:`Tape`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.utils import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Slot(NamedTuple):
    """Stands for a recorded value."""

    number: int


class _Copied(NamedTuple):
    """A constant that an in-place function changes: every replay changes a copy of it."""

    tensor: Tensor


class _Step(NamedTuple):
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any  # its structure, with slots for tensors


class Tape:
    """The torch functions applied to one output, in order.

    On it comes every function with a tensor among its results, in-place ones included. Tensors that
    do not come from the output are *constants*. What Python reads off a tensor (``item()``,
    ``if loss > 1``) is not followed: at a replay it is what it was.

    Args:
        output: a tensor, or tensors in nested containers.
        source: what made the output, kept as it is.
    """

    def __init__(self, output: Any, source: Any = None) -> None:
        self.source = source
        self._steps: list[_Step] = []
        self._slots = 0
        # a copy, for the caller may change the output in place
        self._was = map_tensors(output, lambda t: t.detach().clone())
        self._source = map_tensors(output, lambda _: self._new_slot())

    def wrap(self, output: Any) -> Any:
        """``output`` made of :class:`Recorded` tensors. Call it once."""
        return _zip_tensors(output, self._source, self._recorded)

    def record(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function and note it.

        Args:
            func: a function of torch.
            args: its arguments, with at least one tensor of this tape.
            kwargs: its keywords.

        Returns:
            Its result, recorded where it is or holds a tensor.
        """
        kept_args, kept_kwargs = map_tensors((args, kwargs), self._to_slot)
        in_place = _works_in_place(func)
        if in_place and isinstance(kept_args[0], Tensor):
            kept_args = (_Copied(kept_args[0].clone()), *kept_args[1:])
        with torch._C.DisableTorchFunctionSubclass():  # else this call would record itself again
            result = func(*args, **kwargs)
        changes_record = in_place and isinstance(kept_args[0], Slot)
        if next(tensors_in(result), None) is None and not changes_record:
            return result
        result = map_tensors(
            result, lambda t: t if self._knows(t) else self._recorded(t, self._new_slot())
        )
        slots = map_tensors(result, self._to_slot)
        self._steps.append(_Step(func, kept_args, kept_kwargs, slots))
        return result

    def constants(self) -> Iterator[Tensor]:
        """The tensors that came in from elsewhere."""
        for step in self._steps:
            yield from tensors_in((step.args, step.kwargs))

    def replay(self, recorded: Recorded, output: Any = None) -> Tensor:
        """What a recorded value is when the model gives another output.

        Args:
            recorded: a tensor of this tape.
            output: built like the one that was recorded. None: that one.
        """
        values: dict[int, Tensor] = {}
        if output is None:
            output = map_tensors(self._was, Tensor.clone)
        _zip_tensors(output, self._source, lambda t, slot: values.update({slot.number: t}))
        for func, args, kwargs, slots in self._steps:
            args, kwargs = _fill((args, kwargs), values)
            result = func(*args, **kwargs)
            _zip_tensors(result, slots, lambda t, slot: values.update({slot.number: t}))
        return values[recorded.slot.number]

    def _new_slot(self) -> Slot:
        self._slots += 1
        return Slot(self._slots - 1)

    def _recorded(self, tensor: Tensor, slot: Slot) -> Recorded:
        recorded = tensor.as_subclass(Recorded)
        recorded.tape, recorded.slot = self, slot
        return recorded

    def _knows(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Recorded) and getattr(tensor, "tape", None) is self

    def _to_slot(self, tensor: Tensor) -> Any:
        return tensor.slot if self._knows(tensor) else tensor  # type: ignore[attr-defined]


class Recorded(Tensor):
    """A tensor whose history since the model's output is on a tape.

    Results that mix two tapes are plain tensors, and so are copies and what is unpickled.
    """

    tape: Tape
    slot: Slot

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record the call."""
        kwargs = kwargs or {}
        tapes = {
            id(t.tape): t.tape
            for t in tensors_in((args, kwargs))
            if isinstance(t, Recorded) and hasattr(t, "tape")
        }
        if len(tapes) == 1:
            return next(iter(tapes.values())).record(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__deepcopy__(memo)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A value with a function applied to each tensor in nested containers.

    Args:
        value: anything.
        function: what a tensor becomes.
    """
    return map_leaves(value, Tensor, function)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    return leaves(value, Tensor)


def _zip_tensors(value: Any, slots: Any, function: Callable[[Tensor, Slot], Any]) -> Any:
    """As :func:`map_tensors`, with the slot that stands in the same place."""
    numbers = leaves(slots, Slot)
    return map_tensors(value, lambda t: function(t, next(numbers)))


def _fill(value: Any, values: dict[int, Tensor]) -> Any:
    """``value`` with its slots replaced by what they hold."""

    def filled(place: Slot | _Copied) -> Tensor:
        return values[place.number] if isinstance(place, Slot) else place.tensor.clone()

    return map_leaves(value, (Slot, _Copied), filled)


def _works_in_place(func: Callable[..., Any]) -> bool:
    """By torch's own naming: ``add_``, ``__iadd__``, ``__setitem__``."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or name in _AUGMENTED
    return name.endswith("_")


_AUGMENTED = {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "div",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    )
}
