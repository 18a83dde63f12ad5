"""What ``torch.compile`` may do with an equilibrium layer."""

from __future__ import annotations

import threading
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

P = ParamSpec("P")
T = TypeVar("T")


class _ForceEager:
    """Sets PyTorch's stance, which is one for all threads, while any block is open.

    The first block sets it, and the last one puts back what was there. If each put back what it had
    found, a thread that ends after another would leave the process without a compiler.
    """

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), 0
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")
            self._open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_force_eager = _ForceEager()


def uncompiled() -> AbstractContextManager[None]:
    """In its block ``torch.compile`` has no effect: what is run may be differentiated repeatedly.

    The graph of compiled code can be walked once only. Code without a graph stays compiled.
    """
    return _force_eager


def never_compiled(forward: Callable[P, T]) -> Callable[P, T]:
    """``torch.compile`` breaks its graph at this method, and runs it as it is.

    ``torch.compiler.disable`` does that, but imports the compiler, which takes as long as torch
    itself. So it is called only by who is compiling, and has it imported.
    """

    @wraps(forward)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            why = "an equilibrium layer runs a data-dependent loop"
            as_it_is: Callable[P, T] = torch.compiler.disable(forward, reason=why)
            return as_it_is(*args, **kwargs)
        return forward(*args, **kwargs)

    return plain
