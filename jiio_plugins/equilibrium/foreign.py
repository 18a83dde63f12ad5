"""``adapt(model)``: a joint mode for equilibrium layers that others wrote, known by their form.

A layer that holds its own solver calls it somewhere in its forward, ``solver(f, z0)``, with an f
that holds its injection. That call has all that a mode needs: a map and a state to start from. So
the class of the layer becomes a subclass whose solver can be listened to (:class:`_Tapped`). What
the layer makes of the solver's result is found out by running it once (:meth:`ForeignLayer._look`).

Which layers these are is in :mod:`jiio_plugins.equilibrium.recognition`, and what is read off the
call in :mod:`jiio_plugins.equilibrium.solver_calls`.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from jiio_plugins.equilibrium.batch import check_batch_dim
from jiio_plugins.equilibrium.compiling import never_compiled
from jiio_plugins.equilibrium.counting import counting_into, open_counters
from jiio_plugins.equilibrium.hosted import (
    WAYS,
    HostedLayer,
    HostedRules,
    OwnSolve,
    put_back,
    take_in,
    with_gradient,
)
from jiio_plugins.equilibrium.layer import full_precision_state, layers_of
from jiio_plugins.equilibrium.mode import current_mode, layer_mode
from jiio_plugins.equilibrium.recognition import SOLVERS, no_layer, recognise
from jiio_plugins.equilibrium.solver_calls import SolverCall, read_call, with_state
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.hosts import load_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jiio_plugins.equilibrium.cell import CellMap

_SAME = 1e-4  # relative: what a layer returns is its state, or f of it


def adapt(model: nn.Module, *, batch_dim: int | None = 0, whole_batch: bool = False) -> nn.Module:
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
        batch_dim: dimension of the states that the batch is, 1 for sequences ``(L, B, D)``. None:
            they are of one problem, as the nodes of one graph. See
            :class:`jiio_plugins.Equilibrium`.
        whole_batch: call the model on all rows or none, where they belong together.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: model is no ``nn.Module``.
        ValueError: nothing is recognised. The message names the modules that were looked at. Or a
            ``batch_dim`` that is no dimension.

    Not for: layers that do something with a state in train mode and have a backward solve of their
    own as well. In eval mode they are served.

    Example:
        >>> adapt(model) is model  # it has an Equilibrium layer already
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_batch_dim(batch_dim)
    found = recognise(model)
    if any(kind == "TorchDEQ" for kind in found.values()):
        load_adapter("torchdeq").adapt(model)
    for name, kind in found.items():
        if kind not in ("TorchDEQ", "ready"):
            take_in(model.get_submodule(name), ForeignLayer)
    if not found:
        raise ValueError(no_layer(model))
    if (batch_dim, whole_batch) != (0, False):
        for layer in layers_of(model):
            if isinstance(layer, HostedLayer):
                layer.batch_dim, layer.whole_batch = batch_dim, whole_batch
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
            for name in (WAYS, "batch_dim", "whole_batch"):
                module.__dict__.pop(name, None)
            put_back(module)
    return model


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
    """A solver whose calls are answered by somebody else, as long as somebody listens.

    A layer that kept it calls it in its backward pass too, which is its own affair.
    """

    def __init__(self, own: Any, answer: Callable[..., Any]) -> None:
        self._own, self._answer = own, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        listener = _listener.get()
        if listener is None or listener.answer is not self._answer:
            return self._own(*args, **kwargs)
        return self._answer(self._own, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Reached(BaseException):
    """The solver is called. What comes after it in the layer's forward is not wanted."""

    def __init__(self, call: SolverCall) -> None:
        self.call = call


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
        return {name: _Tapped(name) for name in (*SOLVERS, "fixed_point")}

    @never_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward says. In joint mode, what the running optimisation asks."""
        forward = super().forward
        plain = partial(forward, *args, **kwargs)
        mode = current_mode()
        if mode is None:
            if not open_counters():
                return plain()
            with _listening(self, lambda solver, *a, **k: read_call(self, solver, a, k).solve()):
                return plain()
        ways = self.__dict__.setdefault(WAYS, {})
        if self.training not in ways:
            inputs = tree_map_only(Tensor, _as_input, (args, kwargs))
            with layer_mode(None), counting_into(()), torch.enable_grad():
                ways[self.training] = self._look(partial(forward, *inputs[0], **inputs[1]))
        way = ways[self.training]
        answers: list[Any] = []
        graph = torch.is_grad_enabled()

        def answer(solver: Any, *a: Any, **k: Any) -> Any:
            if answers:
                raise RuntimeError(_TWICE.format(type(self).__bases__[1].__name__))
            call = read_call(self, solver, a, k)
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
        return way.answer(call.state.list(call.state.whole(parts)))

    def _look(self, plain: Callable[[], Any]) -> _Way:
        """Run the layer by itself, and see what it makes of the state.

        Raises:
            ValueError: neither is it what the layer returns, nor can the rest of its forward be
                run: it solves again in the backward pass, or hides its graph.
        """
        name, calls = type(self).__bases__[1].__name__, []

        def note(solver: Any, *a: Any, **k: Any) -> Any:
            call = read_call(self, solver, a, k)
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
        returns = with_state(result, state)

        def stand_in(solver: Any, *a: Any, **k: Any) -> Any:
            asked.append(solver)
            return returns(call.state.build(leaves))

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


def _on_layer(mode: Any, call: SolverCall, way: _Way) -> Any:
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
