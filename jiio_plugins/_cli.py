"""The console script ``jiio``."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jiio_plugins import __version__
from jiio_plugins._cli_generative import FitImages, Sample, TrainGenerator
from jiio_plugins.adapters import available_adapters


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
    seed: int = 0

    def run(self) -> None:
        """Do it."""
        from jiio_plugins._demo import run_demo

        run_demo(self.dataset, self.data, self.out, self.images, float(self.norm), self.eps)


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
                state = f"needs {error.name}: pip install 'jiio-plugins[{name}]'"
            print(f"{name:14} import {package:20} {state}")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
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
    command = tyro.cli(Command, args=words, prog="jiio", description=__doc__)
    try:
        command.run()
    except (OSError, ImportError, ValueError) as error:
        raise SystemExit(f"jiio: {error}") from error


if __name__ == "__main__":
    main()
