"""Joint mode: what equilibrium layers do while an optimisation runs, and what is read off them.

The network's own forward is called, nothing else. A *mode* is set for a block of code. Each
equilibrium layer that is called there asks its ``on_layer`` what to answer. The mode keeps what it
saw, in the order of the calls, so a model may hold several layers, in series or called twice. All
states together form one flat matrix z ``(rows, n)``. Nothing is stored in the layers.

A :class:`RecordMode` is the heart of the method: each layer evaluates its cell once, at the state
that the optimisation has reached. A :class:`SolveMode` solves, an :class:`EnvelopeMode` and a
:class:`PenaltyMode` serve training. The layer's side is in :mod:`jiio_plugins.equilibrium.layer`.
What is read off a pass is in :mod:`jiio_plugins.joint.linearization`. A
:class:`jiio_plugins.joint.Problem` makes the passes.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.adjoints import Adjoint, implicit_gate, solve_counted
from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.counting import Cost, count, count_rows
from jiio_plugins.equilibrium.mode import inside_a_cell, layer_mode
from jiio_plugins.equilibrium.regularization import jacobian_penalty
from jiio_plugins.equilibrium.solvers import Anderson, FlatSolution, Solver, iterate
from jiio_plugins.equilibrium.some_rows import REFUSALS
from jiio_plugins.equilibrium.state import Layout, as_tensors, relative, row_norm
from jiio_plugins.joint.apart import Part, together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jiio_plugins.equilibrium.cell import CellMap
    from jiio_plugins.equilibrium.layer import LayerDefaults
    from jiio_plugins.equilibrium.solvers import FlatMap

    Advance = Callable[[FlatMap, Tensor], Tensor]
    Apart = tuple[Tensor, Tensor]

CALLED_MORE = (
    "an equilibrium layer was called more often than in the first pass of this optimisation. Its "
    "calls must not depend on the input, and activation checkpointing must not wrap the layer "
    "(wrap the encoder, the head or parts of the cell instead)"
)


class SolveMode:
    """Every layer solves its fixed point, with a graph.

    What the mode does not name is the layer's own.

    Args:
        solver: instead of the layers' own. None: theirs.
        adjoint: gradient rule instead of the layers' own. None: theirs.
        start: flat state of each layer to start from. None: the layer's initial state.

    Attributes:
        layouts: of each layer's state.
        z: of each layer, the flat state that it answered with.
        results: how each solve ended. Empty where the gradient rule solves.
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
        """Solve, and keep the state.

        Args:
            layer: whose solver and gradient rule hold where the mode names none.
            f: its cell, at the injection of this call.
            z0: its initial state, as the cell has it.

        Returns:
            The solved state, as the cell has it.
        """
        flat = f.layout.pack(z0) if self.start is None else self.start[len(self.layouts)]
        flat = self.solve(layer, f, flat)
        self.layouts.append(f.layout)
        self.z.append(flat)
        return f.layout.unpack(flat.clone())  # the network may change it in place

    def solve(self, layer: LayerDefaults, f: CellMap, flat: Tensor) -> Tensor:
        """The fixed point of f, flat, ``(rows, n)``.

        Args:
            layer: whose solver and gradient rule hold where the mode names none.
            f: its cell, at the injection of this call.
            flat: where to start, ``(rows, n)``.
        """
        rule = self.adjoint or layer.adjoint
        return rule.forward(f, flat, self.solver or layer.solver)


class IterateMode(SolveMode):
    """Every layer solves by one solver, without a graph and uncounted.

    Args:
        solver: of all layers.
        start: flat state of each layer to start from. None: the layer's initial state.

    Attributes:
        results: how each solve ended.
        moved: of each layer, ``‖z − z0‖``, ``(rows,)``.
    """

    def __init__(self, solver: Solver, start: Sequence[Tensor] | None = None) -> None:
        super().__init__(solver, start=start)
        self.moved: list[Tensor] = []

    def solve(self, layer: LayerDefaults, f: CellMap, flat: Tensor) -> Tensor:
        """The fixed point of f, flat, ``(rows, n)``.

        Args:
            layer: not asked.
            f: its cell, at the injection of this call.
            flat: where to start, ``(rows, n)``.
        """
        assert self.solver is not None
        result = iterate(f, flat, self.solver)
        self.results.append(result)
        self.moved.append(row_norm(result.z - flat))
        return result.z


