"""examples/train_fewshot.py: resuming, and several processes, give the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from jiio_plugins.utils import checkpoint
from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SMALL = [
    "--steps",
    "3",
    "--tasks",
    "2",
    "--test-tasks",
    "1",
    "--iters",
    "4",
    "--first-order",
    "--device",
    "cpu",
    "--checkpoint-every",
    "1",
]


def start(folder: Path, out: str, *extra: str, processes: int = 0) -> str:
    """Run the script; a ``ClassImages`` cache is shared through the environment."""
    script = str(ROOT / "examples" / "train_fewshot.py")
    launch = [sys.executable, script]
    if processes:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            script,
        ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")]),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    run = subprocess.run(
        [*launch, *SMALL, "--out", out, *extra],
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared with the examples' test, so that the glyphs are drawn once."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a run without interruption, on one process."""
    start(folder, "straight")
    return load_file(folder / "straight" / "fewshot.safetensors")


@pytest.mark.slow
def test_resuming_is_exact(folder: Path, straight: dict[str, torch.Tensor]) -> None:
    assert "stopped after step 1 of 3" in start(folder, "resumed", "--stop-after", "1")
    state = checkpoint.read(folder / "resumed" / "checkpoint.pt")
    assert state["progress"]["step"] == 1
    start(folder, "resumed")
    resumed = load_file(folder / "resumed" / "fewshot.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert not list((folder / "resumed").glob("*.tmp"))


@pytest.mark.slow
def test_two_processes_train_the_same_weights(
    folder: Path, straight: dict[str, torch.Tensor]
) -> None:
    start(folder, "two", processes=2)  # it raises where the two end with different weights
    two = load_file(folder / "two" / "fewshot.safetensors")
    for name, weight in straight.items():
        assert torch.allclose(two[name], weight, atol=1e-5), name
