"""Model, objective and optimised variable as functions of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jiio_plugins._session import (
    NO_LAYER,
    HeldLinearization,
    IterateSession,
    Linearization,
    RecordSession,
    SolveSession,
    StateLayout,
)
from jiio_plugins.equilibrium import running
from jiio_plugins.solution import Status
from jiio_plugins.solvers import Anderson

if TYPE_CHECKING:
    from jiio_plugins._session import Advance
    from jiio_plugins.solvers import FlatMap, FlatSolution, Solver

Objective = Callable[[Any], Tensor]


class Groups:
    """Which problem each row of the batch belongs to; one row per problem by default.

    Attributes:
        problems: how many there are.
        width: rows of the largest of them.
    """

    def __init__(self, rows: int, index: Tensor | None = None) -> None:
        self.index = index
        counts = None if index is None else torch.bincount(index)
        self.problems = rows if counts is None else len(counts)
        self.width = 1 if counts is None else int(counts.max())

    def sum(self, per_row: Tensor) -> Tensor:
        """``(rows, ...) -> (problems, ...)``, summed."""
        if self.index is None:
            return per_row
        if self.problems == 1:
            return per_row.sum(0, keepdim=True)
        return per_row.new_zeros(self.problems, *per_row.shape[1:]).index_add(
            0, self.index, per_row
        )

    def spread(self, per_problem: Tensor) -> Tensor:
        """``(problems, ...) -> (rows, ...)``: each row gets its problem's entry."""
        if self.index is None:
            return per_problem
        if self.problems == 1:
            return per_problem.expand(len(self.index), *per_problem.shape[1:])
        return per_problem[self.index]

    def worst(self, per_row: Tensor) -> Tensor:
        """``(rows,) -> (problems,)``, the largest."""
        if self.index is None:
            return per_row
        if self.problems == 1:
            return per_row.amax(0, keepdim=True)
        out = per_row.new_zeros(self.problems)
        return out.scatter_reduce(0, self.index, per_row, "amax", include_self=False)

    @cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """Problem of each row, and which of its rows it is."""
        assert self.index is not None
        rows = torch.arange(len(self.index), device=self.index.device)
        order = torch.argsort(self.index, stable=True)
        counts = rows.new_zeros(self.problems).index_add(0, self.index, torch.ones_like(rows))
        first = counts.cumsum(0) - counts
        slot = torch.empty_like(rows).index_put((order,), rows - first[self.index[order]])
        return self.index, slot

    def gather(self, per_row: Tensor) -> Tensor:
        """``(rows, k) -> (problems, width, k)``: each problem's rows, then zeros.

        Problems of very different size waste memory and time here.
        """
        if self.index is None:
            return per_row[:, None]
        if self.problems == 1:
            return per_row[None]
        empty = per_row.new_zeros(self.problems, self.width, *per_row.shape[1:])
        return empty.index_put(self.place, per_row)

    def scatter(self, gathered: Tensor) -> Tensor:
        """The inverse of :meth:`gather`."""
        if self.index is None:
            return gathered[:, 0]
        return gathered[0] if self.problems == 1 else gathered[self.place]

    def join(self, z: Tensor, w: Tensor) -> Tensor:
        """Two blocks by row -> ``(problems, 2, width · n)``."""
        return torch.stack((self.gather(z), self.gather(w)), dim=1).flatten(2)

    def part(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`join`."""
        z, w = joined.unflatten(2, (self.width, joined.shape[2] // self.width)).unbind(1)
        return self.scatter(z), self.scatter(w)


def _own(*inputs: Tensor) -> tuple[Tensor, ...]:
    """What a model is called with: it may change it in place."""
    return tuple(t.clone() for t in inputs)


class Variable:
    """The optimised variable, flat ``(problems, d)``: the model's input.

    Attributes:
        given: what else the model is called with, a row per row.
        rows_see_v_alone: whether v and that are all that the output of a row depends on.
    """

    rows_see_v_alone = True

    def __init__(self, model: nn.Module, x: Tensor, given: Sequence[Tensor] = ()) -> None:
        self.model, self.shape = model, x.shape
        self.given = tuple(given)
        self.groups = Groups(len(x))
        self.origin = x  # with its graph, where it has one
        self.start = x.detach()

    def call(self, v: Tensor) -> Any:
        """The model's output at ``v``."""
        return self.model(*_own(v.reshape(self.shape), *self.given))

    def call_rows(self, v: Tensor, rows: Tensor) -> Any:
        """The output for some rows only."""
        given = [t[rows] for t in self.given]
        return self.model(*_own(v[rows].reshape(len(rows), *self.shape[1:])), *given)

    def unflatten(self, v: Tensor) -> Any:
        """``v`` as the caller knows it."""
        return v.reshape(self.shape)


class ParameterVariable(Variable):
    """Named parameters of the model; with several problems each row sees its problem's copy."""

    rows_see_v_alone = False  # but their row of x too

    def __init__(
        self, model: nn.Module, x: Tensor, names: Sequence[str], groups: Tensor | None,
        given: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        parameters = dict(model.named_parameters())
        missing = [name for name in names if name not in parameters]
        if missing or not names:
            raise ValueError(
                f"variables must name parameters of the model; {missing or 'an empty list'} given, "
                f"there are {', '.join(parameters)}"
            )
        self.model, self.x, self.names = model, x, tuple(names)
        self.given = tuple(given)
        self.groups = Groups(
            len(x),
            torch.zeros(len(x), dtype=torch.long, device=x.device) if groups is None else groups,
        )
        chosen = [parameters[name] for name in self.names]
        problems = self.groups.problems
        if problems > 1:
            wrong = [
                n for n, p in zip(self.names, chosen, strict=True) if p.ndim < 1 or len(p) != 1
            ]
            if wrong:
                raise ValueError(
                    f"with {problems} problems each row needs its own copy of a variable, so its "
                    f"parameter must have a leading dimension of 1 that the model broadcasts over "
                    f"rows; {', '.join(wrong)} does not"
                )
        self.shapes = [p.shape[1:] if problems > 1 else p.shape for p in chosen]
        self.origin = torch.cat([p.reshape(1, -1) for p in chosen], dim=1).repeat(problems, 1)
        self.start = self.origin.detach()

    def _replace(self, v: Tensor) -> dict[str, Tensor]:
        parts = v.split([shape.numel() for shape in self.shapes], dim=1)
        return {
            name: part.reshape(len(v), *shape) if self.groups.problems > 1 else part.reshape(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def call(self, v: Tensor) -> Any:
        """The model's output with its parameters replaced."""
        spread = self.groups.spread(v) if self.groups.problems > 1 else v
        return functional_call(self.model, self._replace(spread), _own(self.x, *self.given))

    def call_rows(self, v: Tensor, rows: Tensor) -> Any:
        """The output for some rows only."""
        spread = self.groups.spread(v)[rows] if self.groups.problems > 1 else v
        inputs = tuple(t[rows] for t in (self.x, *self.given))
        return functional_call(self.model, self._replace(spread), inputs)

    def unflatten(self, v: Tensor) -> Mapping[str, Tensor]:
        """Name -> ``(problems, ...)``, or the parameter's own shape for one problem."""
        return self._replace(v)


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
        session = SolveSession(start=parts) if solver is None else IterateSession(solver, parts)
        with torch.no_grad(), running(session):
            output = self.variable.call(v) if rows is None else self.variable.call_rows(v, rows)
        if not session.z:
            raise ValueError(NO_LAYER)
        if self.layout is None:
            self.layout = StateLayout(session.layouts)
        moved = session.moved if isinstance(session, IterateSession) else []
        return Solved(output, torch.cat(session.z, dim=1), session.results, moved)

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
        session = RecordSession(self.layout.split(z), image=True)
        with torch.no_grad(), running(session):
            _ = self.variable.call(v) if rows is None else self.variable.call_rows(v, rows)
        return session.flat.to(z.dtype)

    def linearize(
        self, v: Tensor, z: Tensor, rows: Tensor | None = None, *, image: bool = True,
        advance: Advance | None = None,
    ) -> Linearization:  # fmt: skip
        """One evaluation of f with its graph, for all rows or some (``z`` then holds those).

        ``advance`` takes each layer's state on where the layer is visited, before that evaluation.
        """
        assert self.layout is not None

        def call(leaf: Tensor) -> Any:
            return self.variable.call(leaf) if rows is None else self.variable.call_rows(leaf, rows)

        def repeatably(f: FlatMap, z: Tensor) -> Tensor:
            assert advance is not None
            return advance(_Repeatable(f), z)

        steps = advance if advance is None or self.splits else repeatably
        return Linearization(call, v, self.layout.split(z), image=image, advance=steps)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Let the block move copies of the buffers (running statistics), and put the own ones back.

    A graph made in the block may have saved them, so they are exchanged, not written over.
    """
    owners = list(model.modules())
    places = [(owner, key, b) for owner in owners for key, b in owner._buffers.items()]
    copies: dict[int, Tensor] = {}
    for owner, key, buffer in places:
        if buffer is not None and not buffer.requires_grad:  # one that does is a constant
            copies.setdefault(id(buffer), buffer.detach().clone())
            owner._buffers[key] = copies[id(buffer)]
    try:
        yield
    finally:
        for owner, key, buffer in places:
            if owner._buffers.get(key) is not buffer:  # None may have been filled
                owner._buffers[key] = buffer
        known = {(id(owner), key) for owner, key, _ in places}
        for owner in owners:
            for key in [key for key in owner._buffers if (id(owner), key) not in known]:
                del owner._buffers[key]


def same_randomness(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with the same random numbers every time, the global generators left as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if devices else []

    def replay(*args: Any) -> Any:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(cpu)
            if devices:
                torch.cuda.set_rng_state_all(cuda)
            return call(*args)

    return replay


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
        self, v: Tensor, z: Tensor, rows: Tensor | None = None, *, image: bool = True,
        advance: Advance | None = None,
    ) -> Linearization:  # fmt: skip
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
