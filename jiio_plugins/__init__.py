"""Joint inference and input optimisation (JIIO) for deep equilibrium models."""

from jiio_plugins.attacks import attack, is_adversarial
from jiio_plugins.constraints import Box, Constraint, Intersection, L1Ball, L2Ball, LinfBall
from jiio_plugins.diagnosis import Diagnosis, check
from jiio_plugins.envelope import JointSolution, envelope_loss, joint_solution
from jiio_plugins.equilibrium.adjoints import Adjoint, Implicit, JacobianFree, Phantom, Unrolled
from jiio_plugins.equilibrium.cell import Damped
from jiio_plugins.equilibrium.counting import Counter, count_evaluations
from jiio_plugins.equilibrium.foreign import adapt, unadapt
from jiio_plugins.equilibrium.layer import Equilibrium
from jiio_plugins.equilibrium.regularization import jacobian_penalty
from jiio_plugins.equilibrium.solvers import Anderson, Broyden, Picard, Solver, solve_fixed_point
from jiio_plugins.losses import attack_objective
from jiio_plugins.methods.joint import Joint
from jiio_plugins.methods.nested import Nested
from jiio_plugins.optimize import optimize_input
from jiio_plugins.solution import ConvergenceWarning, Solution, Stats, Status

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "Anderson",
    "Box",
    "Broyden",
    "Constraint",
    "ConvergenceWarning",
    "Counter",
    "Damped",
    "Diagnosis",
    "Equilibrium",
    "Implicit",
    "Intersection",
    "JacobianFree",
    "Joint",
    "JointSolution",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "Nested",
    "Phantom",
    "Picard",
    "Solution",
    "Solver",
    "Stats",
    "Status",
    "Unrolled",
    "adapt",
    "attack",
    "attack_objective",
    "check",
    "count_evaluations",
    "envelope_loss",
    "is_adversarial",
    "jacobian_penalty",
    "joint_solution",
    "optimize_input",
    "solve_fixed_point",
    "unadapt",
]
