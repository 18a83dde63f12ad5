"""One pass of the network at ``(z, v)``, and the derivatives that are read off it.

A method needs the loss, ``f(z, v)``, and products with the Jacobians ``J_z`` and ``J_v``. One
forward pass in joint mode yields them all. A :class:`jiio_plugins.joint.RecordMode` cuts the graph
at each layer: f is evaluated at a leaf, and the layer answers with a leaf. So what comes after the
layers, and f itself, are differentiated apart from each other. :meth:`Linearization.gradient` gives
``∂ℓ/∂z``, which needs no product with f. :meth:`Linearization.vjp` gives ``J_zᵀμ`` and ``J_vᵀμ`` by
one vector-Jacobian product. :meth:`Linearization.by_v` makes the gradient of it.

What the layers do in the pass is in :mod:`jiio_plugins.joint.modes`. What a method makes of it is
in :mod:`jiio_plugins.methods.joint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.compiling import uncompiled
from jiio_plugins.equilibrium.mode import layer_mode
from jiio_plugins.equilibrium.state import flatten
from jiio_plugins.joint.apart import products, together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jiio_plugins.joint.apart import Sent
    from jiio_plugins.joint.modes import RecordMode


class Linearization:
    """One pass of the network at ``(z, v)``: its loss, ``f(z, v)``, and their derivatives.

    Args:
        call: the network as a function of v.
        v: the variable, ``(problems, d)``.
        mode: what the layers do. With ``answer_fz`` what comes after a layer sees f(z, v) instead
            of z. At a fixed point that is the same. Before, the loss and its gradient are those of
            a state one step further. With ``empty`` v reaches no layer: there are no z and no μ to
            advance, and both are ``(rows, 0)``.

    Attributes:
        output: what the model returned.
        z: state of the pass, flat, ``(rows, n)``.
        fz: ``f(z, v)``, ``(rows, n)``.
        own_jz_mu: of the last VJP, what went through each layer's own state, ``(rows, n)``.
        apart: indices of rows that have a graph of their own. None: there are none.

    Raises:
        RuntimeError: the pass called more or fewer layers than the mode has states of.
    """

    own_jz_mu: Tensor
    _dl_dv: Tensor | None
    apart: Tensor | None
    _sent: Sent | None

    def __init__(self, call: Callable[[Tensor], Any], v: Tensor, mode: RecordMode) -> None:
        self._v, self._mode = v.detach().requires_grad_(), mode
        with torch.enable_grad(), layer_mode(mode), uncompiled():
            self.output = call(self._v)
        mode.close()
        self._parts, self._sent = mode.parts, None
        self.apart = None if mode.parts is None else mode.parts[1].rows
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

    def gradient(self, loss: Tensor, *, create_graph: bool = False) -> Tensor:
        """``∂ℓ/∂z``, ``(rows, n)``: of what is around f, which is held constant.

        :meth:`by_v` has the direct ``∂ℓ/∂v`` from then on.

        Args:
            loss: ℓ, ``(rows,)``, made of ``output``.
            create_graph: let the result be differentiated again.

        Raises:
            ValueError: the loss has no gradient.
        """
        if not loss.requires_grad:
            raise ValueError(
                "the objective has no gradient: it depends on neither x nor a state of the model. "
                "The model or the objective detaches it, computes it under torch.no_grad(), or "
                "does not use the model's output"
            )
        with layer_mode(self._mode):
            grads = torch.autograd.grad(  # of the sum, which would be two kernels more
                loss,
                [*self._answers, self._v],
                torch.ones_like(loss),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        self._dl_dv = grads[-1]
        return self._pack(self._answers, grads[:-1])

    def by_v(self, jv_mu: Tensor) -> Tensor:
        """``J_vᵀμ + ∂ℓ/∂v``, ``(problems, d)``: the gradient of the objective where μ has settled.

        Args:
            jv_mu: ``J_vᵀμ``, as :meth:`vjp` gave it.
        """
        return jv_mu if self._dl_dv is None else self._dl_dv + jv_mu

    def vjp(
        self, mu: Tensor, *, last: bool = True, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of f along μ: one vector-Jacobian product.

        With ``answer_fz`` a later layer's f depends on z through the answers of the earlier ones.
        What arrives there belongs to the earlier layer's part of ``J_zᵀμ``.

        Args:
            mu: μ, ``(rows, n)``.
            last: no other product follows, so the graph may go.
            create_graph: let the result be differentiated again.

        Returns:
            ``J_zᵀμ``, ``(rows, n)``, and ``J_vᵀμ``, ``(problems, d)``.
        """
        jz_mu, of_v = self._products(mu, [self._v], not last, create_graph)
        return jz_mu, torch.zeros_like(self._v) if of_v[0] is None else of_v[0]

    def jz_mu(self, mu: Tensor) -> Tensor:
        """``J_zᵀμ`` alone, with another product to come: what is before the layer is left out."""
        return self._products(mu, [], True, False)[0]

    def jz_mu_apart(self, mu: Tensor) -> Tensor:
        """``J_zᵀμ`` of the rows apart, for their μ. :meth:`vjp` goes on from the last of these.

        Args:
            mu: μ of these rows, ``(rows apart, n)``.
        """
        assert self._parts is not None
        self._sent = self._parts[1].product(mu)
        return self._sent.jz_mu

    def _products(
        self, mu: Tensor, more: list[Tensor], retain: bool, create_graph: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """``J_zᵀμ``, and the gradients of ``μᵀf`` by ``more``."""
        if self._parts is not None:
            assert not create_graph
            if not more:
                each = [part.product(mu[part.rows]).jz_mu for part in self._parts]
                return together(self._parts, each), []
            jz_mu, of_v = products(self._parts, mu, self._sent, self._v)
            self.own_jz_mu = jz_mu  # there is but one layer
            return jz_mu, [of_v]
        parts = mu.split([leaf.shape[1:].numel() for leaf in self._leaves], dim=1)
        outputs, weights = [], []
        for f, part in zip(self._f, parts, strict=True):
            if f.requires_grad:
                outputs.append(f)
                weights.append(part.reshape(f.shape).to(f.dtype))
        if not outputs:
            self.own_jz_mu = torch.zeros_like(mu)
            return self.own_jz_mu, [None] * len(more)
        # in series, what a layer answered with went into the next one's injection
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
