"""What decides, while an optimisation runs, what a call of an equilibrium layer does.

The mode belongs to the running optimisation and to its thread. The modes that there are, are in
:mod:`jiio_plugins.joint.modes`. What a mode is, is in :mod:`jiio_plugins.equilibrium.layer`.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from jiio_plugins.equilibrium.counting import counting_into

if TYPE_CHECKING:
    from collections.abc import Iterator


_mode: ContextVar[Any] = ContextVar("jiio_mode", default=None)


@contextmanager
def layer_mode(mode: Any) -> Iterator[None]:
    """Put every equilibrium layer called in this block (and thread) into joint mode."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def current_mode() -> Any:
    """The mode that decides here what equilibrium layers do. None outside an optimisation."""
    return _mode.get()


@contextmanager
def inside_a_cell() -> Iterator[None]:
    """A layer called in this block is part of another's cell: it solves by itself, uncounted.

    An evaluation of f is one, whatever is in it. Outside of an optimisation nothing changes.
    """
    if current_mode() is None:
        yield
        return
    with layer_mode(None), counting_into(()):
        yield
