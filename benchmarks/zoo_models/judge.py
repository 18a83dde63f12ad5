"""An independent judge in float64: it shares no solver and no gradient with what it judges.

It runs the model's own forward, in which the layer answers with the fixed point found by a plain
Anderson iteration. The gradient is by the implicit function theorem, its adjoint equation solved
likewise. The spectral radius of J_z there is by power iteration.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.joint import layer_mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from jiio_plugins.equilibrium import CellMap
    from jiio_plugins.joint import LayerDefaults

    from .case import Case

_MIXINGS = (1.0, 0.5, 0.1)  # what has not converged is tried again with shorter steps


def anderson(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    tol: float,
    max_iter: int = 200,
    memory: int = 15,
    mixing: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Plain Anderson acceleration of ``z = f(z)``, the weights of the history adding up to 1.

    Args:
        f: works on each row by itself.
        z: where to start, ``(rows, n)``.
        tol: of the residual ``‖f(z) − z‖ / ‖f(z)‖``.
        max_iter: evaluations of f.
        memory: iterates of the history.
        mixing: share of the residual that a step takes.

    Returns:
        The iterate of least residual of every row, and that residual ``(rows,)``.
    """
    rows, n = z.shape
    iterates, images = z.new_zeros(rows, memory, n), z.new_zeros(rows, memory, n)
    best, least = z, z.new_full((rows,), torch.inf)
    for k in range(max_iter):
        fz = f(z)
        residual = (fz - z).norm(dim=1) / fz.norm(dim=1).clamp(min=1e-30)
        better = residual < least
        best = torch.where(better[:, None], z, best)
        least = torch.where(better, residual, least)
        if bool((least <= tol).all()):
            break
        iterates[:, k % memory], images[:, k % memory] = z, fz
        kept = min(k + 1, memory)
        r = images[:, :kept] - iterates[:, :kept]
        gram = r @ r.transpose(1, 2)
        scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-300)[:, None, None]
        gram = gram / scale + 1e-14 * torch.eye(kept, dtype=z.dtype)
        gram = torch.where(torch.isfinite(gram), gram, torch.eye(kept, dtype=z.dtype))
        weights, _ = torch.linalg.solve_ex(gram, torch.ones_like(gram[..., :1]))
        weights = weights / weights.sum(1, keepdim=True)
        z = (weights * (iterates[:, :kept] + mixing * r)).sum(1)
        z = torch.where(torch.isfinite(z).all(1, keepdim=True), z, best)
    return best, least


def solve(f: Callable[[Tensor], Tensor], z: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """:func:`anderson`, again and with shorter steps for as long as rows have not converged."""
    best, least = z, z.new_full((len(z),), torch.inf)
    for mixing in _MIXINGS:
        found, residual = anderson(f, z, tol=tol, mixing=mixing)
        better = (residual < least) & (least > tol)
        best = torch.where(better[:, None], found, best)
        least = torch.where(better, residual, least)
        if bool((least <= tol).all()):
            break
    return best, least


class _Exact:
    """What the layer answers: the fixed point, with its exact gradient.

    Attributes:
        z: the fixed point, flat, a leaf ``(rows, n)``.
        fz: ``f(z)`` with its graph.
        residual: of the solve for z, ``(rows,)``.
        adjoint_residual: of the solve for the adjoint μ, ``(rows,)``. None before a backward pass.
    """

    z: Tensor
    fz: Tensor
    residual: Tensor
    adjoint_residual: Tensor | None = None

    def __init__(self, tol: float) -> None:
        self.tol = tol

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        with torch.no_grad():
            z, self.residual = solve(f, f.layout.pack(z0), self.tol)
        answer = f(z)
        self.z = z.requires_grad_()
        self.fz = f(self.z)
        if answer.requires_grad:
            answer.register_hook(self._adjoint)
        return f.layout.unpack(answer)

    def _adjoint(self, g: Tensor) -> Tensor:
        """μ of ``μ = J_zᵀ μ + g``. A row whose g is 0 has μ = 0."""
        mu, residual = solve(lambda mu: self.vjp(mu) + g, g, self.tol)
        self.adjoint_residual = torch.where((g == 0).all(1), 0.0, residual)
        return mu

    def vjp(self, w: Tensor) -> Tensor:
        """``J_zᵀ w``, ``(rows, n)``."""
        (product,) = torch.autograd.grad(self.fz, self.z, w, retain_graph=True)
        return product

    def spectral_radius(self, iterations: int = 80, averaged: int = 40) -> Tensor:
        """Largest magnitude of an eigenvalue of J_z, ``(rows,)``.

        The growth of a power iteration, averaged over its last steps: a complex pair makes it
        oscillate.
        """
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(self.z.shape, generator=generator, dtype=self.z.dtype)
        growth = torch.zeros_like(self.residual)
        for k in range(iterations):
            w = self.vjp(w / w.norm(dim=1, keepdim=True).clamp(min=1e-30))
            if k >= iterations - averaged:
                growth += w.norm(dim=1).clamp(min=1e-30).log() / averaged
        return growth.exp()


@dataclass(frozen=True)
class Verdict:
    """What the judge says of some points, ``(rows,)`` each.

    Attributes:
        loss: minus the objective.
        right: whether the class is right. None where the model is no classifier.
        residual: ``‖f(z) − z‖ / ‖f(z)‖``.
        converged: whether it is below the tolerance.
        gradient: of the objective by x, as x is. None where it was not asked for.
        gradient_converged: whether the adjoint's residual is below the tolerance too.
        radius: spectral radius of J_z. None where it was not asked for.
    """

    loss: Tensor
    right: Tensor | None
    residual: Tensor
    converged: Tensor
    gradient: Tensor | None = None
    gradient_converged: Tensor | None = None
    radius: Tensor | None = None


class Judge:
    """Judges points of a case, by a copy of its model in float64.

    Args:
        case: a model and an attack on it.
        tol: of every solve, relative.
    """

    def __init__(self, case: Case, tol: float = 1e-6) -> None:
        self.case, self.tol = case, tol
        self.model = copy.deepcopy(case.model).double()

    def __call__(self, x: Tensor, *, gradient: bool = False, radius: bool = False) -> Verdict:
        """The verdict on x ``(rows, ...)``.

        Args:
            x: points to judge, all rows of the case.
            gradient: find the gradient of the objective by x as well.
            radius: find the spectral radius as well.
        """
        x = x.detach().double().requires_grad_(gradient)
        exact = _Exact(self.tol)
        with torch.enable_grad(), layer_mode(exact):
            output = self.model(x)
            value = self.case.objective(output)
        found = torch.autograd.grad(value.sum(), x)[0] if gradient else None
        converged = exact.residual <= self.tol
        labels = self.case.labels
        return Verdict(
            loss=-value.detach(),
            right=None if labels is None else output.argmax(1) == labels,
            residual=exact.residual,
            converged=converged,
            gradient=found,
            gradient_converged=None
            if exact.adjoint_residual is None
            else converged & (exact.adjoint_residual <= self.tol),
            radius=exact.spectral_radius() if radius else None,
        )
