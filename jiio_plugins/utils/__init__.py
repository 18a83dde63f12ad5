"""What is neither mathematics nor data: checks, checkpoints, random states, processes, trees."""

from jiio_plugins.utils.checkpoint import TrainingState
from jiio_plugins.utils.checks import is_count
from jiio_plugins.utils.distributed import launch
from jiio_plugins.utils.randomness import set_random_states
from jiio_plugins.utils.trees import leaves, map_leaves

__all__ = ["TrainingState", "is_count", "launch", "leaves", "map_leaves", "set_random_states"]
