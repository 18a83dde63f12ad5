"""Every script in examples/ runs, from any folder, on the data that scikit-learn brings."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))

ARGUMENTS = {  # a small run where the default one takes long
    "art_adversarial_training.py": ["--images", "100", "--test-images", "20", "--epochs", "1"],
    "distributed_training.py": ["--images", "100", "--epochs", "1"],
    "art_attack.py": ["--images", "10"],
    "deepinv_inverse_problems.py": ["--images", "2", "--iters", "10"],
    "deepinv_end_to_end.py": ["--patches", "32", "--guess-epochs", "2", "--epochs", "1"],
    "learn2learn_fewshot.py": ["--iterations", "2", "--meta-batch-size", "2"],
    "learn2learn_sinusoid.py": ["--iterations", "5", "--meta-batch-size", "2"],
    "torchattacks_attack.py": ["--images", "10"],
    "torchdeq_attack.py": ["--images", "10", "--epochs", "2"],
    "train_generator.py": ["--steps", "5"],
    "train_fewshot.py": ["--steps", "2", "--tasks", "2", "--test-tasks", "2"],
    "train_features.py": ["--data", "digits", "--epochs", "1", "--out", "features.safetensors"],
    "train_classifier.py": ["--epochs", "1", "--train-size", "200", "--out", "weights.safetensors"],
}
PRINTS = {
    "art_adversarial_training.py": ["before: clean accuracy", "after: clean accuracy"],
    "distributed_training.py": ["right under attack", "1 processes"],
    "art_attack.py": ["clean accuracy", "JIIO"],
    "deepinv_inverse_problems.py": ["denoising", "Poisson", "saved"],
    "deepinv_end_to_end.py": ["the encoder's guess", "JIIO", "saved"],
    "learn2learn_fewshot.py": ["iteration", "valid", "unseen scripts: accuracy"],
    "learn2learn_sinusoid.py": ["before", "after"],
    "torchattacks_attack.py": ["clean accuracy", "JIIO"],
    "torchdeq_attack.py": ["clean accuracy", "JIIO"],
    "train_generator.py": ["100 held-out digits"],
    "train_features.py": ["% of 500 test images"],
    "train_fewshot.py": ["tasks of unseen classes"],
    "your_own_deq.py": ["clean", "adversarial", "CONVERGED"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example(script: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"),  # glyphs are drawn once
    }
    run = subprocess.run(
        [sys.executable, str(script), *ARGUMENTS.get(script.name, [])],
        cwd=tmp_path,
        env=environment,
        timeout=300,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout
    assert "Warning" not in run.stdout, run.stdout
    for words in PRINTS.get(script.name, []):
        assert words in run.stdout, run.stdout
    if script.name == "train_classifier.py":
        assert (tmp_path / "weights.safetensors").stat().st_size > 10_000


def test_there_are_examples() -> None:
    names = {script.name for script in SCRIPTS}
    assert names >= {*ARGUMENTS, *PRINTS}
