"""The equilibrium layer: cell, state, solvers, and how gradients pass the fixed point."""

from jiio_plugins.equilibrium.adjoints import (
    Adjoint,
    Implicit,
    JacobianFree,
    Phantom,
    Unrolled,
    implicit_gate,
)
from jiio_plugins.equilibrium.batch import check_states, on_rows, rows_back, rows_first
from jiio_plugins.equilibrium.cell import CellMap, Damped
from jiio_plugins.equilibrium.compiling import never_compiled, uncompiled
from jiio_plugins.equilibrium.counting import (
    Cost,
    Counter,
    count,
    count_evaluations,
    count_rows,
    counting_into,
    open_counters,
)
from jiio_plugins.equilibrium.hosted import (
    HostedLayer,
    HostedRules,
    OwnSolve,
    counted,
    put_back,
    take_in,
    with_gradient,
)
from jiio_plugins.equilibrium.layer import Equilibrium, EquilibriumLayer, full_precision_state
from jiio_plugins.equilibrium.regularization import jacobian_penalty
from jiio_plugins.equilibrium.solvers import (
    Anderson,
    Broyden,
    Picard,
    Solver,
    check_solver,
    solve_fixed_point,
)
from jiio_plugins.equilibrium.state import Layout, StateLayout, as_tensors, full_precision

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "CellMap",
    "Cost",
    "Counter",
    "Damped",
    "Equilibrium",
    "EquilibriumLayer",
    "HostedLayer",
    "HostedRules",
    "Implicit",
    "JacobianFree",
    "Layout",
    "OwnSolve",
    "Phantom",
    "Picard",
    "Solver",
    "StateLayout",
    "Unrolled",
    "as_tensors",
    "check_solver",
    "check_states",
    "count",
    "count_evaluations",
    "count_rows",
    "counted",
    "counting_into",
    "full_precision",
    "full_precision_state",
    "implicit_gate",
    "jacobian_penalty",
    "never_compiled",
    "on_rows",
    "open_counters",
    "put_back",
    "rows_back",
    "rows_first",
    "solve_fixed_point",
    "take_in",
    "uncompiled",
    "with_gradient",
]
