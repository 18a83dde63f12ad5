"""A cell as a map on flat states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from jiio_plugins.equilibrium.state import Layout

    Reenter = Callable[[], AbstractContextManager[Any]]

_IN_PLACE = (
    "the cell {} changes its state in place, or what was injected, which the solver still needs: "
    "use operations that return a new tensor (z = z + u, not z += u; a first nn.ReLU() without "
    "inplace=True)"
)


_COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class CellMap:
    """``z -> cell(z, *injection)`` on flat states, restrictable to rows of the batch.

    Args:
        cell: ``cell(z, *injection) -> z``. A function that holds its injection itself is accepted
            too, but cannot be restricted.
        injection: what the layer was called with. Tensors are batch first, or one row for all.
        layout: shapes of the cell's state.
    """

    def __init__(self, cell: Callable[..., Any], injection: Sequence[Any], layout: Layout) -> None:
        self.cell, self.injection, self.layout = cell, tuple(injection), layout

    def __call__(self, z: Tensor) -> Tensor:
        """``f(z)``, flat, ``(rows, n)``."""
        # under autocast the cell may answer in another precision; the iteration keeps z's
        return self.layout.pack(self.evaluate(self.layout.unpack(z))).to(z.dtype)

    def evaluate(self, state: Any) -> Any:
        """The cell on a state as it has it, a tensor or a tuple.

        Raises:
            RuntimeError: the cell changes its state or its injection in place, or fails itself.
            ValueError: its output has another shape than its state.
        """
        rows = len(state[0] if self.layout.is_tuple else state)
        name = getattr(self.cell, "__name__", type(self.cell).__name__)
        if torch.is_inference_mode_enabled():  # where torch does not count changes
            state = tree_map(Tensor.clone, state)
        versions = _versions((state, self.injection))
        try:
            out = self.cell(state, *self.injection)
        except RuntimeError as error:
            if "inplace" in str(error).replace("-", ""):  # torch writes it both ways
                error.add_note(f"(perhaps {_IN_PLACE.format(name)})")
                raise
            shapes = ", ".join(str((rows, *shape)) for shape in self.layout.shapes)
            error.add_note(
                f"(in the cell {name}, called with a state of shape {shapes}. If that is not its "
                "shape: z starts as zeros like the first injected tensor, unless the cell has "
                "initial_state(*injection) or the layer is called with z0=)"
            )
            raise
        if _versions((state, self.injection)) != versions:
            raise RuntimeError(_IN_PLACE.format(name))
        self.layout.check(out, rows, f"the output of the cell {name}")
        return out

    def restrict(self, rows: Tensor) -> CellMap | None:
        """The same map for the rows of these indices.

        None for a cell with dropout or batch statistics at work: fewer rows would change those.
        """
        if not isinstance(self.cell, nn.Module):
            return None
        if any(m.training and isinstance(m, _COUPLED) for m in self.cell.modules()):
            return None
        injection = tree_map(lambda u: u[rows] if _has_rows(u) else u, self.injection)
        return CellMap(self.cell, injection, self.layout)

    def check_rows(self, rows: int) -> None:
        """Raise unless each injected tensor has the state's rows, or one row for all of them.

        Raises:
            ValueError: one has neither.
        """
        for u in tree_leaves(self.injection):
            if _has_rows(u) and len(u) != rows:
                raise ValueError(
                    f"the layer's inputs must be batch first: the state has {rows} rows, an input "
                    f"has shape {tuple(u.shape)}. What all rows share is (1, ...), or a parameter "
                    "or buffer of the cell"
                )


def _versions(tree: Any) -> list[int]:
    """How often each tensor has been changed in place, as far as torch counts that."""
    tensors = (t for t in tree_leaves(tree) if isinstance(t, Tensor))
    return [t._version for t in tensors if not t.is_inference()]


def _has_rows(u: Any) -> bool:
    """Whether rows of ``u`` are rows of the batch. A number or a single row is for all of them."""
    return isinstance(u, Tensor) and u.ndim > 0 and len(u) != 1
