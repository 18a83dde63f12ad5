"""The states a cell works on, as one flat ``(rows, n)`` matrix the solvers work on."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager


def as_tensors(state: Any, what: str = "state") -> tuple[Tensor, ...]:
    """The tensors of a state.

    Args:
        state: a batch-first tensor, or a tuple or list of them.
        what: what the message calls it.

    Raises:
        TypeError: anything else was given.
    """
    tensors = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise TypeError(
                f"{what} must be a batch-first tensor or a tuple of such tensors, "
                f"got {type(tensor).__name__}"
            )
    return tensors


@dataclass(frozen=True)
class Layout:
    """Shapes behind a flat state: ``pack`` and ``unpack`` are inverse to each other.

    Attributes:
        shapes: of each tensor, without its rows.
        is_tuple: whether the state is a tuple, which may hold one tensor only.
        kind: what makes such a tuple of its tensors, for a named one.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    kind: Callable[[Iterable[Tensor]], Any] = tuple

    @classmethod
    def of(cls, state: Any) -> Layout:
        """The layout of ``state``, its rows left out."""
        shapes = tuple(t.shape[1:] for t in as_tensors(state))
        kind = getattr(type(state), "_make", tuple)
        return cls(shapes, isinstance(state, (tuple, list)), kind)

    @property
    def sizes(self) -> list[int]:
        """Entries per row of each tensor."""
        return [shape.numel() for shape in self.shapes]

    def pack(self, state: Any) -> Tensor:
        """Tensor or tuple -> ``(rows, n)``."""
        return flatten(as_tensors(state))

    def unpack(self, flat: Tensor) -> Any:
        """``(rows, n)`` -> tensor, a view, or tuple, of contiguous tensors.

        A cell may look at its state as another shape, and a compiled one is compiled anew for each
        kind of strides.
        """
        parts = flat.split(self.sizes, dim=1) if len(self.shapes) > 1 else (flat,)
        tensors = tuple(
            part.contiguous().reshape(len(flat), *shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        )
        return self.assemble(tensors)

    def assemble(self, tensors: Sequence[Tensor]) -> Any:
        """The tensors of a state -> tensor or tuple."""
        return self.kind(tensors) if self.is_tuple else tensors[0]

    def check(self, state: Any, rows: int, what: str) -> None:
        """Raise unless a state has this layout.

        Args:
            state: a tensor or a tuple of tensors.
            rows: rows it must have.
            what: what the message calls it.

        Raises:
            TypeError: it holds something that is no tensor, or no real floating-point numbers.
            ValueError: it has another shape or structure.
        """
        tensors = as_tensors(state, what)
        for t in tensors:
            if not t.is_floating_point():
                raise TypeError(
                    f"{what} is {t.dtype}, but a state holds real floating-point numbers: nothing "
                    "can be solved or differentiated in others"
                )
        got = [tuple(t.shape) for t in tensors]
        wanted = [(rows, *shape) for shape in self.shapes]
        is_tuple = isinstance(state, (tuple, list))
        if is_tuple == self.is_tuple and got == wanted:
            return
        kind = ("tensor", "tuple")
        raise ValueError(
            f"{what} is a {kind[is_tuple]} of shape {_show(got)}, but the state is a "
            f"{kind[self.is_tuple]} of shape {_show(wanted)}: a cell must return a state like the "
            "one it was given"
        )


class StateLayout:
    """Several layers' states side by side in one flat matrix, ``(rows, n)``."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = tuple(layouts)
        self.sizes = [sum(layout.sizes) for layout in self.layouts]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The flat state of each layer, from all of them ``(rows, n)``."""
        return list(flat.split(self.sizes, dim=1)) if len(self.sizes) > 1 else [flat]

    def unpack(self, flat: Tensor) -> Any:
        """The one layer's state as its cell has it. Of several layers, a tuple over them."""
        parts = [
            layout.unpack(part) for layout, part in zip(self.layouts, self.split(flat), strict=True)
        ]
        return parts[0] if len(parts) == 1 else tuple(parts)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate batch-first tensors to ``(rows, n)``."""
    flats = [t.reshape(len(t), t.shape[1:].numel()) for t in tensors]  # (0, n) for no rows too
    return flats[0] if len(flats) == 1 else torch.cat(flats, dim=1)


def products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """``M v`` of every row, ``(rows, m)``, as ``(vᵀ Mᵀ)ᵀ``.

    A CPU takes several times as long for a batch of matrices times columns.

    Args:
        matrices: ``(rows, m, n)``.
        vectors: ``(rows, n)``.
    """
    return torch.bmm(vectors.unsqueeze(1), matrices.mT).squeeze(1)


def row_norm(flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norm of every row, ``(rows,)``.

    Args:
        flat: ``(rows, n)``.
        dtype: to compute and return it in. None: that of ``flat``.
    """
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norm


def safe_norm(flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`row_norm`, also where squares are too small or too large for the dtype.

    Args:
        flat: ``(rows, n)``.
        dtype: to return it in. None: that of ``flat``.
    """
    if flat.device.type != "cpu":  # which of them are lost, nobody may ask
        return row_norm(flat, torch.float64).to(dtype or flat.dtype)
    norm = row_norm(flat, dtype)
    if norm.dtype == torch.float64:
        return norm
    if norm.numel():
        least, most = norm.detach().aminmax()
        if float(least) > _SAFE and float(most) < 1 / _SAFE:
            return norm
    lost = ~((norm > _SAFE) & (norm < 1 / _SAFE))
    return torch.where(lost, row_norm(flat, torch.float64).to(norm.dtype), norm)


def safe_norms(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """:func:`safe_norm` of two, whose safety a CPU sees in one look.

    Args:
        a: ``(rows, n)``.
        b: the same.
        dtype: to return them in. None: that of ``a``.
    """
    if a.device.type != "cpu" or not a.numel():
        return safe_norm(a, dtype), safe_norm(b, dtype)
    norms = row_norm(a, dtype), row_norm(b, dtype)
    if norms[0].dtype == torch.float64:
        return norms
    least, most = torch.stack(norms).aminmax()
    if float(least) > _SAFE and float(most) < 1 / _SAFE:
        return norms
    return safe_norm(a, dtype), safe_norm(b, dtype)


_SAFE = 1e-15  # a norm above this in float32, whose squares end at 1e-38, has lost nothing


def full_precision(kind: str) -> AbstractContextManager[Any]:
    """Without autocast on this type of device."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def by_row(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new tensor in rows of the mask, else the old one. Neither is copied where none is needed.

    Args:
        mask: bool ``(rows,)``.
        new: ``(rows, n)``.
        old: ``(rows, n)``.
    """
    if mask.device.type == "cpu" and bool(mask.all()):
        return new
    return torch.where(mask[:, None], new, old)


def surely_none(mask: Tensor) -> bool:
    """Whether no entry is set. On an accelerator, where asking would make the host wait, False."""
    return mask.device.type == "cpu" and not bool(mask.any())


def surely_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, by one sum. False where that is in doubt, or would wait."""
    return tensor.device.type == "cpu" and math.isfinite(float(tensor.detach().sum()))


def relative(residual: Tensor, fz: Tensor) -> Tensor:
    """Relative residual of each row, ``(rows,)``.

    Args:
        residual: ``f(z) − z``, ``(rows, n)``.
        fz: ``f(z)``, ``(rows, n)``.
    """
    wide = None if fz.device.type == "cpu" else torch.float64  # see safe_norm
    r, norm = safe_norms(residual, fz, wide)
    return (r / norm.clamp(min=torch.finfo(fz.dtype).tiny)).to(fz.dtype)


def _show(shapes: list[tuple[int, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else str(tuple(shapes))
