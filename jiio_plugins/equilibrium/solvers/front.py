"""The solvers on a map of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers.anderson import Anderson
from jiio_plugins.equilibrium.solvers.loop import iterate
from jiio_plugins.equilibrium.state import Layout
from jiio_plugins.solution import Solution, Stats
from jiio_plugins.utils.checks import check_floating

if TYPE_CHECKING:
    from collections.abc import Callable

    from jiio_plugins.equilibrium.solvers.base import Solver


def solve_fixed_point(f: Callable[[Any], Any], z0: Any, solver: Solver | None = None) -> Solution:
    """Solve ``z = f(z)`` for every row of a batch.

    Args:
        f: maps a state to a state of the same shape, row by row.
        z0: where to start: a tensor ``(rows, ...)`` or a tuple of such tensors.
        solver: :class:`Anderson` (default), :class:`Picard` or :class:`Broyden`.

    Returns:
        A :class:`Solution` with ``z``, ``status`` and ``stats``. ``z`` of a row is the iterate that
        met the tolerance, or where none did the one of least residual. The other fields, ``x``,
        ``costate``, ``value`` and ``output``, are None.

    Raises:
        ValueError: f returns another shape than it was given.
        TypeError: z0 is not a tensor or tuple of floating-point tensors.

    Example:
        >>> solution = solve_fixed_point(torch.cos, torch.zeros(1, 1))
        >>> print(f"cos({solution.z.item():.4f}) = {solution.z.cos().item():.4f}")
        cos(0.7391) = 0.7391

    Not for: gradients. :class:`jiio_plugins.Equilibrium` has them.
    """
    layout = Layout.of(z0)
    flat0 = layout.pack(z0)
    check_floating(flat0, "z0")

    def flat_f(z: Tensor) -> Tensor:
        out = f(layout.unpack(z))
        layout.check(out, len(z), "the output of f")
        return layout.pack(out)

    result = iterate(flat_f, flat0, solver or Anderson())
    stats = Stats(
        f_evals=result.evals,
        vjps=torch.zeros_like(result.evals),
        iterations=result.evals,
        z_residual=result.residual,
    )
    z = layout.unpack(result.z)
    return Solution(None, z, None, None, result.status, stats)
