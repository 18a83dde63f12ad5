"""An independent judge in float64: it shares no solver and no gradient with what it judges.

It runs the model's own forward, in which the layer answers with the fixed point found by a small
Anderson iteration. The gradient is by the implicit function theorem, its adjoint equation solved
likewise. The spectral radius of J_z there is by power iteration. Beside it stands what the model
answers with its own solver.
"""

from __future__ import annotations

import copy
import math
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

_QUICK = 40  # evaluations of f for all rows: those that have not converged then go on by themselves
# memory, mixing and growth: what has not converged tries the next
_TRIES = ((15, 1.0, math.inf), (15, 1.0, 2.0), (5, 0.3, 2.0))


def anderson(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    tol: float,
    memory: int,
    mixing: float,
    growth: float,
    max_iter: int,
) -> tuple[Tensor, Tensor]:
    """Anderson acceleration of ``z = f(z)``, the weights of the history adding up to 1.

    Args:
        f: works on each row by itself.
        z: where to start, ``(rows, n)``.
        tol: of the residual ``‖f(z) − z‖ / ‖f(z)‖``.
        memory: iterates of the history.
        mixing: share of the residual that a step takes.
        growth: a row whose residual is this many times its least one goes on from there, with no
            history.
        max_iter: evaluations of f.

    Returns:
        The iterate of least residual of every row, and that residual ``(rows,)``.
    """
    rows, n = z.shape
    iterates, residuals = z.new_zeros(rows, memory, n), z.new_zeros(rows, memory, n)
    known = torch.zeros(rows, memory, dtype=torch.bool)
    best, best_f, least = z, z, z.new_full((rows,), torch.inf)
    for k in range(max_iter):
        fz = f(z)
        size = (fz - z).norm(dim=1) / fz.norm(dim=1).clamp(min=1e-30)
        better = size < least
        best, best_f = (torch.where(better[:, None], *t) for t in ((z, best), (fz, best_f)))
        least = torch.where(better, size, least)
        if bool((least <= tol).all()):
            break
        lost = ~(size <= growth * least)
        known[lost] = False
        z, fz = (torch.where(lost[:, None], *t) for t in ((best, z), (best_f, fz)))
        slot = k % memory
        iterates[:, slot], residuals[:, slot], known[:, slot] = z, fz - z, True
        # residuals of unit length, or the latest would be lost beside the first
        norms = residuals.norm(dim=2, keepdim=True).clamp(min=1e-300)
        scale = torch.where(known[..., None], 1 / norms, 0.0)
        unit = scale * residuals
        gram = unit @ unit.transpose(1, 2) + 1e-14 * torch.eye(memory, dtype=z.dtype)
        weights, _ = torch.linalg.solve_ex(gram, scale)
        weights = scale * weights / (scale * weights).sum(1, keepdim=True)
        mixed = (weights * (iterates + mixing * residuals)).sum(1)
        z = torch.where(torch.isfinite(mixed).all(1, keepdim=True), mixed, fz)
    return best, least


