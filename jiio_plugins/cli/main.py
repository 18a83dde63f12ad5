"""The console script ``jiio``."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jiio_plugins import __version__
from jiio_plugins.cli.generative import FitImages, Sample, TrainGenerator
from jiio_plugins.hosts import available_adapters, install_command

DESCRIPTION = (
    "Joint inference and input optimisation of deep equilibrium models: attack and evaluate "
    "classifiers, train generators and fit images with them. jiio --version prints the version."
)


@dataclass
class Demo:
    """Attack a trained DEQ classifier from inside ART: JIIO beside ART's own PGD."""

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    """digits comes with scikit-learn; fashion-mnist needs --data"""
    data: Path = Path("data")
    """folder of Fashion-MNIST: torchvision's root, or Debian's"""
    out: Path = Path("out/demo")
    """where pictures and JSON go"""
    images: int = 128
    """test images to attack"""
    norm: Literal["2", "inf", "1"] = "2"
    """norm of the ball"""
    eps: float | None = None
    """radius; default: 0.5 (digits, L2), 1.0 (fashion-mnist, L2), 0.1 / 0.03 (L∞), 3 / 10 (L1)"""

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.cli.demo import run_demo

        run_demo(self.dataset, self.data, self.out, self.images, float(self.norm), self.eps)


@dataclass
class _OnClassifier:
    weights: str = "digits"
    """shipped weights (digits, fashion-mnist) or a .safetensors file"""
    model: str | None = None
    """your own classifier: module:function, which returns it; a --weights FILE is loaded into it"""
    dataset: Literal["digits", "fashion-mnist"] | None = None
    """what to attack it on; default: what the weights are for"""
    data: Path = Path("data")
    """folder of Fashion-MNIST: torchvision's root, or Debian's"""


@dataclass
class Evaluate(_OnClassifier):
    """Robust accuracy of a DEQ classifier: a suite of attacks, judged by converged solves."""

    out: Path = Path("out/evaluate")
    """where the JSON and the plot go"""
    images: int = 500
    """test images, from the first on"""
    norm: Literal["2", "inf", "1"] = "2"
    """norm of the ball; 1 needs --suite quick"""
    eps: tuple[float, ...] = ()
    """radii; default: a half and the whole of what jiio demo takes"""
    suite: Literal["default", "quick"] = "default"
    """default needs torchattacks"""
    steps: int = 20
    """gradient steps of APGD, half of them of PGD; 100 for a result to be published"""
    queries: int = 50
    """queries of Square; 1000 or more for a result to be published"""
    batch_size: int = 128
    audit: int = 48
    """images the gradients are audited on, at the first radius; 0 switches it off"""
    seed: int = 0
    """of random starts and of Square"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.cli.evaluate import run_evaluation

        run_evaluation(**vars(self))


@dataclass
class Bench(_OnClassifier):
    """What JIIO costs on a classifier, beside nested PGD at its strongest settings."""

    out: Path = Path("out/bench")
    """where the JSON and the plot go"""
    images: int = 128
    """test images, from the first on"""
    norm: Literal["2", "inf", "1"] = "2"
    """norm of the ball"""
    eps: float | None = None
    """radius; default: that of jiio demo"""
    sweep: bool = True
    """run the 81 settings of the warm-started nested loop"""
    repeats: int = 3
    """times the compared rows are run for their seconds"""
    threads: int | None = None
    """of torch; default: its own choice"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.cli.bench import run_bench

        run_bench(**vars(self))


@dataclass
class Adapters:
    """List the adapters and whether their host library is installed."""

    def run(self) -> None:
        """Do it."""
        for name, package in available_adapters().items():
            try:
                importlib.import_module(package)
                state = "ready"
            except ImportError as error:
                state = f"needs {error.name}: {install_command(name)}"
            print(f"{name:14} import {package:20} {state}")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Adapters, tyro.conf.subcommand("adapters")]
    | Annotated[TrainGenerator, tyro.conf.subcommand("train-generator")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[FitImages, tyro.conf.subcommand("fit")]
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
        command.run()
    except (OSError, ImportError, TypeError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"jiio: {error}") from error


if __name__ == "__main__":
    main()
