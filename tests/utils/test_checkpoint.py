"""A killed training ends where it would have, and no checkpoint is lost or taken for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jiio_plugins import Joint
from jiio_plugins.adversarial.batches import TensorBatches
from jiio_plugins.adversarial.step import AdversarialTraining
from jiio_plugins.utils import checkpoint
from jiio_plugins.utils.files import owning
from tests.adversarial.helpers import (
    SCHEDULERS,
    TRAINING,
    Bomb,
    StoppedError,
    assert_equal_weights,
    build,
    train,
)
from tests.helpers import ROOT

# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resumed_with_any_scheduler_it_ends_bit_by_bit_where_it_would_have(
    name: str, tmp_path: Path
) -> None:
    options = {
        "scheduler": name,
        "scheduler_interval": "step" if name == "OneCycleLR" else "epoch",
    }
    whole, parts, path = build(), build(), tmp_path / "run.pt"
    expected = train(whole, **options)
    kept = {"checkpoint": path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(StoppedError):
        train(parts, batches=Bomb, **options, **kept)
    fresh = build(seed=7)  # what it holds before does not matter
    history = train(fresh, **options, **kept)
    assert_equal_weights(whole, fresh)
    assert history == expected
    assert not list(tmp_path.glob("*.tmp"))


# under so much dropout some rows have no fixed point to speak of
@pytest.mark.filterwarnings("ignore::jiio_plugins.ConvergenceWarning")
def test_resumed_with_everything_random_switched_on(tmp_path: Path) -> None:
    """Dropout in the encoder, random starts, the penalty and TRADES."""
    training = AdversarialTraining(
        norm=2,
        eps=0.3,
        method=Joint(max_iter=2),
        random_start=True,
        jacobian_weight=1.0,
        trades=2.0,
    )
    models = [build(dropout=0.3) for _ in range(3)]
    path = tmp_path / "run.pt"
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        train(models[0], training=training)
        torch.manual_seed(5)
        kept = {"checkpoint": path, "checkpoint_every": 3, "resume": True, "training": training}
        with pytest.raises(StoppedError):
            train(models[1], batches=Bomb, **kept)
        torch.manual_seed(99)  # as in another process
        train(models[2], **kept)
    assert_equal_weights(models[0], models[2])


SCRIPT = """
    import sys, torch
    from safetensors.torch import save_file
    from tests.adversarial.helpers import build, train

    torch.set_num_threads(1)
    model = build(dropout=0.2)
    torch.manual_seed(3)
    train(
        model, epochs=4, scheduler="StepLR", checkpoint=sys.argv[2], checkpoint_every=1,
        resume=True,
    )
    save_file(model.state_dict(), sys.argv[1])
