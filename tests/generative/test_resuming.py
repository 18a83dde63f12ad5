"""A killed, diverged or misdirected run keeps what it has and goes on from there."""

from __future__ import annotations

import gc
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jiio_plugins.cli.main import main
from jiio_plugins.generative import TrainConfig, train, training
from jiio_plugins.generative.config import CONFIG
from jiio_plugins.generative.files import CHECKPOINT, GENERATOR, save_generator
from jiio_plugins.generative.step import TrainingStep
from jiio_plugins.utils import checkpoint
from tests.generative.helpers import OPTIONS, SMALL, assert_same, config, run, states

pytest.importorskip("lightning_fabric")  # some tests would see no more than a command that ends


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first_run = run(whole, "--latents", "table")
    output, _ = first_run.communicate()
    assert first_run.returncode == 0, output
    process = run(killed, "--latents", "table")
    deadline = time.monotonic() + 120
    while not (killed / CHECKPOINT).is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < states(killed)["progress"]["step"] < 12
    resumed = run(killed, "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    first, second = states(whole), states(killed)
    for part in ("model", "optimizer", "progress"):
        assert_same(first[part], second[part])
    assert_same(load_file(whole / GENERATOR), load_file(killed / GENERATOR))


def test_runs_that_cannot_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2))
    with pytest.raises(FileExistsError, match=r"exists and is not empty: .*--resume"):
        train(config(out))
    with pytest.raises(FileNotFoundError, match=r"there is no run in .*leave out --resume"):
        train(config(tmp_path / "other", resume=True))
    content = (out / CHECKPOINT).read_bytes()
    (out / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        train(config(out, resume=True))
    checkpoint.write(out / CHECKPOINT, {"format": "something else"})
    with pytest.raises(ValueError, match="not a training checkpoint of this version"):
        train(config(out, resume=True))
    wider = config(tmp_path / "wide", steps=2, model=replace(SMALL, channels=(8, 4)))
    train(wider)
    (out / CHECKPOINT).write_bytes((wider.out / CHECKPOINT).read_bytes())
    with pytest.raises(ValueError, match=r"belongs to another model: \d+ tensors differ, first"):
        train(config(out, resume=True))
    (out / CHECKPOINT).unlink()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):  # there was one
        train(config(out, steps=9, resume=True))
    assert TrainConfig.from_json((out / CONFIG).read_text()).steps == 2


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(out), on_step=kill)
    assert not (out / CHECKPOINT).exists()
    for name in (CHECKPOINT, "samples.png"):
        (out / f".{name}.0123.tmp").write_bytes(b"half")
    train(config(out, resume=True))
    assert not list(out.glob(".*.tmp"))
    whole = config(tmp_path / "whole")
    train(whole)
    assert_same(states(out)["model"], states(whole.out)["model"])


