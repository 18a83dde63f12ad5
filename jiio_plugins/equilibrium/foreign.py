"""``adapt(model)``: a joint mode for equilibrium layers that others wrote, known by their form.

A layer that holds its own solver calls it somewhere in its forward, ``solver(f, z0)``, with an f
that holds its injection. That call has all that a mode needs: a map and a state to start from. So
the class of the layer becomes a subclass whose solver can be listened to (:class:`_Tapped`). What
the layer makes of the solver's result is found out by running it once (:meth:`ForeignLayer._look`).
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from jiio_plugins.equilibrium.cell import CellMap
from jiio_plugins.equilibrium.counting import counting_into, open_counters
from jiio_plugins.equilibrium.hosted import (
    WAYS,
    HostedLayer,
    HostedRules,
    OwnSolve,
    counted,
    put_back,
    take_in,
    with_gradient,
)
from jiio_plugins.equilibrium.layer import (
    EquilibriumLayer,
    current_mode,
    full_precision_state,
    layer_mode,
)
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.equilibrium.state import Layout
from jiio_plugins.hosts import load_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils._pytree import TreeSpec

_SOLVERS = ("f_solver", "solver", "b_solver")  # attributes of a layer that solve
_CELLS = ("f", "func", "cell", "fn")  # beside a plain ``solver``: what it is to solve
_SAME = 1e-4  # relative: what a layer returns is its state, or f of it
_LOOKED_AT = 12  # modules that an error names

NO_LAYER = (
    "the model has no equilibrium layer that its forward reaches, so there is no fixed point to "
    "optimise through. Put jiio_plugins.Equilibrium(cell) where the fixed point z = cell(z, u) is: "
    "in __init__ 'self.equilibrium = jiio_plugins.Equilibrium(cell)', in forward "
    "'z = self.equilibrium(self.encoder(x))'. A TorchDEQ model: jiio_torchdeq.adapt(model)"
)


def adapt(model: nn.Module) -> nn.Module:
    """The model, with a joint mode in each equilibrium layer that is recognised, in place.

    Recognised are

    - a module with a solver of its own: ``f_solver``, or ``solver`` beside ``f``, ``func``,
      ``cell`` or ``fn``. It calls ``solver(f, z0, ...)``, once a forward, with an f of the state
      alone. The solver returns the state, or a tuple that begins with it, or a dict with
      ``"result"``. Gradients may pass by a hook or an ``autograd.Function``. States may be tensors,
      tuples, lists or dicts of them, batch first.
    - deepinv's unfolded models with ``DEQ=True``.
    - TorchDEQ's layers, by :func:`jiio_torchdeq.adapt`.
    - layers that are of this library, or adapted already: they stay as they are.

    The layer keeps its solver, its settings, its parameters and its names in a ``state_dict``.
    Outside an optimisation ``model(x)`` is the same to the bit. :func:`unadapt` undoes it.

    Args:
        model: holds such layers, or is one.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: model is no ``nn.Module``.
        ValueError: nothing is recognised. The message names the modules that were looked at.

    Not for: layers that do something with a state in train mode and have a backward solve of their
    own as well. In eval mode they are served.

    Example:
        >>> adapt(model) is model  # it has an Equilibrium layer already
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = recognise(model)
    if any(kind == "TorchDEQ" for kind in found.values()):
        load_adapter("torchdeq").adapt(model)
    for name, kind in found.items():
        if kind not in ("TorchDEQ", "ready"):
            take_in(model.get_submodule(name), ForeignLayer)
    if not found:
        raise ValueError(no_layer(model))
    return model


def unadapt(model: nn.Module) -> nn.Module:
    """Undo :func:`adapt`, in place: every layer is of the class that it was.

    Args:
        model: that was adapted, or not.

    Returns:
        ``model`` itself.
    """
    for module in list(model.modules()):
        if isinstance(module, HostedLayer):
            module.__dict__.pop(WAYS, None)
            put_back(module)
    return model


def recognise(model: nn.Module) -> dict[str, str]:
    """The equilibrium layers of a model: name in it -> what it is.

    "ready" for one that has a joint mode.
    """
    found = {name: _kind(module) for name, module in model.named_modules()}
    return {name: kind for name, kind in found.items() if kind is not None}


