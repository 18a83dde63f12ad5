"""A small run, in this process or as a command, and what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.generative import Architecture, TrainConfig
from jiio_plugins.generative.files import CHECKPOINT
from jiio_plugins.utils import checkpoint
from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Architecture(latent=(4,), channels=(4, 4), stride=1)
OPTIONS = [
    "--data=digits",
    "--batch-size=16",
    "--steps=12",
    "--iterations=3",
    "--warmup=2",
    "--step-size=0.3",
    "--model.latent",
    "4",
    "--model.channels",
    "4",
    "4",
    "--checkpoint-every=2",
    "--checkpoint-seconds=3600",
    "--pictures-seconds=3600",
    "--accelerator=cpu",
    "--latents-kept=64",
]


def config(out: Path, **kw: Any) -> TrainConfig:
    base = TrainConfig(
        data="digits",
        out=out,
        model=SMALL,
        batch_size=16,
        steps=4,
        iterations=3,
        warmup=2,
        step_size=0.3,
        accelerator="cpu",
        checkpoint_every=2,
        checkpoint_seconds=3600,
        pictures_seconds=3600,
        latents_kept=64,
    )
    return replace(base, **kw)


def run(out: Path, *extra: str, launcher: tuple[str, ...] = ("-m", "jiio_plugins")) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    command = [sys.executable, *launcher, "train-generator", "--out", str(out), *OPTIONS, *extra]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def states(out: Path) -> dict[str, Any]:
    return checkpoint.read(out / CHECKPOINT)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
