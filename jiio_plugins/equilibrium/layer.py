"""The equilibrium layer: a fixed point inside an ordinary network.

Outside an optimisation it solves ``z = cell(z, u)`` and attaches a gradient. Inside one it has a
*joint mode*: a mode (:mod:`jiio_plugins.joint.modes`) decides what a call of the layer does. The
mode belongs to the running optimisation, and nothing is ever stored in the module. A layer of
another library has a joint mode as soon as it asks :func:`current_mode` too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from jiio_plugins.equilibrium.adjoints import Adjoint, Implicit
from jiio_plugins.equilibrium.batch import (
    check_batch_dim,
    check_states,
    on_rows,
    rows_back,
    rows_first,
)
from jiio_plugins.equilibrium.cell import CellMap, initial_state
from jiio_plugins.equilibrium.compiling import never_compiled
from jiio_plugins.equilibrium.mode import current_mode
from jiio_plugins.equilibrium.solvers import Anderson, Solver, check_solver
from jiio_plugins.equilibrium.state import Layout, as_tensors
from jiio_plugins.utils.checks import check_floating


class LayerDefaults(Protocol):
    """What a layer does where a mode leaves it to the layer.

    Attributes:
        solver: of its fixed point.
        adjoint: how gradients pass it.
    """

    solver: Solver
    adjoint: Adjoint


class Mode(Protocol):
    """Decides what an equilibrium layer answers while an optimisation runs."""

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """The state that a layer returns.

        Args:
            layer: its solver and gradient rule, where the mode has none of its own.
            f: its cell, at the injection of this call.
            z0: its initial state, as the cell has it.

        Returns:
            A state as the cell has it.
        """


def full_precision_state(state: Any) -> Any:
    """The state in float32 where an encoder under autocast answered in half precision.

    A solve needs it so. Without autocast the state stays as it is.
    """
    tensors = as_tensors(state)
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return state
    half = (torch.float16, torch.bfloat16)
    tensors = tuple(t.float() if t.dtype in half else t for t in tensors)
    return Layout.of(state).assemble(tensors)


class EquilibriumLayer(nn.Module):
    """Base of the layers that have a joint mode.

    Attributes:
        batch_dim: dimension of its states, and of what is injected, that the batch is. None: they
            are of one problem.
        whole_batch: whether its rows belong together, so that all are called or none.
    """

    batch_dim: int | None = 0
    whole_batch: bool = False


def layers_of(model: nn.Module) -> list[EquilibriumLayer]:
    """The layers of a model that have a joint mode."""
    return [module for module in model.modules() if isinstance(module, EquilibriumLayer)]


def wants_whole_batch(model: nn.Module) -> bool:
    """Whether a layer says that its rows belong together."""
    return any(layer.whole_batch for layer in layers_of(model))


def is_one_problem(model: nn.Module) -> bool:
    """Whether a layer says that its states have no batch, so that x is optimised as a whole."""
    return any(layer.batch_dim is None for layer in layers_of(model))


class Equilibrium(EquilibriumLayer):
    """The layer ``z* = cell(z*, *injection)``.

    Args:
        cell: an ``nn.Module`` with ``cell(z, *injection) -> z``, batch first, working on each row
            by itself. z is a tensor or a tuple of tensors. The cell must see its input through
            these arguments only: rows that have converged are left out of later calls, unless
            ``whole_batch`` says otherwise. If it has a method ``initial_state(*injection)``, the
            solve starts there, else at zeros shaped like the first injection.
        solver: :class:`Anderson` (default), :class:`Picard` or :class:`Broyden`.
        adjoint: how gradients pass: :class:`Implicit` (default), :class:`Phantom`,
            :class:`JacobianFree` or :class:`Unrolled`.
        batch_dim: dimension of the states and the injections that the batch is, 1 for sequences
            ``(L, B, D)``. Input and output of the model stay batch first, and so do the states of a
            :class:`jiio_plugins.Solution`. None: they have no batch, as the nodes of one graph.
            The input is then optimised as one problem, and an objective has one value.
        whole_batch: call the cell, and the model in an optimisation, on all rows or none: for a
            mask that is drawn for the batch, statistics of the batch, nodes that see each other.

    Shape:
        ``forward(*injection, z0=None)`` returns a state of the shape of the initial one.

    Raises:
        TypeError: a cell, solver or adjoint of another type.
        ValueError: a ``batch_dim`` that is no dimension.

    Example:
        >>> layer = Equilibrium(cell, solver=Anderson(tol=1e-5))
        >>> u = encoder(x)
        >>> z = layer(u)
        >>> torch.allclose(z, cell(z, u), rtol=1e-4)
        True

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models" (NeurIPS 2019).
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        batch_dim: int | None = 0,
        whole_batch: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be an nn.Module, got {type(cell).__name__}")
        self.cell = cell
        self.solver = solver if solver is not None else Anderson()
        self.adjoint = adjoint if adjoint is not None else Implicit()
        check_batch_dim(batch_dim)
        self.batch_dim, self.whole_batch = batch_dim, whole_batch
        check_solver(solver, "solver")
        if not isinstance(self.adjoint, Adjoint):
            raise TypeError(
                "adjoint must be Implicit(...), Phantom(...), JacobianFree(...) or Unrolled(...), "
                f"got {adjoint!r}"
            )

    @never_compiled
    def forward(self, *injection: Any, z0: Any = None) -> Any:
        """Solve the fixed point. In joint mode, do what the running optimisation asks.

        Args:
            *injection: u, what goes into the cell beside z. Tensors are ``(rows, ...)``, or one row
                for all, with the rows where ``batch_dim`` says.
            z0: where to start, a tensor or tuple as the cell has it. None: :meth:`initial_state`.

        Returns:
            The state, as the cell has it.

        Raises:
            ValueError: the cell's output has another shape than its state, or an injected tensor
                has neither the state's rows nor one row for all of them, or a state has no
                ``batch_dim``.
            TypeError: no injection is given, or none that an initial state of floating-point
                numbers can be built from.
        """
        start = self.initial_state(*injection) if z0 is None else z0
        start, dim = full_precision_state(start), self.batch_dim
        check_states(start, dim)
        start, injection = rows_first(start, dim), rows_first(injection, dim)
        f = CellMap(on_rows(self.cell, dim), injection, Layout.of(start), whole=self.whole_batch)
        f.check_rows(len(start[0] if f.layout.is_tuple else start))
        for part in as_tensors(start):
            check_floating(part, "the initial state z0")
        mode = current_mode()
        if mode is not None:
            return rows_back(mode.on_layer(self, f, start), dim)
        z = self.adjoint.forward(f, f.layout.pack(start), self.solver)
        return rows_back(f.layout.unpack(z), dim)

    def initial_state(self, *injection: Any) -> Any:
        """``cell.initial_state(*injection)`` where defined, else zeros like the first injection."""
        return initial_state(self.cell, *injection)

    def extra_repr(self) -> str:
        """Solver and adjoint, and what is declared of the batch."""
        declared = "" if self.batch_dim == 0 else f", batch_dim={self.batch_dim}"
        declared += ", whole_batch=True" if self.whole_batch else ""
        return f"solver={self.solver}, adjoint={self.adjoint}{declared}"
