"""What is public and takes several parameters says what each of them is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

import jiio_plugins

if TYPE_CHECKING:
    from collections.abc import Iterator

ADAPTERS = ("jiio_art", "jiio_deepinv", "jiio_learn2learn", "jiio_torchattacks", "jiio_torchdeq")


def public_modules() -> Iterator[Any]:
    """Those that say what is public: the package, what stands in it, and the adapters."""
    children = sorted(m.name for m in pkgutil.iter_modules(jiio_plugins.__path__))
    inner = [f"jiio_plugins.{name}" for name in children if not name.startswith("_")]
    for name in ("jiio_plugins", *inner, *ADAPTERS):
        module = importlib.import_module(name)
        if hasattr(module, "__all__"):
            yield module


@cache
def documented() -> dict[str, tuple[Any, list[str]]]:
    """By public name: what has a docstring, and its parameters without self."""
    found: dict[str, tuple[Any, list[str]]] = {}
    seen: set[Any] = set()

    def add(name: str, owner: Any, signature: inspect.Signature, skip: int = 0) -> None:
        if owner not in seen:
            seen.add(owner)
            names = [p for p in list(signature.parameters)[skip:] if p not in ("args", "kwargs")]
            found[name] = (owner, names)

    for module in public_modules():
        for name in module.__all__:
            value = getattr(module, name)
            path = f"{module.__name__}.{name}"
            if inspect.isfunction(value):
                add(path, value, inspect.signature(value))
            elif inspect.isclass(value) and not issubclass(value, (Enum, Warning)):
                add(path, value, inspect.signature(value))
                for method, function, bound in methods(value):
                    add(f"{path}.{method}", function, inspect.signature(function), skip=bound)
    return found


def methods(cls: type) -> Iterator[tuple[str, Any, int]]:
    """Public methods that the class or a base class of ours defines: name, function, has self."""
    for base in cls.__mro__:
        if not base.__module__.startswith("jiio_"):
            continue
        for name, member in vars(base).items():
            static = isinstance(member, staticmethod)
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and not name.startswith("_"):
                yield name, function, 0 if static else 1


def explained(docstring: str) -> set[str]:
    """The names that start an entry of ``Args:`` or ``Attributes:``, ``a, b: …`` counting twice."""
    names: set[str] = set()
    for section in re.findall(
        r"^(?:Args|Attributes):\n((?:(?:[ ]+.*)?\n)+)", docstring + "\n", re.M
    ):
        for entry in re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", section, re.M):
            names |= set(re.findall(r"\w+", entry))
    return names


def missing(owner: Any, parameters: list[str]) -> list[str]:
    """The parameters that the docstring does not explain, of a call that takes several."""
    own = owner.__doc__ if inspect.isclass(owner) else inspect.getdoc(owner)
    known = explained(inspect.cleandoc(own or ""))
    return [name for name in parameters if name not in known] if len(parameters) > 1 else []


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_parameter_is_explained(name: str) -> None:
    left = missing(*documented()[name])
    assert not left, f"the docstring of {name} does not explain {', '.join(left)}"


TEXT = """One line.

Args:
    a: one,
        on two lines: yes.

    b, *c: two.

Returns:
    d: no.
"""


def test_sections_are_read() -> None:
    assert explained(TEXT) == {"a", "b", "c"}
    assert missing(lambda a, b: None, ["a", "b"]) == ["a", "b"]
    assert missing(lambda a: None, ["a"]) == []
