"""Joint mode: what equilibrium layers do while an optimisation runs, and what is read off them.

The network's own forward is called, nothing else. A *mode* tells each equilibrium layer what to
return and keeps what it saw, in the order of the calls, so a model may hold several layers, in
series or called twice. All states together form one flat matrix ``z`` ``(rows, n)``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.adjoints import Adjoint, implicit_gate, solve_counted
from jiio_plugins.equilibrium.counting import (
    Cost,
    count,
    count_rows,
)
from jiio_plugins.equilibrium.layer import layer_mode
from jiio_plugins.equilibrium.regularization import jacobian_penalty
from jiio_plugins.equilibrium.solvers import Anderson, FlatSolution, Solver, iterate
from jiio_plugins.equilibrium.state import (
    Layout,
    as_tensors,
    relative,
    row_norm,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.equilibrium.cell import CellMap
    from jiio_plugins.equilibrium.layer import LayerDefaults
    from jiio_plugins.equilibrium.solvers import FlatMap

    Advance = Callable[[FlatMap, Tensor], Tensor]

    from collections.abc import Iterator

    from jiio_plugins.equilibrium.solvers import Solver


NO_LAYER = (
    "the model has no equilibrium layer that its forward reaches, so there is no fixed point to "
    "optimise through. Put jiio_plugins.Equilibrium(cell) where the fixed point z = cell(z, u) is: "
    "in __init__ 'self.equilibrium = jiio_plugins.Equilibrium(cell)', in forward "
    "'z = self.equilibrium(self.encoder(x))'. A TorchDEQ model: jiio_torchdeq.adapt(model)"
)


CALLED_MORE = (
    "an equilibrium layer was called more often than in the first pass of this optimisation. Its "
    "calls must not depend on the input, and activation checkpointing must not wrap the layer "
    "(wrap the encoder, the head or parts of the cell instead)"
)


class SolveMode:
    """Every layer solves its fixed point, with a graph; what is not told is the layer's own.

    Args:
        solver: instead of the layers' own.
        adjoint: gradient rule instead of the layers' own.
        start: flat state of each layer to start from; None: the layer's initial state.

    Attributes:
        z: of each layer, the flat state that it answered with.
        results: how each solve ended; empty where the gradient rule solves.
    """

    def __init__(
        self,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        self.solver, self.adjoint, self.start = solver, adjoint, start
        self.layouts: list[Layout] = []
        self.results: list[FlatSolution] = []
        self.z: list[Tensor] = []

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """Solve; keep the state."""
        flat = f.layout.pack(z0) if self.start is None else self.start[len(self.layouts)]
        flat = self.solve(layer, f, flat)
        self.layouts.append(f.layout)
        self.z.append(flat)
        return f.layout.unpack(flat.clone())  # the network may change it in place

    def solve(self, layer: LayerDefaults, f: CellMap, flat: Tensor) -> Tensor:
        """The fixed point of ``f``, from ``flat``."""
        rule = self.adjoint or layer.adjoint
        return rule.forward(f, flat, self.solver or layer.solver)


class IterateMode(SolveMode):
    """The same by one solver, without a graph and uncounted; ``results`` says how it ended.

    Attributes:
        moved: of each layer, ``‖z − z0‖``.
    """

    def __init__(self, solver: Solver, start: Sequence[Tensor] | None = None) -> None:
        super().__init__(solver, start=start)
        self.moved: list[Tensor] = []

    def solve(self, layer: LayerDefaults, f: CellMap, flat: Tensor) -> Tensor:
        """The fixed point of ``f``, from ``flat``."""
        assert self.solver is not None
        result = iterate(f, flat, self.solver)
        self.results.append(result)
        self.moved.append(row_norm(result.z - flat))
        return result.z


class RecordMode:
    """Every layer evaluates its cell once, at a given state or where ``advance`` takes it.

    Args:
        z: flat state of each layer.
        answer_fz: whether a layer answers with ``f(z)``, which is one step nearer to the fixed
            point and costs nothing, instead of z; either as a leaf.
        advance: takes a layer's flat state on before it is evaluated; None: nothing does.
        empty: the state of a pass in which those of the layers stand still, graphs and all, and no
            cell is evaluated, ``(rows, 0)``. None: cells are.

    Attributes:
        z: as it was evaluated.
        calls: of layers so far.
        leaves, answers: of each layer, what f was evaluated at and what the layer returned.
        f: of each layer, the evaluation with its graph.
    """

    def __init__(
        self,
        z: Sequence[Tensor],
        *,
        answer_fz: bool = True,
        advance: Advance | None = None,
        empty: Tensor | None = None,
    ) -> None:
        self.z, self.answer_fz, self.advance, self.empty = list(z), answer_fz, advance, empty
        self.leaves: list[tuple[Tensor, ...]] = []
        self.answers: list[tuple[Tensor, ...]] = []
        self.f: list[tuple[Tensor, ...]] = []
        self.calls = 0
        self.open = True

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """Record ``cell(z, u)``, answer."""
        if not self.open or self.calls >= len(self.z):
            raise RuntimeError(CALLED_MORE)
        k = self.calls
        self.calls += 1
        if self.empty is not None:
            return f.layout.unpack(self.z[k].clone())  # the network may change it in place
        if self.advance is not None:
            self.z[k] = self.advance(f, self.z[k])
        state = f.layout.unpack(self.z[k])
        leaves = _as_leaves(as_tensors(state))
        self.f.append(as_tensors(f.evaluate(leaves if f.layout.is_tuple else leaves[0])))
        self.leaves.append(leaves)
        self.answers.append(_as_leaves(self.f[-1]) if self.answer_fz else leaves)
        answer = tuple(t.clone() for t in self.answers[-1])  # the network may change it in place
        return answer if f.layout.is_tuple else answer[0]

    def close(self) -> None:
        """End the pass: a layer called from now on, as in a recomputation, is an error."""
        self.open = False
        if self.calls != len(self.z):
            raise RuntimeError(
                f"the model called {self.calls} equilibrium layers where its first pass called "
                f"{len(self.z)}: its calls must not depend on the input"
            )


def _as_leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


class EnvelopeMode:
    """Every layer answers with ``f`` at a joint solution's state; backward passes its μ on.

    The pass ends in one value per row; :meth:`watch` learns the weight c with which each enters
    what ``backward`` is called on. With g the gradient that reaches a layer, its adjoint is then
    ``c J_zᵀμ + g``, whatever was done to the values after this pass.

    Args:
        z, mu, jz_mu: flat, per layer.
        refine: solvers of further steps on z and on the adjoint; None: there are none.
    """

    def __init__(
        self,
        z: Sequence[Tensor],
        mu: Sequence[Tensor],
        jz_mu: Sequence[Tensor],
        refine: tuple[Solver | None, Solver | None] = (None, None),
    ) -> None:
        self.z, self.mu, self.jz_mu, self.refine = z, mu, jz_mu, refine
        self.calls = 0
        self.weight: Tensor | None = None
        self.residuals: list[Tensor] = []

    @property
    def residual(self) -> Tensor | None:
        """Largest relative residual of z after its refinement, ``(rows,)``; None without one."""
        return torch.stack(self.residuals).amax(0) if self.residuals else None

    def watch(self, value: Tensor) -> None:
        """Note the gradient of ``value`` ``(rows,)``, which backward meets before any layer."""
        if len(self.z) != self.calls:
            raise ValueError(
                f"the model called {self.calls} equilibrium layers, the solution has the states "
                f"of {len(self.z)}: give the model that the solution comes from"
            )

        def note(grad: Tensor) -> None:
            self.weight = grad.detach()

        if value.requires_grad:
            value.register_hook(note)

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """``f(z)``, connected to the graph of f through its adjoint."""
        k, rows, width = self.calls, len(as_tensors(z0)[0]), sum(f.layout.sizes)
        self.calls += 1
        if k >= len(self.z) or self.z[k].shape != (rows, width):
            raise ValueError(
                f"the solution holds no state ({rows}, {width}) for call {k + 1} of an equilibrium "
                "layer: give the model and the rows that the solution comes from"
            )
        z, (of_state, of_adjoint) = self.z[k], self.refine
        if of_state is not None:
            z = solve_counted(f, z, of_state).fz
        z = z.detach().requires_grad_()
        fz = f(z)
        count(Cost(f_evals=count_rows(rows, z.device)))
        if of_state is not None:
            self.residuals.append(relative((fz - z).detach(), fz.detach()))
        # J_zᵀμ holds what other layers send here as well, and so does g: one layer's own share is
        # known only after a step of its own
        alone = len(self.z) == 1
        carried = self.jz_mu[k] if alone else self.mu[k]
        solver = of_adjoint if alone else of_adjoint or Anderson(max_iter=1)

        def warm_start(g: Tensor) -> Tensor:
            if self.weight is None:
                raise RuntimeError("backward must go through the values of this pass")
            mu = carried * self.weight.to(carried)[:, None]
            return mu + g if alone else mu

        return f.layout.unpack(implicit_gate(fz, z, f, solver, warm_start))


class PenaltyMode:
    """Every layer answers with a given state and adds the Jacobian penalty of its cell there.

    Attributes:
        value: ‖J_z‖²_F / n averaged over rows, summed over layers; differentiable.
    """

    def __init__(self, z: Sequence[Tensor], probes: int, generator: torch.Generator | None) -> None:
        self.z, self.probes, self.generator = z, probes, generator
        self.calls = 0
        self.value = z[0].new_zeros(())

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """The state as it is."""
        state = f.layout.unpack(self.z[self.calls])
        self.calls += 1
        penalty = jacobian_penalty(
            f.cell, state, *f.injection, probes=self.probes, generator=self.generator
        )
        self.value = self.value + penalty
        rows = count_rows(len(self.z[0]), self.z[0].device)
        # the gradient of a probe's VJP costs about one more
        count(Cost(f_evals=rows, vjps=2 * self.probes * rows))
        # DistributedDataParallel looks for unused parameters from the output: it must find f's
        tensors = tuple(t + 0 * penalty for t in as_tensors(state))
        return tensors if f.layout.is_tuple else tensors[0]


@contextmanager
def layers_as(*, solver: Solver | None = None, adjoint: Adjoint | None = None) -> Iterator[None]:
    """Run every equilibrium layer called in this block with another solver or gradient rule.

    Nothing is stored in the model, so there is nothing to restore, also after an exception. Any
    attack can be run inside.

    Args:
        solver: instead of the layers' own; None: their own.
        adjoint: likewise.

    Example:
        >>> from jiio_plugins import Anderson
        >>> with layers_as(solver=Anderson(max_iter=200, tol=1e-6)):
        ...     exact = model(x)
        >>> bool((model(x) - exact).abs().max() < 0.01)
        True
    """
    with layer_mode(SolveMode(solver, adjoint)):
        yield
