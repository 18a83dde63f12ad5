"""Settings of the commands: each field is an option, its docstring the help text.

Nothing here runs anything: ``jiio --help`` needs no more than this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

_EPS = {  # of data sets with shipped weights; for the others what is usual for CIFAR-10
    "digits": {"2": 0.5, "inf": 0.1, "1": 3.0},
    "fashion-mnist": {"2": 1.0, "inf": 0.03, "1": 10.0},
}


_USUAL = {"2": 0.5, "inf": 8 / 255, "1": 12.0}


def default_eps(dataset: str, norm: str) -> float:
    """Radius of the ball where none is given.

    Args:
        dataset: as the command has it.
        norm: of the ball.
    """
    return _EPS.get(dataset, _USUAL)[norm]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What all commands have in common."""

    quiet: bool = False
    """print the result alone, and nothing while it is found"""
    json: bool = False
    """print the result as one JSON object on stdout; all else goes to stderr"""


@dataclass(frozen=True, kw_only=True)
class Writing(Output):
    """Commands that leave files in a folder of their own."""

    overwrite: bool = False
    """replace the results that an earlier run left in --out"""


@dataclass(frozen=True)
class OnImages:
    """What Demo, Evaluate, Bench and Check have in common."""

    weights: str | None = None
    """shipped weights (digits, fashion-mnist) or a .safetensors file; default: those for the data
    set, or what --model returns"""
    model: str | None = None
    """your own classifier: module:function, which returns it; --weights are loaded into it"""
    dataset: str | None = None
    """what to attack it on: digits, fashion-mnist, mnist, cifar-10, cifar-100, svhn, celeba, a
    folder with a subfolder for each class, an .npz file with x and y, or module:function, which
    returns both; default: what the weights are for"""
    folder: Annotated[Path, tyro.conf.arg(aliases=["--data"])] = Path("data")
    """where a named data set lies: torchvision's root, or Debian's of Fashion-MNIST; --data is the
    same"""
    resize: int | None = None
    """crop image files to their central square and scale it to so many pixels"""
    normalize: tuple[float, ...] = ()
    """what the model is to see: means, then standard deviations, one a channel or one for all, of
    pixels in [0, 1]; images, radius and box stay in pixels"""
    output: str | None = None
    """where the model returns more than logits: which of it they are, a key, an attribute or an
    index; default: what is called logits, or the first"""
    images: int = 128
    """test images, from the first on; of a folder, drawn by a fixed permutation"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True)
class Check(Writing, OnImages):
    """What a model is like, before anything is run on it: a page of sentences, JSON, a picture."""

    images: int = 8
    """test images, from the first on; of a folder, drawn by a fixed permutation"""
    out: Path = Path("out/check")
    """where the JSON and the picture go"""


@dataclass(frozen=True)
class OnClassifier(OnImages):
    """What Demo, Evaluate and Bench have in common."""

    norm: Literal["2", "inf", "1"] = "2"
    """norm of the ball"""


@dataclass(frozen=True)
class Demo(Writing, OnClassifier):
    """Attack a trained DEQ classifier from inside ART: JIIO beside ART's own PGD."""

    out: Path = Path("out/demo")
    """where pictures and JSON go"""
    eps: float | None = None
    """radius; default: 0.5 (digits, L2), 1.0 (fashion-mnist, L2), 0.1 / 0.03 (L∞), 3 / 10 (L1), for
    others 0.5, 8/255, 12"""


@dataclass(frozen=True)
class Evaluate(Writing, OnClassifier):
    """Robust accuracy of a DEQ classifier: a suite of attacks, judged by converged solves."""

    out: Path = Path("out/evaluate")
    """where the JSON and the plot go"""
    images: int = 500
    """test images, from the first on; of a folder, drawn by a fixed permutation"""
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


@dataclass(frozen=True)
class Bench(Writing, OnClassifier):
    """What JIIO costs on a classifier, beside nested PGD at its strongest settings."""

    out: Path = Path("out/bench")
    """where the JSON and the plot go"""
    eps: float | None = None
    """radius; default: that of jiio demo"""
    sweep: bool = True
    """run the warm-started nested loop at every setting, for its strongest"""
    repeats: int = 3
    """times the compared rows are run for their seconds"""
    threads: int | None = None
    """of torch; default: its own choice"""


@dataclass(frozen=True)
class Adapters(Output):
    """List the adapters and whether their host library is installed."""
