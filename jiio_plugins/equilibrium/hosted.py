"""What a layer of another library needs for a joint mode, whose own solver it keeps.

The class of the layer becomes a subclass of what it was (:class:`HostedLayer`). Outside an
optimisation it does what it did. Inside one it asks the mode, with its map as a
:class:`jiio_plugins.equilibrium.CellMap`. What the mode leaves to the layer is :class:`OwnSolve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.adjoints import Adjoint, Implicit, implicit_gate
from jiio_plugins.equilibrium.batch import rows_first
from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.counting import Cost, count, count_rows, counting_into, open_counters
from jiio_plugins.equilibrium.layer import EquilibriumLayer
from jiio_plugins.equilibrium.mode import inside_a_cell
from jiio_plugins.equilibrium.state import as_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from jiio_plugins.equilibrium.cell import CellMap
    from jiio_plugins.equilibrium.solvers import Solver


WAYS = "_jiio_ways"  # what is known of a layer, and found out again in a copy


class HostedLayer(EquilibriumLayer):
    """Comes before the class of another library's layer, see :func:`take_in`."""

    @classmethod
    def attributes(cls, kind: Any) -> dict[str, Any]:
        """What the class has beside that is made for layers of this kind."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        base, kind = type(self).__bases__
        state = {name: value for name, value in self.__dict__.items() if name != WAYS}
        return _rebuild, (base, kind), state


def take_in(layer: nn.Module, base: type[HostedLayer]) -> None:
    """Put ``base`` before the class of a layer, in place. A second call changes nothing.

    Args:
        layer: of another library.
        base: its ``forward`` asks the mode.
    """
    if not isinstance(layer, HostedLayer):
        joint: Any = _joint
        layer.__class__ = joint(base, type(layer))


def put_back(layer: HostedLayer) -> None:
    """Undo :func:`take_in`."""
    kind: Any = type(layer).__bases__[1]
    layer.__class__ = kind


@cache
def _joint(base: Any, kind: Any) -> Any:
    own = {"__doc__": kind.__doc__, **base.attributes(kind)}
    return type(f"Joint{kind.__name__}", (base, kind), own)


def _rebuild(base: Any, kind: Any) -> Any:
    """An empty layer, for copies and pickles."""
    joint = _joint(base, kind)
    return joint.__new__(joint)


@dataclass
class HostedRules:
    """What a layer does where a mode leaves it to the layer.

    Attributes:
        solver: of its fixed point.
        adjoint: how gradients pass it, most often an :class:`OwnSolve`.
    """

    solver: Solver
    adjoint: Adjoint


class OwnSolve(Adjoint):
    """The layer's own solver and gradient. With a solver of ours the exact gradient.

    Args:
        solve: flat start ``(rows, n)`` -> flat equilibrium, as the layer finds it.
        solver: stands for the layer's own.
    """

    def __init__(self, solve: Callable[[CellMap, Tensor], Tensor], solver: Solver) -> None:
        self.solve, self.solver = solve, solver

    def forward(self, f: CellMap, z0: Tensor, solver: Solver) -> Tensor:
        """The flat equilibrium of ``f`` from ``z0``, ``(rows, n)``.

        Args:
            f: the cell at its injection, on flat states.
            z0: where to start, ``(rows, n)``.
            solver: another than the layer's own solves in its place.
        """
        if solver is not self.solver:
            return Implicit().forward(f, z0, solver)
        return self.solve(f, z0)


def counted(func: Callable[..., Any], batch_dim: int | None = 0) -> Callable[..., Any]:
    """``func(*state)``, which reports its evaluations and, in a backward pass, its VJPs.

    Args:
        func: of the parts of a state.
        batch_dim: dimension of these that the batch is, or None.
    """
    counters = open_counters()  # backward may run in another thread

    def call(*state: Any, **kwargs: Any) -> Any:
        with inside_a_cell():
            out = func(*state, **kwargs)
        rows = count_rows(len(rows_first(state[0], batch_dim)), state[0].device)
        with counting_into(counters):
            count(Cost(f_evals=rows))

        def report(_: Tensor) -> None:
            with counting_into(counters):
                count(Cost(vjps=rows))

        live = [t for t in as_tensors(out) if t.requires_grad]
        if live and counters:  # once a backward pass, whichever of them it reaches
            torch.autograd.graph.register_multi_grad_hook(live, report, mode="any")
        return out

    return call


def with_gradient(f: CellMap, z: Tensor, solver: Solver) -> Tensor:
    """``z`` as it is, with the exact gradient of the fixed point of ``f``.

    Args:
        f: the cell at its injection, on flat states.
        z: the equilibrium, ``(rows, n)``.
        solver: of the adjoint.
    """
    z = z.detach()
    leaf = z.clone().requires_grad_()
    with uncompiled():
        fz = f(leaf)
    count(Cost(f_evals=count_rows(len(z), z.device)))
    if not fz.requires_grad:
        return z
    fz = implicit_gate(fz, leaf, f, solver)
    return z + (fz - fz.detach())