def servable(model: nn.Module) -> dict[str, str]:
    """The layers that :func:`adapt` would change: name in the model -> what it is."""
    return {name: kind for name, kind in recognise(model).items() if kind != "ready"}


def no_layer(model: nn.Module) -> str:
    """The error of a model without an equilibrium layer: what it has, and the lines to write."""
    found = servable(model)
    if found:
        layers = ", ".join(f"{name or 'itself'} ({kind})" for name, kind in found.items())
        return (
            f"{NO_LAYER}. It has layers that can be served as they are: {layers}. Write 'model = "
            "jiio_plugins.adapt(model)'"
        )
    modules = [(name, module) for name, module in model.named_modules() if name]
    looked = ", ".join(f"{n} ({type(m).__name__})" for n, m in modules[:_LOOKED_AT]) or "none"
    more = len(modules) - _LOOKED_AT
    return (
        f"{NO_LAYER}. Looked at {type(model).__name__} and its modules: {looked}"
        f"{f' and {more} more' if more > 0 else ''}. None has a solver of its own, an attribute "
        "f_solver, or solver beside f, which jiio_plugins.adapt(model) would serve"
    )


def _kind(module: nn.Module) -> str | None:
    kinds = type(module).__mro__
    if isinstance(module, EquilibriumLayer):
        return "ready"
    if any(k.__name__ == "DEQBase" and k.__module__.startswith("torchdeq.") for k in kinds):
        return "TorchDEQ"
    iterates = hasattr(getattr(module, "fixed_point", None), "single_iteration")
    named = getattr(module, "DEQ", False) or any(k.__name__ == "BaseDEQ" for k in kinds)
    if iterates and named:
        return f"{type(module).__name__}, deepinv's"
    solvers = [name for name in _SOLVERS if callable(getattr(module, name, None))]
    cells = [name for name in _CELLS if callable(getattr(module, name, None))]
    if "f_solver" in solvers or ("solver" in solvers and cells):
        return type(module).__name__
    return None


# Listening to a solver --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listener:
    """What answers for the solver of one layer.

    Attributes:
        layer: whose.
        answer: called with the solver and what it was called with.
    """

    layer: nn.Module
    answer: Callable[..., Any]


_listener: ContextVar[_Listener | None] = ContextVar("jiio_listener", default=None)