class RecordMode:
    """Every layer evaluates its cell once, at a given state or where ``advance`` takes it.

    Args:
        z: flat state of each layer.
        answer_fz: a layer answers with f(z) instead of z, either as a leaf. f(z) is one step nearer
            to the fixed point and costs nothing.
        advance: takes a layer's flat state on before it is evaluated. None: nothing does.
        apart: after ``advance``: indices of some rows, and of those that are to have a graph of
            their own (:mod:`jiio_plugins.joint.apart`). They are all, and f can be called on
            either, else all rows are called once more. None from it, or in its place: all rows have
            one graph. Where there are several layers it is not asked.
        empty: for a pass in which ``z`` stands still, graphs and all, and no cell is evaluated. It
            is the state of such a pass, ``(rows, 0)``. None: cells are evaluated.

    Attributes:
        z: flat state of each layer as it was evaluated.
        calls: of layers so far.
        leaves: of each layer, the tensors that f was evaluated at.
        answers: of each layer, the tensors that it returned copies of.
        f: of each layer, the tensors of its evaluation, with their graph.
        parts: of rows with graphs of their own. The leaves are theirs, and f has no graph. None:
            there are none.
    """

    def __init__(
        self,
        z: Sequence[Tensor],
        *,
        answer_fz: bool = True,
        advance: Advance | None = None,
        apart: Callable[[], Apart | None] | None = None,
        empty: Tensor | None = None,
    ) -> None:
        self.z, self.answer_fz, self.advance, self.empty = list(z), answer_fz, advance, empty
        self.apart = apart if len(self.z) == 1 else None
        self.parts: tuple[Part, Part] | None = None
        self.leaves: list[tuple[Tensor, ...]] = []
        self.answers: list[tuple[Tensor, ...]] = []
        self.f: list[tuple[Tensor, ...]] = []
        self.calls = 0
        self.open = True

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """Evaluate the cell once, record it, and answer.

        Args:
            layer: not asked.
            f: its cell, at the injection of this call.
            z0: its initial state, not used.

        Returns:
            f(z) or z, as the cell has it.

        Raises:
            RuntimeError: there were more calls than states, or the pass has been closed.
        """
        if not self.open or self.calls >= len(self.z):
            raise RuntimeError(CALLED_MORE)
        k = self.calls
        self.calls += 1
        if self.empty is not None:
            return f.layout.unpack(self.z[k].clone())  # the network may change it in place
        if self.advance is not None:
            self.z[k] = self.advance(f, self.z[k])
        leaves = _as_leaves(as_tensors(f.layout.unpack(self.z[k])))
        apart = None if self.apart is None else self.apart()
        if apart is not None:
            with suppress(*REFUSALS):
                self.parts = Part(f, apart[0], self.z[k]), Part(f, apart[1], self.z[k])
        if self.parts is None:
            self.f.append(as_tensors(f.evaluate(f.layout.assemble(leaves))))
        else:
            pairs = zip(*(part.f for part in self.parts), strict=True)
            self.f.append(tuple(together(self.parts, [a.detach(), b.detach()]) for a, b in pairs))
        self.leaves.append(leaves)
        self.answers.append(_as_leaves(self.f[-1]) if self.answer_fz else leaves)
        # copies: the network may change them in place
        return f.layout.assemble([t.clone() for t in self.answers[-1]])

    def close(self) -> None:
        """End the pass. A layer called from now on, as in a recomputation, is an error.

        Raises:
            RuntimeError: there were fewer calls than states.
        """
        self.open = False
        if self.calls != len(self.z):
            raise RuntimeError(
                f"the model called {self.calls} equilibrium layers where its first pass called "
                f"{len(self.z)}: its calls must not depend on the input"
            )


def _as_leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