@pytest.mark.parametrize("left", ["config.json.tmp", ".config.json.0123.tmp"])
def test_a_run_killed_while_it_wrote_its_settings_starts_anew(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_bytes(b"{")
    with pytest.raises(FileNotFoundError, match=r"there is no run in .*leave out --resume"):
        train(config(tmp_path, steps=2, resume=True))
    train(config(tmp_path, steps=2))
    assert states(tmp_path)["progress"]["step"] == 2


def test_a_run_that_another_process_is_at(tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused = pytest.raises(BlockingIOError, match="written by another process or thread: wait")

    def again(step: int, _: Any) -> None:
        for resume in (False, True):
            with refused:
                train(config(out, resume=resume))

    train(config(out, steps=2), on_step=again)
    assert states(out)["progress"]["step"] == 2


@pytest.mark.parametrize("first", [True, False])
def test_a_diverged_run_keeps_what_it_has(tmp_path: Path, first: bool) -> None:
    out = tmp_path / "run"
    if not first:
        train(config(out, steps=2))
        kept = (out / GENERATOR).read_bytes()

    def diverge(step: int, _: Any) -> None:
        modules = [m for m in gc.get_objects() if type(m) is TrainingStep]
        if step == (2 if first else 4):  # its own loss was finite, and a checkpoint is due
            with torch.no_grad():
                for module in modules:
                    next(module.parameters()).fill_(torch.nan)

    said = "There is no checkpoint yet" if first else "The last checkpoint is from before"
    with pytest.raises(FloatingPointError, match=f"NaN or Inf at step .*{said}"):
        train(config(out, steps=4, resume=not first), on_step=diverge)
    if first:
        assert not (out / CHECKPOINT).exists()
    else:
        assert states(out)["progress"]["step"] == 2
        assert (out / GENERATOR).read_bytes() == kept


def test_what_is_typed_on_resuming_counts_also_where_it_is_a_default(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, epochs=2, seed=3))
    words = ["train-generator", "--data=digits", f"--out={out}", "--resume", "--accelerator=cpu"]
    with pytest.raises(SystemExit, match=r"seed was 3 and cannot be 0 in a resumed run"):
        main([*words, "--seed", "0"])
    main([*words, "--steps", "None", "--epochs", "1"])
    saved = TrainConfig.from_json((out / CONFIG).read_text())
    assert (saved.steps, saved.epochs, saved.seed, saved.model) == (None, 1, 3, SMALL)
    assert states(out)["progress"]["step"] == 81


def test_a_resumed_run_knows_its_data_and_says_what_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, epochs=1))
    words = ["train-generator", f"--out={out}", "--resume"]
    with pytest.raises(SystemExit, match="data was 'digits' and cannot be 'mnist' in a resumed"):
        main([*words, "--dataset=mnist"])
    with pytest.raises(SystemExit, match=r"there is no run in .*: leave out --resume"):
        main(["train-generator", f"--out={tmp_path / 'other'}", "--resume"])
    capsys.readouterr()
    main([*words, "--epochs=3"])
    said = capsys.readouterr().err
    assert "ends after its --steps 2, before its --epochs 3 do, of 243 steps" in said
    assert states(out)["progress"]["step"] == 2
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, epochs=3))
    train(TrainConfig(data="digits", out=out, steps=3, resume=True))
    saved = TrainConfig.from_json((out / "config.json").read_text())
    assert (saved.epochs, saved.steps, saved.checkpoint_every) == (3, 3, 2)
    with pytest.raises(ValueError, match=r"lr was 0\.003 and cannot be 0\.1 in a resumed run"):
        train(TrainConfig(data="digits", out=out, lr=0.1, resume=True))


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / CHECKPOINT
    checkpoint.write(path, {"step": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"could not write checkpoint.pt; the one before is kept"):
        checkpoint.write(path, {"step": 2})
    assert checkpoint.read(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_run_goes_on_after_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2))
    weights = load_file(out / GENERATOR)
    write = Path.open

    def full(self: Path, mode: str = "r", **rest: Any) -> Any:
        if self.suffix == ".tmp":
            return write(Path("/dev/full"), "wb")
        return write(self, mode, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"could not write checkpoint.pt; the one before is kept"):
            train(config(out, steps=2, resume=True))
        with pytest.raises(OSError, match=r"could not write config.json; the one before is kept"):
            train(config(out, steps=4, resume=True))
        with pytest.raises(OSError, match=r"could not write g.safetensors: .*Free some space"):
            save_generator(out / "g.safetensors", SMALL.build((1, 8, 8)), SMALL)
    assert states(out)["progress"]["step"] == 2
    assert TrainConfig.from_json((out / CONFIG).read_text()) == config(out, steps=2)
    assert_same(load_file(out / GENERATOR), weights)
    train(config(out, steps=4, resume=True))
    whole = config(tmp_path / "whole", steps=4)
    train(whole)
    assert_same(states(out)["model"], states(whole.out)["model"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    words = ["train-generator", "--out", str(out), *OPTIONS]
    step = training._Run._step

    def interrupt(self: Any, rows: Any) -> Any:
        if self.done == 2:
            os.kill(os.getpid(), number)
        return step(self, rows)

    monkeypatch.setattr(training._Run, "_step", interrupt)
    with pytest.raises(SystemExit) as caught:
        main([*words, "--checkpoint-every", "100"])
    assert caught.value.code == 128 + number
    said = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert said == (
        f"jiio: stopped by {number.name}: step 3 of 12 is done, and in the checkpoint. Go on with "
        "the same command and --resume"
    )
    assert states(out)["progress"]["step"] == 3