@contextmanager
def _listening(layer: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    token = _listener.set(_Listener(layer, answer))
    try:
        yield
    finally:
        _listener.reset(token)


class _Tapped:
    """The attribute of a layer that solves. It is what it was, unless somebody listens."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        held = layer.__dict__ | layer.__dict__.get("_modules", {})
        if self.name in held:
            own = held[self.name]
        else:  # a method, or whatever the class has
            own = getattr(super(type(layer), layer), self.name)
        listener = _listener.get()
        if listener is None or listener.layer is not layer:
            return own
        return _Heard(own, listener.answer)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__[self.name] = value


class _Heard:
    """A solver whose calls are answered by somebody else."""

    def __init__(self, own: Any, answer: Callable[..., Any]) -> None:
        self._own, self._answer = own, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(self._own, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Reached(BaseException):
    """The solver is called. What comes after it in the layer's forward is not wanted."""

    def __init__(self, call: _Call) -> None:
        self.call = call


# The call of a solver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A solver as its layer has called it.

    Attributes:
        solver: the layer's own.
        args: positional arguments, f and z0 first among what is callable and what is a state.
        kwargs: the others.
        func: f.
        z0: where it starts, as f has it.
    """

    solver: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    func: Callable[[Any], Any]
    z0: Any

    @property
    def state(self) -> _State:
        """What the states of f look like."""
        return _State.of(self.z0)

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
            return tuple(state.list(self.func(state.whole(parts))))

        report = counted(on_parts)

        def func(z: Any, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                return self.func(z, *args, **kwargs)
            return state.whole(report(*state.list(z)))

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


def _with(result: Any, found: Any) -> Callable[[Any], Any]:
    """What a solver returned, with another state in the place of the one that was found."""
    if found is result:
        return lambda state: state
    if isinstance(result, dict):
        return lambda state: {**result, "result": state}
    build = type(result) if hasattr(result, "_fields") else lambda *parts: type(result)(parts)
    return lambda state: build(state, *result[1:])


class _Unfolded(_Call):
    """deepinv's fixed-point iteration, whose state is the ``est`` of a dict."""

    def solve(self, start: Any = None) -> Any:
        """See :class:`_Call`. It starts where its own settings say."""
        return self.solver(*self.args, **self.kwargs)

    def found(self, result: Any) -> Any:
        """See :class:`_Call`."""
        return result[0]["est"]


def _read(layer: nn.Module, solver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """The map and the start of a solver's call."""
    if hasattr(solver, "single_iteration"):
        return _read_unfolded(solver, args, kwargs)
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
    return _Call(solver, args, kwargs, func, z0)


def _read_unfolded(solver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    own = {"init", "x_gt", "compute_metrics"}  # the others are the iterator's
    rest = {name: value for name, value in kwargs.items() if name not in own}
    last = solver.max_iter - 1
    names = ("update_data_fidelity_fn", "update_prior_fn", "update_params_fn")
    updates = [getattr(solver, name) for name in names]
    settings = [None if update is None else update(last) for update in updates]

    def func(est: Any) -> Any:
        return solver.iterator({"est": est, "cost": None}, *settings, *args, **rest)["est"]

    start = [kwargs.get("init")] if "init" in kwargs else []
    first = solver.init_iterate_fn(*args, *start, cost_fn=solver.iterator.cost_fn)
    return _Unfolded(solver, args, kwargs, func, first["est"])


@dataclass(frozen=True)
class _State:
    """A state of any structure as the tensors in it. What is no tensor is the same for all.

    Attributes:
        spec: its structure.
        leaves: of the first state, None where there is a tensor.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, state: Any) -> _State:
        leaves, spec = tree_flatten(state)
        return cls(spec, tuple(None if isinstance(a, Tensor) else (a,) for a in leaves))

    def list(self, state: Any) -> list[Tensor]:
        """The tensors of a state."""
        return [a for a in tree_leaves(state) if isinstance(a, Tensor)]

    def parts(self, state: Any) -> Any:
        """A state as a cell of ours has it: a tensor, or a tuple of them."""
        tensors = tuple(self.list(state))
        return tensors if len(self.leaves) > 1 else tensors[0]

    def whole(self, parts: Any) -> Any:
        """Inverse of :meth:`parts`. A list or tuple of one tensor does as well."""
        tensors = iter(parts if isinstance(parts, (tuple, list)) else (parts,))
        return tree_unflatten(
            [next(tensors) if kept is None else kept[0] for kept in self.leaves], self.spec
        )


# The layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """What a layer makes of the state that its solver found.

    Attributes:
        answer: what it returns, of the tensors of the state. None: the rest of its forward does it.
        of_f: of those of f(state), one evaluation more.
        returns: a state -> what the solver returns, for the rest of the forward.
    """

    answer: Callable[[list[Tensor]], Any] | None
    of_f: bool = False
    returns: Callable[[Any], Any] = lambda state: state


class ForeignLayer(HostedLayer):
    """Comes before the class of a layer with a solver of its own."""

    @classmethod
    def attributes(cls, kind: Any) -> dict[str, Any]:
        """The solvers, which can be listened to."""
        return {name: _Tapped(name) for name in (*_SOLVERS, "fixed_point")}

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="an equilibrium layer runs a data-dependent loop"
    )
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward says. In joint mode, what the running optimisation asks."""
        forward = super().forward
        plain = partial(forward, *args, **kwargs)
        mode = current_mode()
        if mode is None:
            if not open_counters():
                return plain()
            with _listening(self, lambda solver, *a, **k: _read(self, solver, a, k).solve()):
                return plain()
        ways = self.__dict__.setdefault(WAYS, {})
        if self.training not in ways:
            inputs = tree_map_only(Tensor, _as_input, (args, kwargs))
            with layer_mode(None), counting_into(()), torch.enable_grad():  # type: ignore[arg-type]
                ways[self.training] = self._look(partial(forward, *inputs[0], **inputs[1]))
        way = ways[self.training]
        answers: list[Any] = []
        graph = torch.is_grad_enabled()

        def answer(solver: Any, *a: Any, **k: Any) -> Any:
            if answers:
                raise RuntimeError(_TWICE.format(type(self).__bases__[1].__name__))
            call = _read(self, solver, a, k)
            if way.answer is not None:
                raise _Reached(call)
            with torch.set_grad_enabled(graph):  # which the layer may have switched off
                answers.append(_on_layer(mode, call, way))
            return way.returns(call.state.whole(answers[0]))

        try:
            with _listening(self, answer):
                return plain()
        except _Reached as reached:
            call = reached.call
        parts = _on_layer(mode, call, way)
        return way.answer(list(parts) if isinstance(parts, tuple) else [parts])

    def _look(self, plain: Callable[[], Any]) -> _Way:
        """Run the layer by itself, and see what it makes of the state.

        Raises:
            ValueError: neither is it what the layer returns, nor can the rest of its forward be
                run: it solves again in the backward pass, or hides its graph.
        """
        name, calls = type(self).__bases__[1].__name__, []

        def note(solver: Any, *a: Any, **k: Any) -> Any:
            call = _read(self, solver, a, k)
            result = call.solve()
            calls.append((call, result, call.found(result)))
            return result

        with _listening(self, note):
            out = plain()
        if not calls:
            raise ValueError(
                f"{name} did not call its solver: what was recognised as one does not solve its "
                "fixed point. Put jiio_plugins.Equilibrium(cell) where it is solved"
            )
        if len(calls) > 1:
            raise ValueError(_TWICE.format(name))
        call, result, state = calls[0]
        with torch.no_grad():
            tensors, image = call.state.list(state), call.state.list(call.func(state))
        # where both are near, f(state) is likelier: its graph is what a backward hook needs
        for of_f, exact in ((False, True), (True, True), (True, False), (False, False)):
            pick = _picked(out, image if of_f else tensors, exact=exact)
            if pick is not None:
                return _Way(pick, of_f)
        leaves = [t.detach().requires_grad_() for t in tensors]
        asked = []
        returns = _with(result, state)

        def stand_in(solver: Any, *a: Any, **k: Any) -> Any:
            asked.append(solver)
            return returns(call.state.whole(leaves))

        with _listening(self, stand_in):
            again = [t for t in tree_leaves(plain()) if isinstance(t, Tensor) and t.requires_grad]
            reached = again and any(
                g is not None
                for g in torch.autograd.grad(
                    [t.sum() for t in again], leaves, allow_unused=True, retain_graph=True
                )
            )
        if not reached or len(asked) > 1:
            what = "solves again in its backward pass" if reached else "hides where that comes from"
            raise ValueError(
                f"{name} returns something else than the state its solver finds, and {what}. Call "
                "it in eval mode, or let a module of its own return the state, and adapt that"
            )
        return _Way(None, returns=returns)


_TWICE = (
    "{} calls its solver more than once in a forward. Give each fixed point a module of its own, "
    "with its solver, or put jiio_plugins.Equilibrium(cell) there"
)


def _on_layer(mode: Any, call: _Call, way: _Way) -> Any:
    """What the mode answers, as the tensors of a state."""
    f, state = call.cell(), call.state
    solver = Anderson()

    def own(f: CellMap, z0: Tensor) -> Tensor:
        with torch.no_grad():
            found = call.found(call.solve(state.whole(f.layout.unpack(z0))))
            z = f.layout.pack(state.parts(found))
            if way.of_f:
                z = f(z)
        return with_gradient(f, z, solver) if torch.is_grad_enabled() else z

    start = full_precision_state(state.parts(call.z0))
    return mode.on_layer(HostedRules(solver, OwnSolve(own, solver)), f, start)


def _picked(
    out: Any, tensors: list[Tensor], *, exact: bool
) -> Callable[[list[Tensor]], Any] | None:
    """What makes ``out`` of tensors, if these are all that is in it."""
    leaves, spec = tree_flatten(out)
    places = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            return None
        equal = [k for k, t in enumerate(tensors) if _same(leaf, t, exact)]
        if not equal:
            return None
        places.append(equal[0])
    return lambda parts: tree_unflatten([parts[k] for k in places], spec)


def _same(a: Tensor, b: Tensor, exact: bool) -> bool:
    if a.shape != b.shape:
        return False
    if exact:
        return torch.equal(a, b)
    return bool((a - b).norm() <= _SAME * b.norm())


def _as_input(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.is_floating_point())


def _name(solver: Any) -> str:
    return getattr(solver, "__name__", type(solver).__name__)


def _shape_of(tree: Any) -> Any:
    """The tree with the shapes of its tensors, and of what is no tensor the type."""
    return tree_map(lambda a: a.shape if isinstance(a, Tensor) else type(a), tree)
