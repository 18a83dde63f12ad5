"""When a training writes something, how long it still takes, and where its figures are logged."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jiio_plugins.generative.config import LoggerName

_SHARE = 10  # what is done by the clock may take one part in so many of the time


class Every:
    """Something done every so many steps, and by the clock where steps are slow.

    Args:
        steps: between two times.
        seconds: after which it is done whatever the step. It is longer where doing it takes more
            than a tenth of that.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.last, self.took = time.monotonic(), 0.0

    def due(self, step: int) -> bool:
        """Whether it is to be done after this step."""
        waited = time.monotonic() - self.last
        return step % self.steps == 0 or waited >= max(self.seconds, _SHARE * self.took)

    @contextmanager
    def doing(self) -> Iterator[None]:
        """The block does it."""
        start = time.monotonic()
        yield
        self.last = time.monotonic()
        self.took = self.last - start


def duration(seconds: float) -> str:
    """In words, to two digits or so: "40 s", "12 min", "2.6 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def open_logger(name: LoggerName, out: Path, step: int) -> Any:
    """A logger of lightning-fabric's interface.

    Args:
        name: tensorboard, or wandb for Weights & Biases.
        out: folder of the run.
        step: what is logged beyond it is from a run that was killed.

    Raises:
        ModuleNotFoundError: its library is missing. The message says what to install.
    """
    try:
        if name == "wandb":
            from pytorch_lightning.loggers import WandbLogger

            return WandbLogger(project="jiio", name=out.name, save_dir=out)
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(out, name="", version="", purge_step=step or None)
    except ModuleNotFoundError as error:
        extra = "wandb" if name == "wandb" else "generative"
        raise ModuleNotFoundError(
            f"--loggers {name} needs a library that is not installed ({error}): "
            f"pip install 'jiio-plugins[{extra}]'"
        ) from error
