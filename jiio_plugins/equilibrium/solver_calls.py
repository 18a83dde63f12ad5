"""The call that a layer makes of its own solver: the map, the start, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from jiio_plugins.equilibrium.batch import check_states, rows_back, rows_first
from jiio_plugins.equilibrium.cell import CellMap
from jiio_plugins.equilibrium.hosted import counted
from jiio_plugins.equilibrium.state import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.utils._pytree import TreeSpec

    from jiio_plugins.equilibrium.layer import EquilibriumLayer


@dataclass(frozen=True)
class SolverCall:
    """A solver as its layer has called it.

    Attributes:
        solver: the layer's own.
        args: positional arguments, f and z0 first among what is callable and what is a state.
        kwargs: the others.
        func: f.
        z0: where it starts, as f has it.
        batch_dim: of the layer, see :class:`jiio_plugins.equilibrium.EquilibriumLayer`.
    """

    solver: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    func: Callable[[Any], Any]
    z0: Any
    batch_dim: int | None = 0

    @property
    def state(self) -> TreeState:
        """What the states of f look like."""
        return TreeState.of(self.z0, self.batch_dim)

    def cell(self) -> CellMap:
        """F on flat states."""
        state = self.state

        def cell(parts: Any) -> Any:
            return state.parts(self.func(state.whole(parts)))

        return CellMap(cell, (), Layout.of(state.parts(self.z0)))

    def solve(self, start: Any = None) -> Any:
        """What the solver returns, its evaluations counted.

        Args:
            start: instead of z0.
        """
        func = self._counted()
        swap = {id(self.func): func, id(self.z0): self.z0 if start is None else start}
        args = [swap.get(id(a), a) for a in self.args]
        return self.solver(*args, **{k: swap.get(id(a), a) for k, a in self.kwargs.items()})

    def _counted(self) -> Callable[[Any], Any]:
        state = self.state

        def on_parts(*parts: Tensor) -> Any:
            return tuple(state.rows(self.func(state.whole(parts))))

        report = counted(on_parts)

        def func(z: Any, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                return self.func(z, *args, **kwargs)
            return state.whole(report(*state.rows(z)))

        return func

    def found(self, result: Any) -> Any:
        """The state in what the solver returned."""
        wanted = _shape_of(self.z0)
        for candidate in _candidates(result):
            if _shape_of(candidate) == wanted:
                return candidate
        raise ValueError(
            f"the solver {_name(self.solver)} must return a state like the one it starts from, a "
            "tuple that begins with it, or a dict with it as 'result'; it returned "
            f"{_shape_of(result)} for a start of {_shape_of(self.z0)}"
        )


def _candidates(result: Any) -> Iterator[Any]:
    """Where a solver may have put the state into what it returns."""
    yield result
    if isinstance(result, dict) and "result" in result:
        yield result["result"]
    if isinstance(result, (tuple, list)) and result:
        yield result[0]


def with_state(result: Any, found: Any) -> Callable[[Any], Any]:
    """What a solver returned, with another state in the place of the one that was found."""
    if found is result:
        return lambda state: state
    if isinstance(result, dict):
        return lambda state: {**result, "result": state}
    build = type(result) if hasattr(result, "_fields") else lambda *parts: type(result)(parts)
    return lambda state: build(state, *result[1:])


class _Unfolded(SolverCall):
    """deepinv's fixed-point iteration. Its state is the first of the ``est`` of a dict.

    deepinv takes the Jacobian of that alone. What else is there an iteration does not go on from.
    """

    def solve(self, start: Any = None) -> Any:
        """See :class:`SolverCall`. It starts where its own settings say."""
        return self.solver(*self.args, **self.kwargs)

    def found(self, result: Any) -> Any:
        """See :class:`SolverCall`."""
        return result[0]["est"][0]


def read_call(
    layer: EquilibriumLayer, solver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SolverCall:
    """The map and the start of a solver's call.

    Args:
        layer: that calls it.
        solver: what it calls.
        args: positional arguments.
        kwargs: the others.

    Raises:
        ValueError: there is no function of a state among them, or no state.
    """
    if hasattr(solver, "single_iteration"):
        return _read_unfolded(layer, solver, args, kwargs)
    given = [*args, *kwargs.values()]
    func = next((a for a in given if callable(a) and not isinstance(a, type)), None)
    rest = [a for a in given if a is not func]
    z0 = next((a for a in rest if any(isinstance(t, Tensor) for t in tree_leaves(a))), None)
    if func is None or z0 is None:
        raise ValueError(
            f"{type(layer).__name__} must call its solver as solver(f, z0, ...), with a function "
            f"of the state and a state to start from; it was called with "
            f"{', '.join(type(a).__name__ for a in given) or 'nothing'}. Put "
            "jiio_plugins.Equilibrium(cell) there instead"
        )
    return SolverCall(solver, args, kwargs, func, z0, layer.batch_dim)


def _read_unfolded(
    layer: EquilibriumLayer, solver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SolverCall:
    own = {"init", "x_gt", "compute_metrics"}  # the others are the iterator's
    rest = {name: value for name, value in kwargs.items() if name not in own}
    last = solver.max_iter - 1
    names = ("update_data_fidelity_fn", "update_prior_fn", "update_params_fn")
    updates = [getattr(solver, name) for name in names]
    settings = [None if update is None else update(last) for update in updates]

    def func(x: Any) -> Any:
        return solver.iterator({"est": (x,), "cost": None}, *settings, *args, **rest)["est"][0]

    start = [kwargs.get("init")] if "init" in kwargs else []
    first = solver.init_iterate_fn(*args, *start, cost_fn=solver.iterator.cost_fn)
    return _Unfolded(solver, args, kwargs, func, first["est"][0], layer.batch_dim)


@dataclass(frozen=True)
class TreeState:
    """A state of any structure as the tensors in it. What is no tensor is the same for all.

    Attributes:
        spec: its structure.
        leaves: of the first state, None where there is a tensor.
        batch_dim: dimension of the tensors that the batch is, or None.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    batch_dim: int | None

    @classmethod
    def of(cls, state: Any, batch_dim: int | None = 0) -> TreeState:
        """What a state looks like."""
        check_states(state, batch_dim)
        leaves, spec = tree_flatten(state)
        kept = tuple(None if isinstance(a, Tensor) else (a,) for a in leaves)
        return cls(spec, kept, batch_dim)

    def list(self, state: Any) -> list[Tensor]:
        """The tensors of a state."""
        return [a for a in tree_leaves(state) if isinstance(a, Tensor)]

    def build(self, tensors: Iterable[Tensor]) -> Any:
        """Inverse of :meth:`list`."""
        given = iter(tensors)
        return tree_unflatten(
            [next(given) if kept is None else kept[0] for kept in self.leaves], self.spec
        )

    def rows(self, state: Any) -> Any:
        """The tensors of a state with their rows first, in a list."""
        return rows_first(self.list(state), self.batch_dim)

    def parts(self, state: Any) -> Any:
        """A state as a cell of ours has it, rows first: a tensor, or a tuple of them."""
        tensors = tuple(self.rows(state))
        return tensors if len(self.leaves) > 1 else tensors[0]

    def whole(self, parts: Any) -> Any:
        """Inverse of :meth:`parts`. A list or tuple of one tensor does as well."""
        tensors = parts if isinstance(parts, (tuple, list)) else (parts,)
        return self.build(rows_back([*tensors], self.batch_dim))


def _name(solver: Any) -> str:
    return getattr(solver, "__name__", type(solver).__name__)


def _shape_of(tree: Any) -> Any:
    """The tree with the shapes of its tensors, and of what is no tensor the type."""
    return tree_map(lambda a: a.shape if isinstance(a, Tensor) else type(a), tree)
