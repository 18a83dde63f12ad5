"""Ways to move the variable: the one loop, and what each method does between two of its steps."""

from jiio_plugins.methods.backpropagated import (
    Backpropagated,
    through_intermediate,
    through_unrolled,
)
from jiio_plugins.methods.base import Method, solve
from jiio_plugins.methods.joint import Joint, check_method
from jiio_plugins.methods.nested import Nested
from jiio_plugins.methods.records import Callback, Evaluation, MethodResult, Progress, Stop
from jiio_plugins.methods.round import Iteration

__all__ = [
    "Backpropagated",
    "Callback",
    "Evaluation",
    "Iteration",
    "Joint",
    "Method",
    "MethodResult",
    "Nested",
    "Progress",
    "Stop",
    "check_method",
    "solve",
    "through_intermediate",
    "through_unrolled",
]
