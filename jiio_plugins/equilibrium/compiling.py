"""What ``torch.compile`` may do with an equilibrium layer."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled() -> AbstractContextManager[Any]:
    """In its block ``torch.compile`` has no effect: what is run may be differentiated repeatedly.

    The graph of compiled code can be walked once only. Code without a graph stays compiled.
    """
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


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
