"""How a solve of all layers ended, and a state to start with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import row_norm
from jiio_plugins.solution import Status
from jiio_plugins.utils.trees import map_leaves

if TYPE_CHECKING:
    from jiio_plugins.equilibrium.solvers import FlatSolution


class WarmUp(NamedTuple):
    """A state to start with.

    Attributes:
        z: flat, ``(rows, n)``.
        rate: by how much each evaluation has brought z nearer to its fixed point, ``(rows,)``. It
            is the n-th root of ``‖z − z*‖ / ‖z0 − z*‖`` after n evaluations, as the residual, times
            how far the state moved for each unit of it, tells. 0 where nothing was solved.
    """

    z: Tensor
    rate: Tensor


class Solved(NamedTuple):
    """How a solve of all layers ended.

    Attributes:
        output: what the model returned.
        z: state, flat, ``(rows, n)``.
        results: of each layer. Empty where each did what it does outside an optimisation.
        moved: of each layer, ``‖z − z0‖``, ``(rows,)``. Empty likewise.
    """

    output: Any
    z: Tensor
    results: list[FlatSolution]
    moved: list[Tensor]

    def restrict(self, rows: Tensor) -> Solved:
        """Of the rows of these indices alone."""
        whole = len(self.z)

        def some(t: Tensor) -> Tensor:
            return t[rows] if t.ndim and len(t) == whole else t

        results = [
            replace(r, **{f.name: getattr(r, f.name)[rows] for f in fields(r)})
            for r in self.results
        ]
        output = map_leaves(self.output, Tensor, some)
        return Solved(output, self.z[rows], results, [some(t) for t in self.moved])

    @property
    def evals(self) -> Tensor:
        """Evaluations of f, all layers together, ``(rows,)``."""
        return torch.stack([r.evals for r in self.results]).sum(0)

    @property
    def residual(self) -> Tensor:
        """Largest relative residual of any layer, ``(rows,)``."""
        return torch.stack([r.residual for r in self.results]).amax(0)

    @property
    def converged(self) -> Tensor:
        """Rows in which every layer reached its tolerance, bool ``(rows,)``."""
        return torch.stack([r.status == Status.CONVERGED for r in self.results]).all(0)

    @property
    def nonfinite(self) -> Tensor:
        """Rows in which some layer met NaN or Inf, bool ``(rows,)``."""
        return torch.stack([r.status == Status.NONFINITE for r in self.results]).any(0)

    @property
    def amplification(self) -> Tensor:
        """How far a state moved for each unit of residual, the most of any layer, ``(rows,)``.

        ``‖z − z0‖ / (‖f(z0) − z0‖ + ‖f(z) − z‖)`` is at most the norm of ``(I − J_z)⁻¹``. It is 0
        where a layer was solved already.
        """
        tiny = torch.finfo(self.z.dtype).tiny
        sizes = [(r.first_size + r.size).clamp(min=tiny) for r in self.results]
        ratios = torch.stack(self.moved) / torch.stack(sizes)
        return torch.where((ratios > 0).all(0), ratios.amax(0), 0.0)

    @property
    def travelled(self) -> Tensor:
        """``‖z − z0‖ / ‖f(z)‖``, the least of any layer, ``(rows,)``."""
        tiny = torch.finfo(self.z.dtype).tiny
        each = zip(self.moved, self.results, strict=True)
        return torch.stack([moved / row_norm(r.fz).clamp(min=tiny) for moved, r in each]).amin(0)

    @property
    def fz(self) -> Tensor:
        """``f(z)``, ``(rows, n)``: one step further, for free."""
        return torch.cat([r.fz for r in self.results], dim=1)
