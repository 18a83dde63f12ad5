"""A joint mode for TorchDEQ's layers.

TorchDEQ (Geng and Kolter, 2023) has one call, ``z_out, info = deq(func, z_init)``, with a function
that holds its injection. That is all a mode of ours needs of a layer: a map, a state to start
from, and what the layer does where it is left alone.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchdeq.core import DEQBase
from torchdeq.norm.spectral_norm import SpectralNorm
from torchdeq.norm.weight_norm import WeightNorm
from torchdeq.solver.stat import SolverStat

from jiio_plugins.equilibrium import (
    Anderson,
    CellMap,
    Cost,
    HostedLayer,
    HostedRules,
    Layout,
    OwnSolve,
    as_tensors,
    check_states,
    count,
    counted,
    full_precision_state,
    never_compiled,
    on_rows,
    rows_back,
    rows_first,
    take_in,
    with_gradient,
)
from jiio_plugins.joint import Computation, computes_weights, current_mode, flags_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@computes_weights
def _normalised(module: nn.Module) -> Iterator[Computation]:
    """What ``torchdeq.reset_norm`` calls on a module."""
    norm = vars(module).get("_deq_norm")
    if isinstance(norm, (WeightNorm, SpectralNorm)):
        yield Computation(vars(module), "_deq_norm", norm, (module,), module)


def adapt(model: nn.Module) -> nn.Module:
    """The model, with a joint mode in each of its TorchDEQ layers ``z* = func(z*)``.

    The layers are changed in place: their class becomes a subclass of what it was, everything else
    (settings, parameters, names in a ``state_dict``) stays. Outside an optimisation they answer as
    before, to the bit.

    In eval mode TorchDEQ solves without a graph, and no gradient reaches the model's input. There
    the answer has the exact gradient now, unless gradients are off. μ solves ``μ = J_zᵀμ + ∂ℓ/∂z``
    to the layer's ``b_tol``, relative to μ, in at most ``b_max_iter`` VJPs. In joint mode a layer
    returns one state, as in eval mode, and an empty ``info``.

    Args:
        model: holds at least one layer from ``torchdeq.get_deq``, or is one. Its states are batch
            first, and func works on each row by itself.

    Returns:
        ``model`` itself. A second call changes nothing more.

    Raises:
        TypeError: model is no ``nn.Module``.
        ValueError: it holds no TorchDEQ layer.

    Example:
        >>> import torchdeq
        >>> deq = adapt(torchdeq.get_deq()).eval()  # or a model that holds it
        >>> u = torch.ones(1, 1, requires_grad=True)
        >>> (z,), _ = deq(lambda z: 0.5 * z + u, torch.zeros(1, 1))  # z = 2 u
        >>> z.sum().backward()
        >>> z.item(), u.grad.item()
        (2.00, 2.00)

    Source: the layer is Geng and Kolter, "TorchDEQ: A Library for Deep Equilibrium Models" (2023).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, DEQBase)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no TorchDEQ layer: assign what torchdeq.get_deq(...) "
            "returns to an attribute of the model. A model without TorchDEQ: "
            "jiio_plugins.adapt(model)"
        )
    for layer in layers:
        take_in(layer, JointDEQ)
    return model


class JointDEQ(HostedLayer):
    """Comes before the class of a TorchDEQ layer: asks the current mode first.

    Attributes:
        signature: of the layer's own ``forward``.
        eval_f_max_iter: evaluations of f at most in eval mode, TorchDEQ's setting.
        f_tol: residual at which its solve stops.
        f_stop_mode: "rel" or "abs", what that residual is.
        b_max_iter: VJPs at most in a backward pass.
        b_tol: residual at which the adjoint's solve stops.
        b_stop_mode: "rel" or "abs", likewise.
    """

    signature: inspect.Signature  # what function and state are called differs from class to class
    eval_f_max_iter: int
    f_tol: float
    f_stop_mode: str
    b_max_iter: int
    b_tol: float
    b_stop_mode: str

    @never_compiled
    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """See ``torchdeq.core.DEQBase.forward``."""
        plain = super().forward
        given = self.signature.bind(self, *args, **kwargs)
        _, func, z0, *rest = given.args
        solve = partial(self._solve, lambda f, z: plain(f, z, *rest, **given.kwargs), func)
        mode = current_mode()
        if mode is None:
            return solve(z0)
        check_states(z0, dim := self.batch_dim)
        start = rows_first(full_precision_state(z0), dim)
        f = CellMap(on_rows(_on_state(func), dim), (), Layout.of(start))
        solver = _anderson(self.eval_f_max_iter, self.f_tol, self.f_stop_mode)
        own = OwnSolve(partial(self._own, solve), solver)
        state = rows_back(mode.on_layer(HostedRules(solver, own), f, start), dim)
        return [list(state) if f.layout.is_tuple else state], SolverStat()

    def _solve(
        self, plain: Callable[..., Any], func: Callable[..., Any], z0: Any
    ) -> tuple[list[Any], Any]:
        """What the layer does by itself, counted. In eval mode it has a gradient."""
        dim = self.batch_dim
        z_out, info = plain(counted(func, dim), z0)
        if isinstance(info, dict):
            count(Cost(), info.get("rel_lowest"))
        plain_parts = as_tensors(z_out[-1])
        has_gradient = any(t.grad_fn is not None for t in plain_parts)
        if self.training or has_gradient or not torch.is_grad_enabled():
            return z_out, info
        found = rows_first(z_out[-1], dim)
        f = CellMap(on_rows(_on_state(func), dim), (), Layout.of(found))
        z = f.layout.pack(found)
        # relative, whatever b_stop_mode says: the gradient of a small loss is as good as of a large
        tol = max(self.b_tol, 10 * torch.finfo(z.dtype).eps)
        solver = Anderson(max_iter=max(1, self.b_max_iter), tol=tol, abs_tol=0.0)
        made = as_tensors(rows_back(f.layout.unpack(with_gradient(f, z, solver)), dim))
        # copies: the network may change them in place
        parts = [t.to(own.dtype, copy=True) for t, own in zip(made, plain_parts, strict=True)]
        return [*z_out[:-1], parts if f.layout.is_tuple else parts[0]], info

    def _own(self, solve: Callable[[Any], tuple[list[Any], Any]], f: CellMap, z0: Tensor) -> Tensor:
        """The same on flat states, ``(rows, n)``."""
        with flags_kept(self):
            # without gradients what makes them in training is of no use, and fails with hook_ift
            self.training = self.training and torch.is_grad_enabled()
            z_out, _ = solve(rows_back(f.layout.unpack(z0), self.batch_dim))
        return f.layout.pack(rows_first(z_out[-1], self.batch_dim))

    @classmethod
    def attributes(cls, kind: Any) -> dict[str, Any]:
        """Of the class that is made for the layers of this kind."""
        return {"signature": inspect.signature(kind.forward)}


def _anderson(max_iter: int, tol: float, stop_mode: str) -> Anderson:
    """A solver of ours that stops where the layer's does."""
    if stop_mode == "rel":
        return Anderson(max_iter=max(1, max_iter), tol=tol)
    return Anderson(max_iter=max(1, max_iter), tol=0.0, abs_tol=tol)


def _on_state(func: Callable[..., Any]) -> Callable[[Any], Any]:
    """``func`` as a function of one state. TorchDEQ hands over the parts of a tuple one by one."""

    def call(state: Any) -> Any:
        return func(*state) if isinstance(state, (tuple, list)) else func(state)

    return call
