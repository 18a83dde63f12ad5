"""Joint mode: what equilibrium layers do while an optimisation runs, and what is read off them.

The network's own forward is called, nothing else. A *session* tells each equilibrium layer what to
return and keeps what it saw, in the order of the calls, so a model may hold several layers, in
series or called twice. All states together form one flat matrix ``z`` ``(rows, n)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins._state import Layout, as_tensors, flatten
from jiio_plugins.equilibrium import Equilibrium, running
from jiio_plugins.solvers import FlatSolution, Solver, iterate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.adjoints import CellMap

NO_LAYER = (
    "the model has no equilibrium layer that its forward reaches, so there is no fixed point to "
    "optimise through. Put jiio_plugins.Equilibrium(cell) where the fixed point z = cell(z, u) is: "
    "in __init__ 'self.equilibrium = jiio_plugins.Equilibrium(cell)', in forward "
    "'z = self.equilibrium(self.encoder(x))'"
)


class StateLayout:
    """Several layers' states side by side in one flat matrix."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = tuple(layouts)
        self.sizes = [sum(layout.sizes) for layout in self.layouts]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The flat state of each layer."""
        return list(flat.split(self.sizes, dim=1)) if len(self.sizes) > 1 else [flat]

    def unpack(self, flat: Tensor) -> Any:
        """The one layer's state as its cell has it; a tuple over layers if there are several."""
        parts = [
            layout.unpack(part) for layout, part in zip(self.layouts, self.split(flat), strict=True)
        ]
        return parts[0] if len(parts) == 1 else tuple(parts)


class SolveSession:
    """Every layer solves its fixed point, without a graph.

    Args:
        solver: used by all layers; None: each layer's own solver and gradient rule, as in a plain
            call of the model.
        start: flat state of each layer to start from; None: the layer's initial state.
        max_iter: overrides the solver's.
    """

    def __init__(
        self,
        solver: Solver | None = None,
        start: Sequence[Tensor] | None = None,
        max_iter: int | None = None,
    ) -> None:
        self.solver, self.start, self.max_iter = solver, start, max_iter
        self.layouts: list[Layout] = []
        self.results: list[FlatSolution] = []
        self.z: list[Tensor] = []

    def visit(self, layer: Equilibrium, f: CellMap, z0: Any) -> Any:
        """Solve; keep the state and how the solve ended."""
        flat = f.layout.pack(z0) if self.start is None else self.start[len(self.layouts)]
        if self.solver is None:
            flat = layer.adjoint.forward(f, flat, layer.solver)
        else:
            result = iterate(f, flat, self.solver, max_iter=self.max_iter)
            self.results.append(result)
            flat = result.z
        self.layouts.append(f.layout)
        self.z.append(flat)
        return f.layout.unpack(flat)


class RecordSession:
    """Every layer evaluates its cell once at a given state and returns that state as a leaf."""

    def __init__(self, z: Sequence[Tensor]) -> None:
        self.z = z
        self.leaves: list[tuple[Tensor, ...]] = []
        self.f: list[tuple[Tensor, ...]] = []
        self.open = True

    def visit(self, layer: Equilibrium, f: CellMap, z0: Any) -> Any:
        """Record ``cell(z, u)``, return ``z``."""
        if not self.open or len(self.f) >= len(self.z):
            raise RuntimeError(
                "an equilibrium layer was called more often than in the first pass of this "
                "optimisation. Its calls must not depend on the input, and activation "
                "checkpointing must not wrap the layer (wrap the encoder, the head or parts of the "
                "cell instead)"
            )
        state = f.layout.unpack(self.z[len(self.f)])
        leaves = tuple(t.detach().requires_grad_() for t in as_tensors(state))
        state = leaves if f.layout.is_tuple else leaves[0]
        self.f.append(as_tensors(f.evaluate(state)))
        self.leaves.append(leaves)
        return state

    @property
    def flat(self) -> Tensor:
        """``f`` of all layers, ``(rows, n)``."""
        return flatten([f.detach() for parts in self.f for f in parts])


class Linearization:
    """One pass of the network at ``(v, z)``: its loss, ``f(z, v)``, and their derivatives.

    Attributes:
        output: what the model returned, built on ``z`` as it is.
        f: ``f(z, v)``, flat ``(rows, n)``.
    """

    def __init__(self, call: Callable[[Tensor], Any], v: Tensor, z: Sequence[Tensor]) -> None:
        self._v = v.detach().requires_grad_()
        session = RecordSession(z)
        with torch.enable_grad(), running(session):
            self.output = call(self._v)
        session.open = False
        if len(session.f) != len(z):
            raise RuntimeError(
                f"the model called {len(session.f)} equilibrium layers where its first pass called "
                f"{len(z)}: its calls must not depend on the input"
            )
        self._session = session
        self._leaves = [leaf for leaves in session.leaves for leaf in leaves]
        self._f = [f for parts in session.f for f in parts]
        self.f = session.flat.to(z[0].dtype)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors of z and then v, as the pass saw them: what its derivatives are taken by."""
        return [*self._leaves, self._v]

    @property
    def live_f(self) -> Tensor:
        """``f(z, v)`` with its graph, flat ``(rows, n)``."""
        return flatten(self._f).to(self.f.dtype)

    def gradient(self, loss: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """``∂ℓ/∂z`` ``(rows, n)`` and the direct ``∂ℓ/∂v``, with f held constant (head only)."""
        with running(self._session):
            grads = torch.autograd.grad(
                loss.sum(),
                self.leaves,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        return self._pack(grads)

    def vjp(
        self, mu: Tensor, *, last: bool = True, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``J_zᵀ μ`` ``(rows, n)`` and ``J_vᵀ μ``: one vector-Jacobian product."""
        parts = mu.split([leaf[0].numel() for leaf in self._leaves], dim=1)
        outputs, weights = [], []
        for f, part in zip(self._f, parts, strict=True):
            if f.requires_grad:
                outputs.append(f)
                weights.append(part.reshape(f.shape).to(f.dtype))
        if not outputs:
            return torch.zeros_like(mu), torch.zeros_like(self._v)
        with running(self._session):
            grads = torch.autograd.grad(
                outputs,
                self.leaves,
                weights,
                retain_graph=create_graph or not last,
                create_graph=create_graph,
                allow_unused=True,
            )
        return self._pack(grads)

    def _pack(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        filled = [
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(grads, self.leaves, strict=True)
        ]
        return flatten(filled[:-1]).to(self.f.dtype), filled[-1]
