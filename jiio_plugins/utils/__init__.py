"""What is neither mathematics nor data: checks, checkpoints, processes."""

from jiio_plugins.utils.checks import is_count
from jiio_plugins.utils.distributed import launch

__all__ = ["is_count", "launch"]