def solve(
    f: Callable[[Tensor], Tensor], z: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """:func:`anderson` with one setting after another, for as long as rows have not converged."""
    best, least = z, z.new_full((len(z),), torch.inf)
    for memory, mixing, growth in _TRIES:
        setting = {"memory": memory, "mixing": mixing, "growth": growth}
        found, size = anderson(f, best, tol=tol, max_iter=max_iter, **setting)
        better = (size < least) & (least > tol)
        best = torch.where(better[:, None], found, best)
        least = torch.where(better, size, least)
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

    def __init__(self, tol: float, max_iter: int) -> None:
        self.tol, self.max_iter = tol, max_iter

    def on_layer(self, layer: LayerDefaults, f: CellMap, z0: Any) -> Any:
        with torch.no_grad():
            z, self.residual = solve(f, f.layout.pack(z0), self.tol, self.max_iter)
        answer = f(z)
        self.z = z.requires_grad_()
        self.fz = f(self.z)
        if answer.requires_grad:
            answer.register_hook(self._adjoint)
        return f.layout.unpack(answer)

    def _adjoint(self, g: Tensor) -> Tensor:
        """μ of ``μ = J_zᵀ μ + g``. A row whose g is 0 has μ = 0."""
        mu, residual = solve(lambda mu: self.vjp(mu) + g, g, self.tol, self.max_iter)
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
        loss: minus the objective, at the judge's fixed point.
        right: whether the class is right there. None where the model is no classifier.
        own_loss: the same of the model's own answer, by the solver that it carries.
        own_right: likewise.
        residual: ``‖f(z) − z‖ / ‖f(z)‖`` of the judge's solve.
        converged: whether it is below the tolerance.
        gradient: of the objective by x, as x is. None where it was not asked for.
        gradient_converged: whether the adjoint's residual is below the tolerance too.
        radius: spectral radius of J_z. None where it was not asked for.
    """

    loss: Tensor
    right: Tensor | None
    own_loss: Tensor
    own_right: Tensor | None
    residual: Tensor
    converged: Tensor
    gradient: Tensor | None = None
    gradient_converged: Tensor | None = None
    radius: Tensor | None = None

    @property
    def sure_loss(self) -> Tensor:
        """The smaller of the two losses. To lead to where the two differ is no strength."""
        return torch.fmin(self.loss, self.own_loss)

    @property
    def right_by_either(self) -> Tensor | None:
        """Whether the class is right by either."""
        if self.right is None or self.own_right is None:
            return None
        return self.right | self.own_right


class Judge:
    """Judges points of a case, by a copy of its model in float64.

    Args:
        case: a model and an attack on it.
        tol: of every solve, relative.
        max_iter: evaluations of f, or VJPs, with each of its settings.
    """

    def __init__(self, case: Case, tol: float = 1e-6, max_iter: int = 300) -> None:
        self.case, self.tol, self.max_iter = case, tol, max_iter
        self.model = copy.deepcopy(case.model).double()

    def __call__(self, x: Tensor, *, gradient: bool = False, radius: bool = False) -> Verdict:
        """The verdict on x ``(rows, ...)``.

        Args:
            x: points to judge, all rows of the case.
            gradient: find the gradient of the objective by x as well.
            radius: find the spectral radius as well.
        """
        x, labels = x.detach().double(), self.case.labels
        found = self._solve(x, min(_QUICK, self.max_iter), gradient, radius)
        left = ((found["residual"] > self.tol) | (found["adjoint"] > self.tol)).nonzero().squeeze(1)
        if len(left):
            more = self._solve(x, self.max_iter, gradient, radius, left, found["output"])
            found = {name: t.index_copy(0, left, more[name]) for name, t in found.items()}
        with torch.no_grad():
            own = self.case.model(x.to(self.case.x))
        answers, converged = (found["output"], own), found["residual"] <= self.tol
        loss, own_loss = (-self.case.objective(answer).double() for answer in answers)
        known = labels is not None
        right, own_right = (a.argmax(1) == labels if known else None for a in answers)
        return Verdict(
            loss=loss,
            right=right,
            own_loss=own_loss,
            own_right=own_right,
            residual=found["residual"],
            converged=converged,
            gradient=found.get("gradient"),
            gradient_converged=converged & (found["adjoint"] <= self.tol) if gradient else None,
            radius=found.get("radius"),
        )

    def _solve(
        self,
        x: Tensor,
        max_iter: int,
        gradient: bool,
        radius: bool,
        rows: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What is found of these rows by their indices, of all for None.

        An objective is of all rows, so the others' ``outputs`` have to be known.
        """
        exact = _Exact(self.tol, max_iter)
        x = (x if rows is None else x[rows]).requires_grad_(gradient)
        with torch.enable_grad(), layer_mode(exact):
            output = every = self.model(x)
            if rows is not None:
                assert outputs is not None
                every = outputs.index_copy(0, rows, output)
            value = self.case.objective(every)
        found = {"output": output.detach(), "residual": exact.residual}
        found["adjoint"] = torch.zeros_like(exact.residual)
        if gradient:
            found["gradient"] = torch.autograd.grad(value.sum(), x)[0]
            assert exact.adjoint_residual is not None
            found["adjoint"] = exact.adjoint_residual
        if radius:
            found["radius"] = exact.spectral_radius()
        return found
