"""Some rows of a batch, also where what is called wants them all.

A cell may hold what belongs to its batch: a mask, a shape, statistics of the rows. A solve that
goes on with the rows that still run then meets an error, and with it a result that is all but there
would be lost. So the first call for some of the rows is a trial. Where it is refused, all rows are
evaluated in its place, and those asked for are taken.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    FlatMap = Callable[[Tensor], Tensor]

# what a model raises where it cannot be called on some of the rows
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def warn_of_refusal(what: str, error: Exception, stacklevel: int = 3) -> None:
    """Say that all rows are called together from now on.

    Args:
        what: has refused, "the cell" or "the model".
        error: that it raised.
        stacklevel: as of :func:`warnings.warn`.
    """
    # without numbers it is one text for all numbers of rows, which Python shows once
    reason = re.sub(r"\d+", "…", str(error).partition("\n")[0])
    warnings.warn(
        f"{what} cannot be called on some of the rows of its batch ({reason}). All rows are called "
        "together from now on. Where they influence each other, as nodes of one graph do, or "
        "states that are not batch first, what is said of a row is said of it in this batch. "
        "whole_batch=True, of Equilibrium or adapt, says so beforehand, and batch_dim which "
        "dimension of the states the batch is",
        stacklevel=stacklevel,
    )


def some_rows(f: FlatMap, rows: Tensor, z: Tensor) -> FlatMap | None:
    """``f`` for some of its rows. None where it has no such map.

    Args:
        f: the map, of all rows.
        rows: indices of those that go on.
        z: where all rows are, ``(rows, n)``. The others stay there.
    """
    split = getattr(f, "restrict", None)
    if split is None:
        return None
    try:
        part = split(rows)
    except REFUSALS as error:  # an adjoint's map is evaluated where it is restricted
        warn_of_refusal("the cell", error)
        return _SomeRows(f, None, rows, z)
    return None if part is None else _SomeRows(f, part, rows, z)


class _SomeRows:
    """A map of some rows: by itself, or by the map of all, whose other rows stand still."""

    def __init__(self, f: FlatMap, part: FlatMap | None, rows: Tensor, z: Tensor) -> None:
        self.f, self.part, self.rows, self.z = f, part, rows, z
        self.tried = False

    def __call__(self, z: Tensor) -> Tensor:
        if self.part is not None:
            try:
                found = self.part(z)
            except REFUSALS as error:
                if self.tried:
                    raise
                warn_of_refusal("the cell", error)
                self.part = None
            else:
                self.tried = True
                return found
        self.z = self.z.index_copy(0, self.rows, z)
        return self.f(self.z)[self.rows]

    def restrict(self, rows: Tensor) -> FlatMap | None:
        split = getattr(self.part, "restrict", None)
        found: FlatMap | None = None if split is None else split(rows)
        return found
