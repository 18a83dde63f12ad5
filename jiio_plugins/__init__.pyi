from .attacks import attack, is_adversarial
from .constraints import Box, Constraint, Intersection, L1Ball, L2Ball, LinfBall
from .diagnosis import Diagnosis, check
from .envelope import JointSolution, envelope_loss, joint_solution
from .equilibrium.adjoints import Adjoint, Implicit, JacobianFree, Phantom, Unrolled
from .equilibrium.cell import Damped
from .equilibrium.counting import Counter, count_evaluations
from .equilibrium.foreign import adapt, unadapt
from .equilibrium.layer import Equilibrium
from .equilibrium.regularization import jacobian_penalty
from .equilibrium.solvers import Anderson, Broyden, Picard, Solver, solve_fixed_point
from .losses import attack_objective
from .methods.joint import Joint
from .methods.nested import Nested
from .optimize import optimize_input
from .solution import ConvergenceWarning, Solution, Stats, Status

__version__: str

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
