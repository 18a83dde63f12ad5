"""Model, objective and optimised variable as functions of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.equilibrium.layer import layer_mode
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.equilibrium.state import StateLayout
from jiio_plugins.joint.guard import same_randomness
from jiio_plugins.joint.linearization import HeldLinearization, Linearization
from jiio_plugins.joint.modes import NO_LAYER, IterateMode, RecordMode, SolveMode
from jiio_plugins.solution import Status

if TYPE_CHECKING:
    from jiio_plugins.equilibrium.solvers import FlatMap, FlatSolution, Solver
    from jiio_plugins.joint.modes import Advance
    from jiio_plugins.joint.variables import Variable


Objective = Callable[[Any], Tensor]


class Problem:
    """What an optimisation method works on, and what it has cost so far.

    Attributes:
        f_evals, vjps: cost per row, that of all layers together, ``(rows,)``.
        layout: the layers' states in one flat matrix, known after the first pass.
        splits: whether the model may be called on some of the rows; in train mode that would give
            them another dropout mask or other batch statistics.
        one_start: whether the state that a method starts with is the same for all rows.
        z_start, jz_mu_start: where a method may start z and ``J_zᵀ μ``; None: from scratch.
    """

    def __init__(
        self, variable: Variable, objective: Objective, rows: int, *, splits: bool = True
    ) -> None:
        self.splits = splits
        self.variable, self.objective, self.rows = variable, objective, rows
        self.groups = variable.groups
        self.layout: StateLayout | None = None
        self.z_start: Tensor | None = None
        self.jz_mu_start: Tensor | None = None
        self.one_start = False
        self.f_evals = torch.zeros(rows, device=variable.start.device)
        self.vjps = torch.zeros_like(self.f_evals)

    def pay(self, f_evals: Tensor | float = 0.0, vjps: Tensor | float = 0.0) -> None:
        """Add to the cost per row, which is the sum of all layers'."""
        self.f_evals = self.f_evals + f_evals
        self.vjps = self.vjps + vjps

    def pay_passes(self, f_evals: Tensor | float = 0.0, vjps: Tensor | float = 0.0) -> None:
        """The same where every layer is evaluated as often."""
        layers = 1 if self.layout is None else len(self.layout.layouts)
        self.pay(layers * f_evals, layers * vjps)

    def loss(self, output: Any) -> Tensor:
        """The objective per row, checked."""
        value = self.objective(output)
        if not isinstance(value, Tensor) or value.shape != (self.rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"objective(output) must return one value per row, shape ({self.rows},), "
                f"got {got}; use reduction='none'"
            )
        if not value.is_floating_point():
            raise TypeError(
                f"objective(output) must return real floating-point values, got {value.dtype}: "
                "nothing can be differentiated by class indices; of complex ones take .abs()"
            )
        return value

    def solve(
        self,
        v: Tensor,
        solver: Solver | None = None,
        start: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Solved:
        """Solve all layers at ``v``, for all rows or some.

        ``solver=None`` lets every layer do what it does outside an optimisation.
        """
        parts = None if start is None or self.layout is None else self.layout.split(start)
        mode = SolveMode(start=parts) if solver is None else IterateMode(solver, parts)
        with torch.no_grad(), layer_mode(mode):
            output = self.variable.call(v) if rows is None else self.variable.call_rows(v, rows)
        if not mode.z:
            raise ValueError(NO_LAYER)
        if self.layout is None:
            self.layout = StateLayout(mode.layouts)
        moved = mode.moved if isinstance(mode, IterateMode) else []
        return Solved(output, torch.cat(mode.z, dim=1), mode.results, moved)

    def warm_up(self, v: Tensor, max_iter: int) -> Tensor:
        """A state to start with: ``z_start`` or the initial one, and some evaluations of f from it.

        At most ``max_iter``; a row that reaches 1e-2 needs fewer. With ``one_start`` one row is
        solved for all.
        """
        if self.z_start is not None and not max_iter:
            return self.z_start
        solver = Anderson(max_iter=max(1, max_iter), tol=1e-2)
        shared = self.one_start and self.z_start is None
        rows = torch.zeros(1, dtype=torch.long, device=v.device) if shared else None
        found = self.solve(v, solver, self.z_start, rows)
        self.pay(f_evals=found.evals / self.rows if shared else found.evals)
        z = torch.where(torch.isfinite(found.image), found.image, found.z)
        return z.expand(self.rows, -1).contiguous()

    def starts_at(self, v: Tensor) -> None:
        """Note whether all rows start at one and the same input, as latents at zero do."""
        alone = self.variable.rows_see_v_alone and self.splits
        self.one_start = alone and all(bool((t == t[:1]).all()) for t in (v, *self.variable.given))

    def evaluate(self, v: Tensor, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """``f(z, v)`` without a graph, for all rows or some (``z`` then holds those)."""
        assert self.layout is not None
        mode = RecordMode(self.layout.split(z), image=True)
        with torch.no_grad(), layer_mode(mode):
            _ = self.variable.call(v) if rows is None else self.variable.call_rows(v, rows)
        return mode.flat.to(z.dtype)

    def linearize(
        self,
        v: Tensor,
        z: Tensor,
        rows: Tensor | None = None,
        *,
        image: bool = True,
        advance: Advance | None = None,
    ) -> Linearization:
        """One evaluation of f with its graph, for all rows or some (``z`` then holds those).

        ``advance`` takes each layer's state on where the layer is called, before that evaluation.
        """
        assert self.layout is not None

        def call(leaf: Tensor) -> Any:
            return self.variable.call(leaf) if rows is None else self.variable.call_rows(leaf, rows)

        def repeatably(f: FlatMap, z: Tensor) -> Tensor:
            assert advance is not None
            return advance(_Repeatable(f), z)

        steps = advance if advance is None or self.splits else repeatably
        return Linearization(call, v, self.layout.split(z), image=image, advance=steps)


class _Repeatable:
    """A map that draws the same random numbers at every evaluation, and leaves them as they were.

    What comes after, the evaluation with the graph among it, then draws them too.
    """

    def __init__(self, f: FlatMap) -> None:
        self._call = same_randomness(f)

    def __call__(self, z: Tensor) -> Tensor:
        image: Tensor = self._call(z)
        return image

    def restrict(self, rows: Tensor) -> None:
        return None


class HeldProblem(Problem):
    """A problem whose variable reaches no layer: the states are given and stand still.

    z and μ are ``(rows, 0)``, and iterations evaluate no f. For :class:`jiio_plugins.Joint` and
    :mod:`jiio_plugins.implicit`.

    Args:
        variable, objective, rows: of :class:`Problem`.
        states: flat state of each layer, with its graph.
    """

    def __init__(
        self, variable: Variable, objective: Objective, rows: int, states: Sequence[Tensor]
    ) -> None:
        super().__init__(variable, objective, rows)
        self.states = states

    def pay(self, f_evals: Tensor | float = 0.0, vjps: Tensor | float = 0.0) -> None:
        """Nothing: a pass is one of the rest of the network."""

    def warm_up(self, v: Tensor, max_iter: int) -> Tensor:
        """An empty state."""
        return v.new_zeros(self.rows, 0)

    def linearize(
        self,
        v: Tensor,
        z: Tensor,
        rows: Tensor | None = None,
        *,
        image: bool = True,
        advance: Advance | None = None,
    ) -> Linearization:
        """One pass of the rest of the network, for all rows."""
        return HeldLinearization(self.variable.call, v, self.rows, self.states)


class Solved(NamedTuple):
    """Output and flat state of a solve; ``results`` is empty after a layer's own solve."""

    output: Any
    z: Tensor
    results: list[FlatSolution]
    moved: list[Tensor]

    @property
    def evals(self) -> Tensor:
        """F evaluations per row, all layers together."""
        return torch.stack([r.evals for r in self.results]).sum(0)

    @property
    def residual(self) -> Tensor:
        """Largest relative residual of any layer, per row."""
        return torch.stack([r.residual for r in self.results]).amax(0)

    @property
    def converged(self) -> Tensor:
        """Rows in which every layer reached its tolerance."""
        return torch.stack([r.status == Status.CONVERGED for r in self.results]).all(0)

    @property
    def nonfinite(self) -> Tensor:
        """Rows in which some layer met NaN or Inf."""
        return torch.stack([r.status == Status.NONFINITE for r in self.results]).any(0)

    @property
    def amplification(self) -> Tensor:
        """How far a state moved for each unit of residual, the most of any layer, per row.

        ``‖z − z0‖ / (‖f(z0) − z0‖ + ‖f(z) − z‖)`` is at most the norm of ``(I − J_z)⁻¹``. 0 where a
        layer was solved already.
        """
        tiny = torch.finfo(self.z.dtype).tiny
        sizes = [(r.first_size + r.size).clamp(min=tiny) for r in self.results]
        ratios = torch.stack(self.moved) / torch.stack(sizes)
        return torch.where((ratios > 0).all(0), ratios.amax(0), 0.0)

    @property
    def image(self) -> Tensor:
        """F at the state: one step further, for free."""
        return torch.cat([r.fz for r in self.results], dim=1)
