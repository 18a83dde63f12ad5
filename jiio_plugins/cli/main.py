"""The console script ``jiio``."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import tyro

from jiio_plugins import __version__
from jiio_plugins.cli.commands import Adapters, Bench, Check, Demo, Evaluate
from jiio_plugins.cli.generative import TrainGenerator
from jiio_plugins.generative.config import FitConfig, SampleConfig
from jiio_plugins.hosts import available_adapters, install_command
from jiio_plugins.utils.signals import one_line_end

DESCRIPTION = (
    "Joint inference and input optimisation of deep equilibrium models: attack and evaluate "
    "classifiers, train generators and fit images with them. jiio --version prints the version."
)

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Adapters, tyro.conf.subcommand("adapters")]
    | Annotated[TrainGenerator, tyro.conf.subcommand("train-generator")]
    | Annotated[SampleConfig, tyro.conf.subcommand("sample")]
    | Annotated[FitConfig, tyro.conf.subcommand("fit")]
)


def main(args: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    words = sys.argv[1:] if args is None else args
    if words == ["--version"]:
        print(f"jiio {__version__}")
        return
    command = tyro.cli(Command, args=words, prog="jiio", description=DESCRIPTION)
    try:
        if isinstance(command, TrainGenerator):
            command = command.read_again(words[1:])
        with one_line_end("jiio", _how_to_go_on(command)):
            run(command)
    except (OSError, ImportError, TypeError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"jiio: {error}") from error


def _how_to_go_on(command: Command) -> str:
    """What is said of a command that a signal ended."""
    if isinstance(command, TrainGenerator):
        return (
            f"the last checkpoint in {command.out}, if there is one, is whole. Go on with --resume"
        )
    return "run the command again, it starts afresh"


def run(command: Command) -> None:
    """Hand the settings to what they are for, which is imported only now."""
    match command:
        case Demo():
            from jiio_plugins.cli.demo import run_demo

            run_demo(command)
        case Evaluate():
            from jiio_plugins.cli.evaluate import run_evaluation

            run_evaluation(command)
        case Bench():
            from jiio_plugins.cli.bench import run_bench

            run_bench(command)
        case Check():
            from jiio_plugins.cli.check import run_check

            run_check(command)
        case Adapters():
            list_adapters()
        case TrainGenerator():
            from jiio_plugins.generative import train

            train(command)
        case SampleConfig():
            from jiio_plugins.generative.sample_run import sample_run

            sample_run(command)
        case FitConfig():
            from jiio_plugins.generative.fit_files import fit_files

            fit_files(command)


def list_adapters() -> None:
    """Each adapter, its import package, and what its host library needs."""
    for name, package in available_adapters().items():
        try:
            importlib.import_module(package)
            state = "ready"
        except ImportError as error:
            state = f"needs {error.name}: {install_command(name)}"
        print(f"{name:14} import {package:20} {state}")


if __name__ == "__main__":
    main()