class EnvelopeMode:
    """Every layer answers with f at a joint solution's state. Its backward pass sends μ on.

    The pass ends in one value per row. :meth:`watch` learns the weight c with which each enters
    what ``backward`` is called on. With g the gradient that reaches a layer, its adjoint is then
    ``c J_zᵀμ + g``, whatever was done to the values after this pass.

    Args:
        z: flat state of each layer.
        mu: μ of each layer, in the same shapes.
        jz_mu: ``J_zᵀμ`` of each layer, in the same shapes.
        refine: solvers of further steps on z and on the adjoint. None: there are none.

    Attributes:
        weight: c, ``(rows,)``. None before ``backward``.
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
        """Largest relative residual of z after its refinement, ``(rows,)``. None without one."""
        return torch.stack(self.residuals).amax(0) if self.residuals else None

    def watch(self, value: Tensor) -> None:
        """Note the gradient of ``value`` ``(rows,)``, which backward meets before any layer.

        Raises:
            ValueError: the model called another number of layers than the solution has.
        """
        if len(self.z) != self.calls:
            raise ValueError(
                f"the model called {self.calls} equilibrium layers, the solution has the states "
                f"of {len(self.z)}: give the model that the solution comes from"
            )

        nothing = torch.zeros_like(value)  # the hook of value must not hold value itself

        def note(grad: Tensor | None) -> None:
            self.weight = nothing if grad is None else grad.detach()

        if value.requires_grad:
            value.register_hook(note)

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """``f(z)``, connected to the graph of f through its adjoint.

        Args:
            layer: not asked.
            f: its cell, at the injection of this call.
            z0: its initial state, for the number of rows.

        Raises:
            ValueError: the solution holds no state of this shape for this call.
        """
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
        with uncompiled():
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

    Args:
        z: flat state of each layer, without a graph.
        probes: random probes in each estimate.
        generator: source of the probes. None: the global one.
        power: steps of the power iteration on each probe.

    Attributes:
        values: :func:`jiio_plugins.jacobian_penalty` of each layer, differentiable scalars.
        value: their sum.
    """

    def __init__(
        self,
        z: Sequence[Tensor],
        probes: int,
        generator: torch.Generator | None,
        power: int = 0,
    ) -> None:
        self.z, self.probes, self.generator, self.power = z, probes, generator, power
        self.calls = 0
        self.values: list[Tensor] = []

    @property
    def value(self) -> Tensor:
        """See above."""
        return torch.stack(self.values).sum()

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        """The state as it is.

        Args:
            layer: not asked.
            f: its cell, at the injection of this call.
            z0: its initial state, not used.
        """
        state = f.layout.unpack(self.z[self.calls])
        self.calls += 1
        with inside_a_cell():
            penalty = jacobian_penalty(
                f.cell,
                state,
                *f.injection,
                probes=self.probes,
                power=self.power,
                generator=self.generator,
            )
        self.values.append(penalty)
        rows = count_rows(len(self.z[0]), self.z[0].device)
        # the gradient of a probe's VJP costs about one more
        count(Cost(f_evals=rows, vjps=(2 + self.power) * self.probes * rows))
        # DistributedDataParallel looks for unused parameters from the output: it must find f's
        return f.layout.assemble([t + 0 * penalty for t in as_tensors(state)])


@contextmanager
def layers_as(*, solver: Solver | None = None, adjoint: Adjoint | None = None) -> Iterator[None]:
    """Run every equilibrium layer called in this block with another solver or gradient rule.

    Nothing is stored in the model, so there is nothing to restore, also after an exception. Any
    attack can be run inside.

    Args:
        solver: instead of the layers' own. None: theirs.
        adjoint: gradient rule instead of the layers' own. None: theirs.

    Example:
        >>> from jiio_plugins import Anderson
        >>> with layers_as(solver=Anderson(max_iter=200, tol=1e-6)):
        ...     exact = model(x)
        >>> bool((model(x) - exact).abs().max() < 0.01)
        True
    """
    with layer_mode(SolveMode(solver, adjoint)):
        yield
