"""Some rows of a layer apart from the others, for more products with their Jacobian alone.

A slow row takes several vector-Jacobian products at one z and v, the others one. In a graph of the
whole batch each would cost as much as for all rows. So f is evaluated in two parts, each with a
graph of its own, and what is before and after the layer still runs once for all. A product of a
part ends at what was injected into it. From there one backward pass goes on to v, for both parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import as_tensors, flatten
from jiio_plugins.utils.trees import leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.equilibrium.cell import CellMap


class Sent(NamedTuple):
    """What a product sends on.

    Attributes:
        jz_mu: ``J_zᵀμ`` of the part, ``(rows of the part, n)``.
        injected: gradient of ``μᵀf`` by each tensor that was injected.
    """

    jz_mu: Tensor
    injected: Sequence[Tensor | None]


class Part:
    """f at some rows of one layer, with a graph of its own.

    Args:
        f: the layer's map, for all rows.
        rows: indices of these.
        z: flat state of all rows, ``(rows, n)``.

    Attributes:
        leaves: the tensors that f was evaluated at.
        f: those of its evaluation.
        injected: those that were injected and have a graph.
    """

    def __init__(self, f: CellMap, rows: Tensor, z: Tensor) -> None:
        self.rows = rows
        own = f.restrict(rows)
        assert own is not None
        state = as_tensors(own.layout.unpack(z[rows]))
        self.leaves = [t.detach().requires_grad_() for t in state]
        self.f = as_tensors(own.evaluate(own.layout.assemble(self.leaves)))
        injected = {id(u): u for u in leaves(own.injection, Tensor) if u.requires_grad}
        self.injected = [*injected.values()]

    def weighted(self, mu: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of f that have a graph, and those of μ ``(rows of the part, n)``."""
        parts = mu.split([t.shape[1:].numel() for t in self.f], dim=1)
        pairs = [
            (f, part.reshape(f.shape).to(f.dtype))
            for f, part in zip(self.f, parts, strict=True)
            if f.requires_grad
        ]
        return [f for f, _ in pairs], [part for _, part in pairs]

    def product(self, mu: Tensor) -> Sent:
        """``J_zᵀμ`` of the part, for μ ``(rows of the part, n)``. Others may follow."""
        outputs, weights = self.weighted(mu)
        if not outputs:
            return Sent(torch.zeros_like(mu), [None] * len(self.injected))
        wanted = [*self.leaves, *self.injected]
        grads = torch.autograd.grad(outputs, wanted, weights, retain_graph=True, allow_unused=True)
        n = len(self.leaves)
        return Sent(self.pack(grads[:n]).to(mu.dtype), grads[n:])

    def pack(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients by the leaves as one flat matrix, ``(rows of the part, n)``."""
        pairs = zip(grads, self.leaves, strict=True)
        return flatten([torch.zeros_like(leaf) if g is None else g for g, leaf in pairs])


def together(parts: Sequence[Part], each: Sequence[Tensor]) -> Tensor:
    """What belongs to the rows of each part, in the order of the batch.

    Args:
        parts: all rows are in one of them.
        each: of each part, ``(rows of the part, ...)``.
    """
    rows = sum(len(part.rows) for part in parts)
    whole = each[0].new_empty(rows, *each[0].shape[1:])
    for part, t in zip(parts, each, strict=True):
        whole.index_copy_(0, part.rows, t)
    return whole


def products(
    parts: tuple[Part, Part], mu: Tensor, sent: Sent | None, v: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``J_zᵀμ``, and the gradient of ``μᵀf`` by v.

    Args:
        parts: the second has had its products by itself.
        mu: μ, ``(rows, n)``.
        sent: the last of these, by its rows of μ. None: there was none.
        v: the variable, a leaf.
    """
    first, second = parts
    if sent is None:
        sent = second.product(mu[second.rows])
    outputs, weights = first.weighted(mu[first.rows])
    for u, grad in zip(second.injected, sent.injected, strict=True):
        if grad is not None:
            outputs.append(u)
            weights.append(grad)
    if not outputs:
        return torch.zeros_like(mu), None
    *grads, of_v = torch.autograd.grad(outputs, [*first.leaves, v], weights, allow_unused=True)
    return together(parts, [first.pack(grads).to(mu.dtype), sent.jz_mu]), of_v
