"""``jiio train-generator``, whose settings may be those of a run that goes on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import tyro

from jiio_plugins.generative.config import CONFIG, TrainConfig


@dataclass(frozen=True)
class TrainGenerator(TrainConfig):
    """Train a generator by fitting each image's latent inside the training step.

    On several GPUs: torchrun --nproc-per-node N -m jiio_plugins train-generator ...
    """

    def read_again(self, words: list[str]) -> TrainGenerator:
        """With --resume: the words on top of the run's settings, not on top of the defaults."""
        path = self.out / CONFIG
        if not self.resume or not path.is_file():
            return self
        saved = Resumed.read(path)
        return tyro.cli(Resumed, args=words, default=saved, prog="jiio train-generator")


class Resumed(TrainGenerator):
    """All of its settings are as the run has them, or were given."""

    def given(self) -> dict[str, Any]:
        """All settings."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
