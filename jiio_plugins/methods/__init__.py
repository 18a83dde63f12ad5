"""Ways to move the variable: the one loop, and what each method does between two of its steps."""

from jiio_plugins.methods.backpropagated import Backpropagated
from jiio_plugins.methods.base import Callback, Method, Progress, Stop
from jiio_plugins.methods.joint import Joint
from jiio_plugins.methods.nested import Nested

__all__ = ["Backpropagated", "Callback", "Joint", "Method", "Nested", "Progress", "Stop"]
