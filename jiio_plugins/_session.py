"""Joint mode: what equilibrium layers do while an optimisation runs, and what is read off them.

The network's own forward is called, nothing else. A *session* tells each equilibrium layer what to
return and keeps what it saw, in the order of the calls, so a model may hold several layers, in
series or called twice. All states together form one flat matrix ``z`` ``(rows, n)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins._counting import count, count_rows
from jiio_plugins._state import Layout, as_tensors, flatten
from jiio_plugins.adjoints import implicit_gate, solve_counted
from jiio_plugins.equilibrium import Equilibrium, running
from jiio_plugins.regularization import jacobian_penalty
from jiio_plugins.solvers import Anderson, FlatSolution, Solver, iterate

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
    """Every layer solves its fixed point.

    Args:
        solver: used by all layers, without a graph; None: each layer's own solver and gradient
            rule, as in a plain call of the model.
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


class EnvelopeSession:
    """Every layer answers with ``f`` at a joint solution's state; backward passes its μ on.

    The pass ends in one value per row; :meth:`watch` learns the weight c with which each enters
    what ``backward`` is called on. With g the gradient that reaches a layer, its adjoint is then
    ``c J_zᵀμ + g``, whatever was done to the values after this pass.

    Args:
        z, mu, jz_mu: flat, per layer.
        refine: solver of further steps on z and on the adjoint; None: there are none.
    """

    def __init__(
        self,
        z: Sequence[Tensor],
        mu: Sequence[Tensor],
        jz_mu: Sequence[Tensor],
        refine: Solver | None = None,
    ) -> None:
        self.z, self.mu, self.jz_mu, self.refine = z, mu, jz_mu, refine
        self.visits = 0
        self.weight: Tensor | None = None

    def watch(self, value: Tensor) -> None:
        """Note the gradient of ``value`` ``(rows,)``, which backward meets before any layer."""
        if len(self.z) != self.visits:
            raise ValueError(
                f"the model called {self.visits} equilibrium layers, the solution has the states "
                f"of {len(self.z)}: give the model that the solution comes from"
            )

        def note(grad: Tensor) -> None:
            self.weight = grad.detach()

        if value.requires_grad:
            value.register_hook(note)

    def visit(self, layer: Equilibrium, f: CellMap, z0: Any) -> Any:
        """``f(z)``, connected to the graph of f through its adjoint."""
        k, rows, width = self.visits, len(as_tensors(z0)[0]), sum(f.layout.sizes)
        self.visits += 1
        if k >= len(self.z) or self.z[k].shape != (rows, width):
            raise ValueError(
                f"the solution holds no state ({rows}, {width}) for call {k + 1} of an equilibrium "
                "layer: give the model and the rows that the solution comes from"
            )
        z = self.z[k]
        if self.refine is not None:
            z = solve_counted(f, z, self.refine).fz
        z = z.detach().requires_grad_()
        fz = f(z)
        count(f_evals=count_rows(rows, z.device))
        # J_zᵀμ holds what other layers send here as well, and so does g: one layer's own share is
        # known only after a step of its own
        alone = len(self.z) == 1
        carried = self.jz_mu[k] if alone else self.mu[k]
        solver = self.refine if alone else self.refine or Anderson(max_iter=1)

        def warm_start(g: Tensor) -> Tensor:
            if self.weight is None:
                raise RuntimeError("backward must go through the values of this pass")
            mu = carried * self.weight.to(carried)[:, None]
            return mu + g if alone else mu

        return f.layout.unpack(implicit_gate(fz, z, f, solver, warm_start))


class PenaltySession:
    """Every layer answers with a given state and adds the Jacobian penalty of its cell there.

    Attributes:
        value: ‖J_z‖²_F / n averaged over rows, summed over layers; differentiable.
    """

    def __init__(self, z: Sequence[Tensor], probes: int, generator: torch.Generator | None) -> None:
        self.z, self.probes, self.generator = z, probes, generator
        self.visits = 0
        self.value = z[0].new_zeros(())

    def visit(self, layer: Equilibrium, f: CellMap, z0: Any) -> Any:
        """The state as it is."""
        state = f.layout.unpack(self.z[self.visits])
        self.visits += 1
        penalty = jacobian_penalty(
            layer.cell, state, *f.injection, probes=self.probes, generator=self.generator
        )
        self.value = self.value + penalty
        rows = count_rows(len(self.z[0]), self.z[0].device)
        # the gradient of a probe's VJP costs about one more
        count(f_evals=rows, vjps=2 * self.probes * rows)
        # DistributedDataParallel looks for unused parameters from the output: it must find f's
        tensors = tuple(t + 0 * penalty for t in as_tensors(state))
        return tensors if f.layout.is_tuple else tensors[0]


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

    def gradient(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """``∂ℓ/∂z`` ``(rows, n)`` and the direct ``∂ℓ/∂v``, with f held constant (head only)."""
        with running(self._session):
            grads = torch.autograd.grad(
                loss.sum(), [*self._leaves, self._v], retain_graph=True, allow_unused=True
            )
        return self._pack(grads)

    def vjp(self, mu: Tensor, *, last: bool = True) -> tuple[Tensor, Tensor]:
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
                outputs, [*self._leaves, self._v], weights, retain_graph=not last, allow_unused=True
            )
        return self._pack(grads)

    def _pack(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        filled = [
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(grads, [*self._leaves, self._v], strict=True)
        ]
        return flatten(filled[:-1]).to(self.f.dtype), filled[-1]
