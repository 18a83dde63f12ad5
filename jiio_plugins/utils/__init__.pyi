from .checkpoint import TrainingState
from .checks import is_count
from .distributed import launch
from .files import write_json
from .randomness import set_random_states
from .trees import leaves, map_leaves

__all__ = [
    "TrainingState",
    "is_count",
    "launch",
    "leaves",
    "map_leaves",
    "set_random_states",
    "write_json",
]
