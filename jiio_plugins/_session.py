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
from jiio_plugins._state import Layout, as_tensors, flatten, relative, row_norm
from jiio_plugins.adjoints import implicit_gate, solve_counted
from jiio_plugins.equilibrium import running
from jiio_plugins.regularization import jacobian_penalty
from jiio_plugins.solvers import Anderson, FlatSolution, Solver, iterate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.adjoints import Adjoint, CellMap
    from jiio_plugins.equilibrium import Rules
    from jiio_plugins.solvers import FlatMap

    Advance = Callable[[FlatMap, Tensor], Tensor]

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


def called_fewer(calls: int, expected: int) -> RuntimeError:
    """The error for a pass in which fewer layers were called than in the first."""
    return RuntimeError(
        f"the model called {calls} equilibrium layers where its first pass called {expected}: its "
        "calls must not depend on the input"
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

    def visit(self, layer: Rules, f: CellMap, z0: Any) -> Any:
        """Solve; keep the state."""
        flat = f.layout.pack(z0) if self.start is None else self.start[len(self.layouts)]
        flat = self.solve(layer, f, flat)
        self.layouts.append(f.layout)
        self.z.append(flat)
        return f.layout.unpack(flat.clone())  # the network may change it in place

    def solve(self, layer: Rules, f: CellMap, flat: Tensor) -> Tensor:
        """The fixed point of ``f``, from ``flat``."""
        rule = self.adjoint or layer.adjoint
        return rule.forward(f, flat, self.solver or layer.solver)


class IterateSession(SolveSession):
    """The same by one solver, without a graph and uncounted; ``results`` says how it ended.

    Attributes:
        moved: of each layer, ``‖z − z0‖``.
    """

    def __init__(self, solver: Solver, start: Sequence[Tensor] | None = None) -> None:
        super().__init__(solver, start=start)
        self.moved: list[Tensor] = []

    def solve(self, layer: Rules, f: CellMap, flat: Tensor) -> Tensor:
        """The fixed point of ``f``, from ``flat``."""
        assert self.solver is not None
        result = iterate(f, flat, self.solver)
        self.results.append(result)
        self.moved.append(row_norm(result.z - flat))
        return result.z


class RecordSession:
    """Every layer evaluates its cell once, at a given state or where ``advance`` takes it.

    Args:
        z: flat state of each layer.
        image: whether a layer answers with ``f(z)``, which is one step nearer to the fixed point
            and costs nothing, instead of z; either as a leaf.
        advance: takes a layer's flat state on before it is evaluated; None: nothing does.

    Attributes:
        z: as it was evaluated.
        leaves, answers: of each layer, what f was evaluated at and what the layer returned.
        f: of each layer, the evaluation with its graph.
    """

    def __init__(self, z: Sequence[Tensor], *, image: bool, advance: Advance | None = None) -> None:
        self.z, self.image, self.advance = list(z), image, advance
        self.leaves: list[tuple[Tensor, ...]] = []
        self.answers: list[tuple[Tensor, ...]] = []
        self.f: list[tuple[Tensor, ...]] = []
        self.open = True

    def visit(self, layer: Rules, f: CellMap, z0: Any) -> Any:
        """Record ``cell(z, u)``, answer."""
        if not self.open or len(self.f) >= len(self.z):
            raise RuntimeError(CALLED_MORE)
        k = len(self.f)
        if self.advance is not None:
            self.z[k] = self.advance(f, self.z[k])
        state = f.layout.unpack(self.z[k])
        leaves = _as_leaves(as_tensors(state))
        self.f.append(as_tensors(f.evaluate(leaves if f.layout.is_tuple else leaves[0])))
        self.leaves.append(leaves)
        self.answers.append(_as_leaves(self.f[-1]) if self.image else leaves)
        answer = tuple(t.clone() for t in self.answers[-1])  # the network may change it in place
        return answer if f.layout.is_tuple else answer[0]

    @property
    def flat(self) -> Tensor:
        """``f`` of all layers, ``(rows, n)``."""
        return flatten([f.detach() for parts in self.f for f in parts])


def _as_leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


class EnvelopeSession:
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
        self.visits = 0
        self.weight: Tensor | None = None
        self.residuals: list[Tensor] = []

    @property
    def residual(self) -> Tensor | None:
        """Largest relative residual of z after its refinement, ``(rows,)``; None without one."""
        return torch.stack(self.residuals).amax(0) if self.residuals else None

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

    def visit(self, layer: Rules, f: CellMap, z0: Any) -> Any:
        """``f(z)``, connected to the graph of f through its adjoint."""
        k, rows, width = self.visits, len(as_tensors(z0)[0]), sum(f.layout.sizes)
        self.visits += 1
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
        count(f_evals=count_rows(rows, z.device))
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


class PenaltySession:
    """Every layer answers with a given state and adds the Jacobian penalty of its cell there.

    Attributes:
        value: ‖J_z‖²_F / n averaged over rows, summed over layers; differentiable.
    """

    def __init__(self, z: Sequence[Tensor], probes: int, generator: torch.Generator | None) -> None:
        self.z, self.probes, self.generator = z, probes, generator
        self.visits = 0
        self.value = z[0].new_zeros(())

    def visit(self, layer: Rules, f: CellMap, z0: Any) -> Any:
        """The state as it is."""
        state = f.layout.unpack(self.z[self.visits])
        self.visits += 1
        penalty = jacobian_penalty(
            f.cell, state, *f.injection, probes=self.probes, generator=self.generator
        )
        self.value = self.value + penalty
        rows = count_rows(len(self.z[0]), self.z[0].device)
        # the gradient of a probe's VJP costs about one more
        count(f_evals=rows, vjps=2 * self.probes * rows)
        # DistributedDataParallel looks for unused parameters from the output: it must find f's
        tensors = tuple(t + 0 * penalty for t in as_tensors(state))
        return tensors if f.layout.is_tuple else tensors[0]


class HeldSession:
    """Every layer answers with a given state and is not evaluated.

    Args:
        z: flat state of each layer.
    """

    def __init__(self, z: Sequence[Tensor]) -> None:
        self.z, self.visits = z, 0

    def visit(self, layer: Rules, f: CellMap, z0: Any) -> Any:
        """The state as it is."""
        if self.visits >= len(self.z):
            raise RuntimeError(CALLED_MORE)
        state = self.z[self.visits].clone()  # the network may change it in place
        self.visits += 1
        return f.layout.unpack(state)


class Linearization:
    """One pass of the network at ``(v, z)``: its loss, ``f(z, v)``, and their derivatives.

    Args:
        call: the network as a function of v.
        v: flat variable.
        z: flat state of each layer.
        image: whether what comes after a layer sees ``f(z, v)`` instead of z. At a fixed point that
            is the same; before, the loss and its gradient are those of a state one step further.
        advance: of :class:`RecordSession`.

    Attributes:
        output: what the model returned.
        f: ``f(z, v)``, flat ``(rows, n)``.
        own_jz_mu: of the last VJP, what went through each layer's own state.
    """

    own_jz_mu: Tensor

    def __init__(
        self, call: Callable[[Tensor], Any], v: Tensor, z: Sequence[Tensor], *, image: bool,
        advance: Advance | None = None,
    ) -> None:  # fmt: skip
        self._v = v.detach().requires_grad_()
        session = RecordSession(z, image=image, advance=advance)
        with torch.enable_grad(), running(session):
            self.output = call(self._v)
        session.open = False
        if len(session.f) != len(z):
            raise called_fewer(len(session.f), len(z))
        self._session = session
        self._leaves = [leaf for leaves in session.leaves for leaf in leaves]
        self._answers = [leaf for leaves in session.answers for leaf in leaves]
        self._f = [f for parts in session.f for f in parts]
        self.f = session.flat.to(z[0].dtype)

    @property
    def z(self) -> Tensor:
        """The state of the pass, flat ``(rows, n)``."""
        z = self._session.z
        return z[0] if len(z) == 1 else torch.cat(z, dim=1)

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
        if not loss.requires_grad:
            raise ValueError(
                "the objective has no gradient: it depends on neither x nor a state of the model. "
                "The model or the objective detaches it, computes it under torch.no_grad(), or "
                "does not use the model's output"
            )
        with running(self._session):
            grads = torch.autograd.grad(
                loss.sum(),
                [*self._answers, self._v],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        return self._pack(self._answers, grads[:-1]), self._of_v(grads[-1])

    def vjp(
        self, mu: Tensor, *, last: bool = True, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``J_zᵀ μ`` ``(rows, n)`` and ``J_vᵀ μ``: one vector-Jacobian product.

        With ``image`` a later layer's f depends on z through the answers of the earlier ones; what
        arrives there belongs to the earlier layer's part of ``J_zᵀ μ``.
        """
        jz_mu, of_v = self._products(mu, [self._v], not last, create_graph)
        return jz_mu, self._of_v(of_v[0])

    def jz_mu(self, mu: Tensor) -> Tensor:
        """``J_zᵀ μ`` alone, with another product to come: what is before the layer is left out."""
        return self._products(mu, [], True, False)[0]

    def _products(
        self, mu: Tensor, more: list[Tensor], retain: bool, create_graph: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """``J_zᵀ μ``, and the gradients of ``μᵀf`` by ``more``."""
        parts = mu.split([leaf.shape[1:].numel() for leaf in self._leaves], dim=1)
        outputs, weights = [], []
        for f, part in zip(self._f, parts, strict=True):
            if f.requires_grad:
                outputs.append(f)
                weights.append(part.reshape(f.shape).to(f.dtype))
        if not outputs:
            self.own_jz_mu = torch.zeros_like(mu)
            return self.own_jz_mu, [None] * len(more)
        passed_on = self._answers if self._session.image and len(self._session.f) > 1 else []
        with running(self._session):
            grads = torch.autograd.grad(
                outputs,
                [*self._leaves, *passed_on, *more],
                weights,
                retain_graph=create_graph or retain,
                create_graph=create_graph,
                allow_unused=True,
            )
        n, end = len(self._leaves), len(grads) - len(more)
        jz_mu = self.own_jz_mu = self._pack(self._leaves, grads[:n])
        if passed_on:
            jz_mu = jz_mu + self._pack(self._answers, grads[n:end])
        return jz_mu, grads[end:]

    def _pack(self, like: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
        filled = [
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(grads, like, strict=True)
        ]
        return flatten(filled).to(self.f.dtype)

    def _of_v(self, grad: Tensor | None) -> Tensor:
        return torch.zeros_like(self._v) if grad is None else grad


class HeldLinearization(Linearization):
    """A pass of a network in which v reaches no layer: their states are given and stand still.

    There are no z and no μ to advance, both are ``(rows, 0)``, and no f is evaluated.
    """

    def __init__(
        self, call: Callable[[Tensor], Any], v: Tensor, rows: int, states: Sequence[Tensor]
    ) -> None:
        self._v = v.detach().requires_grad_()
        self._held = HeldSession(states)
        with torch.enable_grad(), running(self._held):
            self.output = call(self._v)
        if self._held.visits != len(states):
            raise called_fewer(self._held.visits, len(states))
        self.f = self.own_jz_mu = v.new_zeros(rows, 0)

    @property
    def z(self) -> Tensor:
        """Empty."""
        return self.f

    @property
    def leaves(self) -> list[Tensor]:
        """An empty z, and v."""
        return [self.f.clone().requires_grad_(), self._v]

    @property
    def live_f(self) -> Tensor:
        """Empty."""
        return self.f

    def gradient(self, loss: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """An empty ``∂ℓ/∂z`` and ``∂ℓ/∂v``."""
        with running(self._held):
            (grad,) = torch.autograd.grad(
                loss.sum(), [self._v], create_graph=create_graph, retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
        return self.f, self._of_v(grad)

    def vjp(
        self, mu: Tensor, *, last: bool = True, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Nothing passes through a layer."""
        return self.f, torch.zeros_like(self._v)

    def jz_mu(self, mu: Tensor) -> Tensor:
        """Empty."""
        return self.f
