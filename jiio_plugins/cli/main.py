"""The console script ``jiio``."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import tyro

from jiio_plugins import __version__
from jiio_plugins.cli.commands import Adapters, Bench, Check, Demo, Evaluate
from jiio_plugins.cli.generative import Fit, Sample, TrainGenerator
from jiio_plugins.hosts import available_adapters, install_command, load_adapter
from jiio_plugins.utils.builds import SAME_PLACE, OtherBuildError
from jiio_plugins.utils.console import quietly
from jiio_plugins.utils.files import as_json
from jiio_plugins.utils.signals import one_line_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DESCRIPTION = (
    "Joint inference and input optimisation of deep equilibrium models: attack and evaluate "
    "classifiers, train generators and fit images with them. jiio --version prints the version."
)

Command = Demo | Evaluate | Bench | Check | Adapters | TrainGenerator | Sample | Fit
COMMANDS: dict[str, Callable[..., Command]] = {
    "demo": Demo,
    "evaluate": Evaluate,
    "bench": Bench,
    "check": Check,
    "adapters": Adapters,
    "train-generator": TrainGenerator,
    "sample": Sample,
    "fit": Fit,
}
# modules that the extra cli brings
_OF_EXTRA = {
    "PIL",
    "art",
    "lightning_fabric",
    "matplotlib",
    "sklearn",
    "tensorboard",
    "torchattacks",
    "torchmetrics",
}


def main(args: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    words = sys.argv[1:] if args is None else args
    # torch comes later, and reads it then: threads that wait for each other in a loop take twenty
    # times as long on cores that something else runs on
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if words == ["--version"]:
        print(f"jiio {__version__}")
        return
    try:
        command = parsed(words)
        with one_line_end("jiio", _how_to_go_on(command)), _said(command):
            record = run(command)
        if command.json and record is not None:
            print(as_json(record))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OF_EXTRA:
            raise SystemExit(f"jiio: {error}") from error
        raise SystemExit(
            f"jiio: {words[0]} needs {missing}, which is not installed: pip install "
            "'jiio-plugins[cli]' brings what all commands need"
        ) from error
    except BrokenPipeError:  # what reads it, head for instance, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (OSError, ImportError, TypeError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"jiio: {error}") from error


def parsed(words: list[str]) -> Command:
    """The command that is asked for, with its settings.

    One that is named is parsed by itself: what is said of a misspelt option is about its own.

    Args:
        words: of the command line. Where there are none the help is shown.

    Raises:
        SystemExit: after the help, or for what is no command or no option of it.
    """
    kind = COMMANDS.get(words[0]) if words else None
    if kind is TrainGenerator:
        return TrainGenerator.parsed(words[1:])
    if kind is not None:
        return tyro.cli(kind, args=words[1:], prog=f"jiio {words[0]}")
    command: Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=words or ["--help"], prog="jiio", description=DESCRIPTION
    )
    return command


@contextmanager
def _said(command: Command) -> Iterator[None]:
    """Where what a command says goes. With --json stdout is for the one object alone."""
    with ExitStack() as stack:
        stack.enter_context(quietly(command.quiet))
        if command.json:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere if command.quiet else sys.stderr))
        yield


def _how_to_go_on(command: Command) -> str:
    """What is said of a command that a signal ended."""
    if isinstance(command, TrainGenerator):
        return (
            f"the last checkpoint in {command.out}, if there is one, is whole. Go on with "
            "the same command and --resume"
        )
    again = "run the command again, it starts afresh"
    writes = hasattr(command, "overwrite")
    return f"{again}, with --overwrite if it has written results" if writes else again


def run(command: Command) -> dict[str, Any] | None:
    """Hand the settings to what they are for, which is imported only now.

    Returns:
        The result in plain values. None: another process has it.
    """
    match command:
        case Demo():
            from jiio_plugins.cli.demo import run_demo

            return run_demo(command)
        case Evaluate():
            from jiio_plugins.cli.evaluate import run_evaluation

            return run_evaluation(command)
        case Bench():
            from jiio_plugins.cli.bench import run_bench

            return run_bench(command)
        case Check():
            from jiio_plugins.cli.check import run_check

            return run_check(command)
        case Adapters():
            return list_adapters()
        case TrainGenerator():
            from jiio_plugins.cli.generative import run_training

            return run_training(command)
        case Sample():
            from jiio_plugins.generative.sample_run import sample_run

            return sample_run(command)
        case Fit():
            from jiio_plugins.generative.fit_files import fit_files

            return fit_files(command)


def list_adapters() -> dict[str, Any]:
    """Print each adapter, its import package, and what its host library needs."""
    found: dict[str, Any] = {}
    for name, package in available_adapters().items():
        found[name] = {"package": package, "ready": True}
        state = "ready"
        try:
            load_adapter(name)
        except ImportError as error:
            install = SAME_PLACE if isinstance(error, OtherBuildError) else install_command(name)
            found[name] |= {"ready": False, "needs": error.name, "install": install}
            state = f"needs {error.name}: {install}"
        print(f"{name:14} import {package:20} {state}")
    return {"adapters": found}


if __name__ == "__main__":
    main()
