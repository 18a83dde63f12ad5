"""The commands of generators: their settings, and what the command line adds to them."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from jiio_plugins.cli.commands import Output
from jiio_plugins.generative.config import FitConfig, SampleConfig, TrainConfig, config_of


@dataclass(frozen=True)
class Sample(Output, SampleConfig):  # noqa: D101
    __doc__ = SampleConfig.__doc__  # the help text


@dataclass(frozen=True)
class Fit(Output, FitConfig):  # noqa: D101
    __doc__ = FitConfig.__doc__


@dataclass(frozen=True)
class TrainGenerator(Output, TrainConfig):
    """Train a generator by fitting each image's latent inside the training step.

    On several GPUs: torchrun --nproc-per-node N -m jiio_plugins train-generator ...
    """

    @classmethod
    def parsed(cls, words: list[str]) -> TrainGenerator:
        """With --resume: the words on top of the run's settings, not on top of the defaults.

        Args:
            words: of the command line, without the command.

        Raises:
            FileNotFoundError: there is no run to go on with.
            SystemExit: after the help, or for what is no option.
        """
        where, _ = tyro.cli(_Where, args=words, return_unknown_args=True, add_help=False)
        prog = "jiio train-generator"
        if not where.resume or where.out is None or {"-h", "--help"} & {*words}:
            return tyro.cli(cls, args=words, prog=prog)
        return tyro.cli(Resumed, args=words, default=Resumed.read(config_of(where.out)), prog=prog)


def run_training(command: TrainGenerator) -> dict[str, Any] | None:
    """Train. One process of several has the result."""
    from jiio_plugins.generative import train

    done = train(command)
    if int(os.environ.get("RANK", "0")):
        return None
    return {"out": done.out, "steps": done.steps, "held-out PSNR": done.psnr}


@dataclass(frozen=True)
class _Where:
    """The run that is to go on, if one is."""

    out: Path | None = None
    resume: bool = False


class Resumed(TrainGenerator):
    """All of its settings are as the run has them, or were given."""

    def given(self) -> dict[str, Any]:
        """All settings."""
        return {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
