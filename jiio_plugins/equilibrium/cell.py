"""A cell as a map on flat states."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.mode import inside_a_cell
from jiio_plugins.equilibrium.state import Layout, as_tensors
from jiio_plugins.utils.trees import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    Reenter = Callable[[], AbstractContextManager[Any]]

_IN_PLACE = (
    "the cell {} changes its state in place, or what was injected, which the solver still needs: "
    "use operations that return a new tensor (z = z + u, not z += u; a first nn.ReLU() without "
    "inplace=True)"
)


# of a scripted module nobody can tell what is in it
_COUPLED = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    torch.jit.ScriptModule,
)


class CellMap:
    """``z -> cell(z, *injection)`` on flat states, restrictable to rows of the batch.

    Args:
        cell: ``cell(z, *injection) -> z``. A function that holds its injection itself is accepted
            too, but cannot be restricted.
        injection: what the layer was called with. Tensors are batch first, or one row for all.
        layout: shapes of the cell's state.
        whole: whether it is for all rows or none.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        injection: Sequence[Any],
        layout: Layout,
        *,
        whole: bool = False,
    ) -> None:
        self.cell, self.injection, self.layout = cell, tuple(injection), layout
        self.whole = whole

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
            state = map_leaves(state, Tensor, Tensor.clone)
        given = [*leaves(state, Tensor), *self._injected]
        versions = _versions(given)
        try:
            with inside_a_cell():
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
        if _versions(given) != versions:
            raise RuntimeError(_IN_PLACE.format(name))
        self.layout.check(out, rows, f"the output of the cell {name}")
        return out

    @cached_property
    def _injected(self) -> list[Tensor]:
        return [*leaves(self.injection, Tensor)]

    def restrict(self, rows: Tensor) -> CellMap | None:
        """The same map for the rows of these indices.

        None for a cell with dropout or batch statistics at work: fewer rows would change those.
        None too where it was said that its rows belong together.
        """
        if self.whole or not isinstance(self.cell, nn.Module):
            return None
        if any(m.training and isinstance(m, _COUPLED) for m in self.cell.modules()):
            return None
        injection = map_leaves(self.injection, Tensor, lambda u: u[rows] if _has_rows(u) else u)
        return CellMap(self.cell, injection, self.layout)

    def check_rows(self, rows: int) -> None:
        """Raise unless each injected tensor has the state's rows, or one row for all of them.

        Raises:
            ValueError: one has neither.
        """
        for u in self._injected:
            if _has_rows(u) and len(u) != rows:
                raise ValueError(
                    f"the layer's inputs must be batch first: the state has {rows} rows, an input "
                    f"has shape {tuple(u.shape)}. What all rows share is (1, ...), or a parameter "
                    "or buffer of the cell. Where the batch is another dimension, batch_dim says so"
                )


def initial_state(cell: nn.Module, *injection: Any) -> Any:
    """``cell.initial_state(*injection)`` where defined, else zeros like the first injection.

    Args:
        cell: of a layer.
        *injection: what the layer was called with.

    Raises:
        TypeError: neither is there.
    """
    build = getattr(cell, "initial_state", None)
    if build is not None:
        return build(*injection)
    if not injection or not isinstance(injection[0], Tensor):
        raise TypeError(
            "Equilibrium needs at least one injected tensor, or a cell with "
            "initial_state(*injection), or z0="
        )
    return torch.zeros_like(as_tensors(injection[0])[0])


class Damped(nn.Module):
    """The cell ``g(z, *u) = z + damping · (f(z, *u) − z)``.

    It has the fixed points of f and the same implicit gradients, but other eigenvalues: λ of J_z
    becomes ``1 + damping · (λ − 1)``. Where every λ has a real part below 1, though some are larger
    than 1 in modulus, plain iteration of f runs away from its fixed point. That of g contracts for
    ``damping < 2 Re(1 − λ) / |1 − λ|²`` of all λ. The smaller the damping, the slower.

    Args:
        cell: f, ``cell(z, *injection) -> z``. z is a tensor or a tuple of tensors.
        damping: above 0. 1 is f itself, above 1 over-relaxes.

    Shape:
        ``forward(z, *injection)`` returns a state like z.

    Raises:
        TypeError: a cell that is no module.
        ValueError: a damping that is not positive and finite, or a cell whose output has another
            shape than its state.

    Not for: a real λ above 1, which no damping brings below it.

    Example:
        >>> from jiio_plugins import Equilibrium
        >>> damped = Equilibrium(Damped(cell, 0.5))
        >>> u = encoder(x)
        >>> torch.allclose(damped(u), Equilibrium(cell)(u), rtol=1e-2)
        True

    Source: Krasnoselskii, "Two remarks on the method of successive approximations" (1955).
    """

    def __init__(self, cell: nn.Module, damping: float) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(
                f"cell must be an nn.Module, got {type(cell).__name__}. Damp a function where your "
                "solver calls it: z = z + damping * (f(z) - z)"
            )
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be above 0 and finite, got {damping}")
        self.cell, self.damping = cell, damping

    def forward(self, z: Any, *injection: Any) -> Any:
        """``g(z, *injection)``.

        Args:
            z: state, a tensor or a tuple.
            *injection: u.
        """
        f, layout = self.cell(z, *injection), Layout.of(z)
        name = type(self.cell).__name__
        layout.check(f, len(z[0] if layout.is_tuple else z), f"the output of the cell {name}")
        pairs = zip(as_tensors(z), as_tensors(f), strict=True)
        return layout.assemble([a + self.damping * (b - a) for a, b in pairs])

    def initial_state(self, *injection: Any) -> Any:
        """That of the cell."""
        return initial_state(self.cell, *injection)

    def extra_repr(self) -> str:
        """The damping."""
        return f"damping={self.damping}"


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor has been changed in place, as far as torch counts that."""
    return [t._version for t in tensors if not t.is_inference()]


def _has_rows(u: Tensor) -> bool:
    """Whether rows of ``u`` are rows of the batch. A number or a single row is for all of them."""
    return u.ndim > 0 and len(u) != 1
