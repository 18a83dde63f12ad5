"""Where the batch is in a layer's states: first, in another dimension, or nowhere.

All that works on states has their rows first. Where a layer declares another ``batch_dim``, its
states and injections are turned on their way in and out, as views. With None they have no batch:
they are of one problem, whose one row is all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from jiio_plugins.utils.checks import is_count
from jiio_plugins.utils.trees import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable


def check_batch_dim(dim: Any) -> None:
    """Raise unless it is a dimension, counted from the first, or None.

    Raises:
        ValueError: it is something else.
    """
    if dim is not None and not is_count(dim, 0):
        raise ValueError(
            "batch_dim must be the dimension of the states that the batch is, counted from 0, or "
            f"None where the states are of one problem, got {dim!r}"
        )


def rows_first(value: Any, dim: int | None) -> Any:
    """Tensors in any containers, as they have the batch in ``dim`` -> with their rows first.

    Args:
        value: the containers. A tensor of fewer dimensions, such as a number, stays as it is.
        dim: where the batch is. None: nowhere, and all are one row.
    """
    if dim == 0:
        return value
    if dim is None:
        return map_leaves(value, Tensor, lambda t: t[None])
    return map_leaves(value, Tensor, lambda t: t.movedim(dim, 0) if t.ndim > dim else t)


def rows_back(value: Any, dim: int | None) -> Any:
    """The inverse of :func:`rows_first`.

    Args:
        value: containers of tensors with their rows first.
        dim: where the batch is to be. None: nowhere.
    """
    if dim == 0:
        return value
    if dim is None:
        return map_leaves(value, Tensor, lambda t: t[0])
    return map_leaves(value, Tensor, lambda t: t.movedim(0, dim) if t.ndim > dim else t)


def check_states(state: Any, dim: int | None) -> None:
    """Raise unless each tensor of a state has the dimension that the batch is said to be.

    Args:
        state: as its cell has it.
        dim: where the batch is. None: nowhere.

    Raises:
        ValueError: one has too few.
    """
    short = [tuple(t.shape) for t in leaves(state, Tensor) if dim is not None and t.ndim <= dim]
    if short and dim:
        raise ValueError(
            f"batch_dim={dim} needs states of {dim + 1} dimensions or more, got one of shape "
            f"{short[0]}: name the dimension that the batch is, or None for states of one problem"
        )


def on_rows(cell: Callable[..., Any], dim: int | None) -> Callable[..., Any]:
    """``cell`` on states and injections with their rows first. A module stays one.

    Args:
        cell: ``cell(z, *injection) -> z``, with the batch in ``dim``.
        dim: where the batch is. None: nowhere.
    """
    if dim == 0:
        return cell
    if isinstance(cell, nn.Module):
        return _OnRows(cell, dim)
    return lambda *given: rows_first(cell(*rows_back(given, dim)), dim)


class _OnRows(nn.Module):
    def __init__(self, cell: nn.Module, dim: int | None) -> None:
        super().__init__()
        self.cell, self.dim, self.__name__ = cell, dim, type(cell).__name__
        self.training = cell.training

    def forward(self, *given: Any) -> Any:
        return rows_first(self.cell(*rows_back(given, self.dim)), self.dim)
