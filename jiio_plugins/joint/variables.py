"""The optimised variable, flat: the model's input, or named parameters."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jiio_plugins.joint.guard import Replay, guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from typing import Self


class Groups:
    """Which problem each row of the batch belongs to. By default a row is a problem of its own.

    Args:
        rows: of the batch.
        index: problem of each row, integers ``0 … P−1``, ``(rows,)``. None: a problem a row.

    Attributes:
        problems: how many there are.
        width: rows of the largest of them.
    """

    def __init__(self, rows: int, index: Tensor | None = None) -> None:
        self.index = index
        counts = None if index is None else torch.bincount(index)
        self.problems = rows if counts is None else len(counts)
        self.width = 1 if counts is None or not len(counts) else int(counts.max())

    def sum(self, per_row: Tensor) -> Tensor:
        """``(rows, ...) -> (problems, ...)``, summed."""
        if self.index is None:
            return per_row
        if self.problems == 1:
            return per_row.sum(0, keepdim=True)
        return per_row.new_zeros(self.problems, *per_row.shape[1:]).index_add(
            0, self.index, per_row
        )

    def spread(self, per_problem: Tensor) -> Tensor:
        """``(problems, ...) -> (rows, ...)``: each row gets its problem's entry."""
        if self.index is None:
            return per_problem
        if self.problems == 1:
            return per_problem.expand(len(self.index), *per_problem.shape[1:])
        return per_problem[self.index]

    def worst(self, per_row: Tensor) -> Tensor:
        """``(rows,) -> (problems,)``, the largest."""
        if self.index is None:
            return per_row
        if self.problems == 1:
            return per_row.amax(0, keepdim=True)
        out = per_row.new_zeros(self.problems)
        return out.scatter_reduce(0, self.index, per_row, "amax", include_self=False)

    @cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """Problem of each row, and which of its rows it is, ``(rows,)`` each."""
        assert self.index is not None
        rows = torch.arange(len(self.index), device=self.index.device)
        order = torch.argsort(self.index, stable=True)
        counts = rows.new_zeros(self.problems).index_add(0, self.index, torch.ones_like(rows))
        first = counts.cumsum(0) - counts
        slot = torch.empty_like(rows).index_put((order,), rows - first[self.index[order]])
        return self.index, slot

    def gather(self, per_row: Tensor) -> Tensor:
        """``(rows, k) -> (problems, width, k)``: each problem's rows, then zeros.

        Problems of very different size waste memory and time here.
        """
        if self.index is None:
            return per_row[:, None]
        if self.problems == 1:
            return per_row[None]
        empty = per_row.new_zeros(self.problems, self.width, *per_row.shape[1:])
        return empty.index_put(self.place, per_row)

    def scatter(self, gathered: Tensor) -> Tensor:
        """The inverse of :meth:`gather`."""
        if self.index is None:
            return gathered[:, 0]
        return gathered[0] if self.problems == 1 else gathered[self.place]

    def join(self, z: Tensor, jz_mu: Tensor) -> Tensor:
        """Two blocks by row as one block by problem, ``(problems, 2, width · n)``.

        Args:
            z: the first, ``(rows, n)``.
            jz_mu: the second, ``(rows, n)``, such as ``J_zᵀμ``.
        """
        return torch.stack((self.gather(z), self.gather(jz_mu)), dim=1).flatten(2)

    def part(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`join`."""
        z, jz_mu = joined.unflatten(2, (self.width, joined.shape[2] // self.width)).unbind(1)
        return self.scatter(z), self.scatter(jz_mu)


def _own(*inputs: Tensor) -> tuple[Tensor, ...]:
    """What a model is called with: it may change it in place."""
    return tuple(t.clone() for t in inputs)


class Variable:
    """The optimised variable, flat ``(problems, d)``: the model's input.

    Args:
        model: what is called.
        x: its input, ``(rows, ...)``.
        given: what else it is called with, tensors ``(rows, ...)``.
        repeatable: draw the same random numbers at every call, one dropout mask for all. The model
            is then always called on all rows: fewer would draw another mask.
        one: x is of one problem, whose one row is all of it, as the nodes of one graph. ``given``
            is then of any shape.

    Attributes:
        rows: of the batch.
        origin: v with its graph, where it has one, in its own shape.
        start: v without a graph, in its own shape.
        groups: which problem each row belongs to.
        rows_see_v_alone: whether v and ``given`` are all that the output of a row depends on.
    """

    rows_see_v_alone = True
    one = False

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        given: Sequence[Tensor] = (),
        *,
        repeatable: bool = False,
        one: bool = False,
    ) -> None:
        self.one = one
        self._set(model, 1 if one else len(x), given, repeatable)
        self.shape, self.groups = x.shape, Groups(self.rows)
        self.origin = x[None] if one else x
        self.start = self.origin.detach()

    def _set(self, model: nn.Module, rows: int, given: Sequence[Tensor], repeatable: bool) -> None:
        self.model, self.rows, self.repeatable = model, rows, repeatable
        self._replay: Callable[[], AbstractContextManager[Any]]
        self._replay = Replay() if repeatable else nullcontext
        self._live_given = tuple(given)
        self.given = tuple(t.detach() for t in given)  # no graph of theirs in every iteration

    @property
    def dtypes(self) -> list[tuple[str, torch.dtype]]:
        """What the model is called with, by the caller's names."""
        given = [(f"given[{k}]", t.dtype) for k, t in enumerate(self.given)]
        return [("x", self.start.dtype), *given]

    def live(self) -> Self:
        """The same with the graphs of what was given."""
        other = copy.copy(self)
        other.given = self._live_given
        return other

    def guarded(self, *, freeze: bool = True) -> AbstractContextManager[None]:
        """What an optimisation runs in, see :func:`jiio_plugins.joint.guarded`.

        With ``freeze`` the model's parameters are constants meanwhile.
        """
        return guarded(self.model, evaluate=not self.repeatable, freeze=freeze)

    def __call__(self, v: Tensor, rows: Tensor | None = None) -> Any:
        """The model's output at v.

        Args:
            v: the variable, ``(problems, d)``.
            rows: indices of the rows to call it on. None: all.
        """
        with self._replay():
            return self._call(v, rows)

    def _call(self, v: Tensor, rows: Tensor | None) -> Any:
        if rows is None or self.one:
            return self.model(*_own(v.reshape(self.shape), *self.given))
        given = [t[rows] for t in self.given]
        return self.model(*_own(v[rows].reshape(len(rows), *self.shape[1:])), *given)

    def unflatten(self, v: Tensor) -> Any:
        """The variable ``(problems, d)`` as the caller knows it."""
        return v.reshape(self.shape)


class ParameterVariable(Variable):
    """Named parameters of the model. With several problems each row sees its problem's copy.

    Args:
        model: what is called.
        x: its input, ``(rows, ...)``, which stands still.
        names: of ``model.named_parameters()``.
        groups: problem of each row, integers ``0 … P−1``, ``(rows,)``. None: one for all.
        given: what else it is called with, tensors ``(rows, ...)``.
        repeatable: draw the same random numbers at every call.
        one: x is of one problem, as of :class:`Variable`.

    Raises:
        ValueError: an unknown name, or a parameter without a leading dimension of 1 for several
            problems.
    """

    rows_see_v_alone = False  # but their row of x too

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        names: Sequence[str],
        groups: Tensor | None,
        given: Sequence[Tensor] = (),
        *,
        repeatable: bool = False,
        one: bool = False,
    ) -> None:
        parameters = dict(model.named_parameters())
        missing = [name for name in names if name not in parameters]
        if missing or not names:
            raise ValueError(
                f"variables must name parameters of the model; {missing or 'an empty list'} given, "
                f"there are {', '.join(parameters)}"
            )
        self.one = one
        self._set(model, 1 if one else len(x), given, repeatable)
        self.x, self.names = x, tuple(names)
        if groups is None:
            groups = torch.zeros(self.rows, dtype=torch.long, device=x.device)
        self.groups = Groups(self.rows, groups)
        chosen = [parameters[name] for name in self.names]
        problems = self.groups.problems
        if problems > 1:
            wrong = [
                n for n, p in zip(self.names, chosen, strict=True) if p.ndim < 1 or len(p) != 1
            ]
            if wrong:
                raise ValueError(
                    f"with {problems} problems each row needs its own copy of a variable, so its "
                    f"parameter must have a leading dimension of 1 that the model broadcasts over "
                    f"rows; {', '.join(wrong)} does not"
                )
        self.shapes = [p.shape[1:] if problems > 1 else p.shape for p in chosen]
        self.origin = torch.cat([p.reshape(1, -1) for p in chosen], dim=1).repeat(problems, 1)
        self.start = self.origin.detach()

    @property
    def dtypes(self) -> list[tuple[str, torch.dtype]]:
        """See :class:`Variable`."""
        return [("x", self.x.dtype), *super().dtypes[1:]]

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Name -> ``(problems, ...)``, or the parameter's own shape for one problem."""
        parts = v.split([shape.numel() for shape in self.shapes], dim=1)
        return {
            name: part.reshape(len(v), *shape) if self.groups.problems > 1 else part.reshape(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def _call(self, v: Tensor, rows: Tensor | None) -> Any:
        spread = self.groups.spread(v) if self.groups.problems > 1 else v
        if rows is None or self.one:
            inputs = _own(self.x, *self.given)
        else:
            spread = spread[rows] if self.groups.problems > 1 else v
            inputs = tuple(t[rows] for t in (self.x, *self.given))
        return functional_call(self.model, self.unflatten(spread), inputs)