"""


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, as often as it takes to hit several moments of writing and computing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }

    path = tmp_path / "run.pt"

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(tmp_path / out), str(path)]
        return subprocess.Popen(command, env=environment)

    whole = build(dropout=0.2)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        train(whole, epochs=4, scheduler="StepLR")
    steps = []
    for wanted in (2, 7):
        process = start("killed.safetensors")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists():
                progress = checkpoint.read(path)["progress"]  # whole at any moment
                done = 4 * progress["epoch"] + progress["step"]
                if done >= wanted:
                    break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        progress = checkpoint.read(path)["progress"]
        steps.append(4 * progress["epoch"] + progress["step"])
    assert 2 <= steps[0] < steps[1] < 16
    assert not (tmp_path / "killed.safetensors").exists()
    assert start("resumed.safetensors").wait(timeout=120) == 0
    resumed = build(dropout=0.2)
    resumed.load_state_dict(load_file(tmp_path / "resumed.safetensors"))
    assert_equal_weights(whole, resumed)


def test_a_finished_training_resumed_does_nothing_and_can_be_prolonged(tmp_path: Path) -> None:
    whole, model, path = build(), build(), tmp_path / "run.pt"
    train(model, epochs=2, checkpoint=path)
    before = path.read_bytes()
    again = build(seed=7)
    assert len(train(again, epochs=2, checkpoint=path, resume=True)) == 2
    assert_equal_weights(model, again)
    assert path.read_bytes() == before
    train(again, epochs=3, checkpoint=path, resume=True)
    train(whole, epochs=3)
    assert_equal_weights(whole, again)


def test_settings_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    training = replace(TRAINING, eps=np.float64(0.3))
    train(build(), epochs=1, checkpoint=path, training=training, seed=np.int64(4))
    again = train(build(), epochs=np.int64(2), checkpoint=path, resume=True, seed=4)
    assert len(again) == 2
    with pytest.raises(ValueError, match="another seed, 4, and cannot be resumed with 5"):
        train(build(), checkpoint=path, resume=True, seed=np.int64(5))


# Bad input: clear errors, and nothing overwritten -----------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.pt"
    train(build(), epochs=1, checkpoint=path, scheduler="StepLR")
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": lambda: build(channels=6)}, "another model: .* first"),
        ({"model": lambda: nn.Sequential(build())}, "another model"),
        ({"scheduler": "LambdaLR"}, "another scheduler"),
        ({"scheduler": None}, "another scheduler"),
        ({"seed": 4}, "another seed"),
        ({"training": AdversarialTraining(norm=2, eps=0.9)}, "another eps"),
        ({"optimizer": torch.optim.SGD}, "another optimizer"),
        ({"max_grad_norm": 0.1}, "another max_grad_norm"),
        ({"scheduler_interval": "step"}, "another scheduler_interval"),
        ({"batches": lambda x, y, _: TensorBatches(x, y, 17)}, "another batch size"),
        ({"batches": lambda x, y, n: TensorBatches(x.flip(0), y.flip(0), n)}, "another data"),
    ],
)
def test_a_checkpoint_of_another_training(saved: Path, change: dict[str, Any], words: str) -> None:
    before = saved.read_bytes()
    model = change.pop("model", build)()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    if "optimizer" in change:
        change["optimizer"] = change["optimizer"](model.parameters(), lr=0.01)
    options = {"scheduler": "StepLR", "checkpoint": saved, "resume": True, **change}
    with pytest.raises(ValueError, match=words):
        train(model, **options)
    assert saved.read_bytes() == before
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    part = whole[: int(share * len(whole))]
    saved.write_bytes(part)
    with pytest.raises(ValueError, match="damaged"):
        train(build(), scheduler="StepLR", checkpoint=saved, resume=True)
    assert saved.read_bytes() == part


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_text("my notes\n" * 100)
    with pytest.raises(ValueError, match="did not write it: its checksum"):
        train(build(), checkpoint=path, resume=True)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="did not write it: its checksum"):
        train(build(), checkpoint=path, resume=True)
    checkpoint.write(path, {"weights": torch.ones(3)})
    with pytest.raises(ValueError, match="not a training checkpoint"):
        train(build(), checkpoint=path, resume=True)
    checkpoint.write(path, {"format": checkpoint.FORMAT, "model": {}})
    with pytest.raises(ValueError, match="it has no optimizer, progress, random, scheduler, sett"):
        train(build(), checkpoint=path, resume=True)
    checkpoint.write(path, {"format": Path})  # would run code when loaded
    with pytest.raises(ValueError, match="did not write it: UnpicklingError"):
        train(build(), checkpoint=path, resume=True)
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "absent.pt")


@pytest.mark.parametrize("part", ["optimizer", "model", "settings", "progress"])
def test_a_checkpoint_with_a_part_that_is_none(saved: Path, part: str) -> None:
    content = checkpoint.read(saved)
    checkpoint.write(saved, {**content, part: {"nothing": 1}})
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"run\.pt (is damaged|belongs|was written with)"):
        train(model, scheduler="StepLR", checkpoint=saved, resume=True)
    unchanged = all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert unchanged or part == "progress"


def test_a_training_of_which_another_writes_the_checkpoint(saved: Path) -> None:
    before = saved.read_bytes()
    refused = pytest.raises(BlockingIOError, match="written by another process or thread: wait")
    with owning(saved), refused:
        train(build(), scheduler="StepLR", checkpoint=saved, resume=True)
    assert saved.read_bytes() == before
    train(build(), scheduler="StepLR", checkpoint=saved, resume=True)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_existing_checkpoint_is_not_overwritten(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        train(build(), scheduler="StepLR", checkpoint=saved)
    assert saved.read_bytes() == before
