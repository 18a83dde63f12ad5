"""The equilibrium layer: cell, state, solvers, and how gradients pass the fixed point."""

from jiio_plugins.equilibrium.adjoints import Adjoint, Implicit, JacobianFree, Phantom, Unrolled
from jiio_plugins.equilibrium.cell import CellMap
from jiio_plugins.equilibrium.counting import Counter, count_evaluations
from jiio_plugins.equilibrium.layer import Equilibrium, EquilibriumLayer
from jiio_plugins.equilibrium.regularization import jacobian_penalty
from jiio_plugins.equilibrium.solvers import Anderson, Broyden, Picard, Solver, solve_fixed_point
from jiio_plugins.equilibrium.state import Layout, StateLayout

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "CellMap",
    "Counter",
    "Equilibrium",
    "EquilibriumLayer",
    "Implicit",
    "JacobianFree",
    "Layout",
    "Phantom",
    "Picard",
    "Solver",
    "StateLayout",
    "Unrolled",
    "count_evaluations",
    "jacobian_penalty",
    "solve_fixed_point",
]
