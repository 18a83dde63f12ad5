"""Settings of the commands: each field is an option, its docstring the help text.

Nothing here runs anything: ``jiio --help`` needs no more than this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_EPS = {
    "digits": {"2": 0.5, "inf": 0.1, "1": 3.0},
    "fashion-mnist": {"2": 1.0, "inf": 0.03, "1": 10.0},
}


def default_eps(dataset: str, norm: str) -> float:
    """Radius of the ball where none is given."""
    return _EPS[dataset][norm]


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class OnClassifier:
    """What Evaluate and Bench have in common."""

    weights: str = "digits"
    """shipped weights (digits, fashion-mnist) or a .safetensors file"""
    model: str | None = None
    """your own classifier: module:function, which returns it; a --weights FILE is loaded into it"""
    dataset: Literal["digits", "fashion-mnist"] | None = None
    """what to attack it on; default: what the weights are for"""
    data: Path = Path("data")
    """folder of Fashion-MNIST: torchvision's root, or Debian's"""


@dataclass(frozen=True)
class Evaluate(OnClassifier):
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


@dataclass(frozen=True)
class Bench(OnClassifier):
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


@dataclass(frozen=True)
class Adapters:
    """List the adapters and whether their host library is installed."""
