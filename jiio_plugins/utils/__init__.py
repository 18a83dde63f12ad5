"""What is neither mathematics nor data: checks, checkpoints, random states, processes."""

from jiio_plugins.utils.checkpoint import TrainingState
from jiio_plugins.utils.checks import is_count
from jiio_plugins.utils.distributed import launch
from jiio_plugins.utils.randomness import set_random_states

__all__ = ["TrainingState", "is_count", "launch", "set_random_states"]
