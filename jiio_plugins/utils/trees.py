"""Values in nested containers, which come back as the type that they were.

A model may return tensors in tuples, lists and dicts, in subclasses of them such as named tuples or
the ordered dicts with attributes that Hugging Face's models return, and in dataclasses.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Kind = type | tuple[type, ...]


def leaves(value: Any, kind: Kind) -> Iterator[Any]:
    """All that is of a kind in nested containers, in their order.

    Args:
        value: anything.
        kind: type, or types, of what is looked for.
    """
    if isinstance(value, kind):
        yield value
        return
    for item in _items(value):
        yield from leaves(item, kind)


def map_leaves(value: Any, kind: Kind, function: Callable[[Any], Any]) -> Any:
    """A value with a function applied to all that is of a kind, in nested containers.

    Args:
        value: anything. It is not changed.
        kind: type, or types, of what the function is applied to.
        function: what such a thing becomes.

    Returns:
        Containers like those given. One in which nothing has become something else is itself.
    """
    if isinstance(value, kind):
        return function(value)
    items = _items(value)
    mapped = [map_leaves(item, kind, function) for item in items]
    if all(new is old for new, old in zip(mapped, items, strict=True)):
        return value
    return _like(value, mapped)


def _attributes(value: Any) -> list[str]:
    """Names of what a container holds as attributes."""
    if is_dataclass(value) and not isinstance(value, (type, dict)):
        return [f.name for f in fields(value) if hasattr(value, f.name)]
    return list(getattr(value, "__dict__", ()))


def _items(value: Any) -> list[Any]:
    """What is in a container. Anything else holds nothing."""
    held: list[Any] = []
    if isinstance(value, dict):
        held += value.values()
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        held += value
    elif not is_dataclass(value) or isinstance(value, type):
        return held
    return held + [getattr(value, name) for name in _attributes(value)]


def _like(value: Any, items: list[Any]) -> Any:
    """A container like this one with other items. Its constructor is not called.

    What that asks for, and makes of it, is its own affair.
    """
    kind: Any = type(value)
    names = _attributes(value)
    held, attributes = items[: len(items) - len(names)], items[len(items) - len(names) :]
    new: Any
    if isinstance(value, dict):
        new = kind.__new__(kind)
        if isinstance(value, defaultdict):
            new.default_factory = value.default_factory
        put = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__
        for key, item in zip(value, held, strict=True):
            put(new, key, item)
    elif isinstance(value, list):
        new = kind.__new__(kind)
        list.extend(new, held)
    elif isinstance(value, tuple):
        # those of torch.return_types are made from a sequence, and by that alone
        made = hasattr(kind, "n_sequence_fields")
        new = kind(held) if made else tuple.__new__(kind, held)
    else:
        new = copy.copy(value)
    for name, item in zip(names, attributes, strict=True):
        object.__setattr__(new, name, item)  # of a frozen dataclass too
    return new
