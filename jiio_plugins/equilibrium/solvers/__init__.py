"""Fixed-point solvers: small frozen dataclasses and one loop that runs them all.

Solves ``z = f(z)`` for every row of a batch by itself. A row stops when
``‖f(z) − z‖ ≤ tol · ‖f(z)‖`` and costs nothing from then on. The iterate that met this is returned.
On a CPU the batch is compacted. On an accelerator the row is frozen, since compacting would make
the host wait.

Where z runs off, ‖f(z)‖ grows until any residual is small beside it, or is rounded away. So a row
stops only once its residual is below ∛tol of its first too, or within the tolerance that held at
the first evaluation. What rounding hides counts as residual there.
"""

from jiio_plugins.equilibrium.solvers.anderson import Anderson, mixing_weights
from jiio_plugins.equilibrium.solvers.base import (
    FlatMap,
    Observed,
    Solver,
    SolverState,
    check_positive,
    check_solver,
)
from jiio_plugins.equilibrium.solvers.broyden import Broyden
from jiio_plugins.equilibrium.solvers.front import solve_fixed_point
from jiio_plugins.equilibrium.solvers.loop import FlatSolution, HostFlag, iterate
from jiio_plugins.equilibrium.solvers.picard import Picard

__all__ = [
    "Anderson",
    "Broyden",
    "FlatMap",
    "FlatSolution",
    "HostFlag",
    "Observed",
    "Picard",
    "Solver",
    "SolverState",
    "check_positive",
    "check_solver",
    "iterate",
    "mixing_weights",
    "solve_fixed_point",
]
