"""One pass of the network, and its derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.layer import layer_mode
from jiio_plugins.equilibrium.state import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.joint.modes import RecordMode


class Linearization:
    """One pass of the network at ``(v, z)``: its loss, ``f(z, v)``, and their derivatives.

    Args:
        call: the network as a function of v.
        v: flat variable.
        mode: what the layers do: :class:`RecordMode`. With ``answer_fz`` what comes after a layer
            sees ``f(z, v)`` instead of z. At a fixed point that is the same; before, the loss and
            its gradient are those of a state one step further. With ``empty`` v reaches no layer:
            there are no z and no μ to advance, both are ``(rows, 0)``.

    Attributes:
        output: what the model returned.
        z: the state of the pass, flat ``(rows, n)``.
        fz: ``f(z, v)``, likewise.
        own_jz_mu: of the last VJP, what went through each layer's own state.
    """

    own_jz_mu: Tensor

    def __init__(self, call: Callable[[Tensor], Any], v: Tensor, mode: RecordMode) -> None:
        self._v, self._mode = v.detach().requires_grad_(), mode
        with torch.enable_grad(), layer_mode(mode):
            self.output = call(self._v)
        mode.close()
        if mode.empty is not None:
            self.z = mode.empty
            self._f = [self.z]
            self._leaves = self._answers = [self.z.clone().requires_grad_()]
        else:
            self.z = torch.cat(mode.z, dim=1) if len(mode.z) > 1 else mode.z[0]
            self._f = [f for parts in mode.f for f in parts]
            self._leaves = [leaf for leaves in mode.leaves for leaf in leaves]
            self._answers = [leaf for leaves in mode.answers for leaf in leaves]
        self.fz = self.live_fz.detach()

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors of z and then v, as the pass saw them: what its derivatives are taken by."""
        return [*self._leaves, self._v]

    @property
    def live_fz(self) -> Tensor:
        """``f(z, v)`` with its graph, flat ``(rows, n)``."""
        return flatten(self._f).to(self.z.dtype)

    def gradient(self, loss: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """``∂ℓ/∂z`` ``(rows, n)`` and the direct ``∂ℓ/∂v``, with f held constant (head only)."""
        if not loss.requires_grad:
            raise ValueError(
                "the objective has no gradient: it depends on neither x nor a state of the model. "
                "The model or the objective detaches it, computes it under torch.no_grad(), or "
                "does not use the model's output"
            )
        with layer_mode(self._mode):
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

        With ``answer_fz`` a later layer's f depends on z through the answers of the earlier ones.
        What arrives there belongs to the earlier layer's part of ``J_zᵀ μ``.
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
        passed_on = self._answers if self._mode.answer_fz and len(self._mode.f) > 1 else []
        with layer_mode(self._mode):
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
        return flatten(filled).to(self.z.dtype)

    def _of_v(self, grad: Tensor | None) -> Tensor:
        return torch.zeros_like(self._v) if grad is None else grad
