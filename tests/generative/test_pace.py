"""When a run writes, what it says of the time, and where it logs."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from jiio_plugins.cli.main import main
from jiio_plugins.data import load_digits
from jiio_plugins.generative import train
from jiio_plugins.generative.files import GENERATOR, about, lowest_psnr
from jiio_plugins.generative.pace import Every, duration
from tests.generative.helpers import config

if TYPE_CHECKING:
    from pathlib import Path


def test_by_steps_and_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    every = Every(steps=100, seconds=20)
    assert every.due(100)
    assert not every.due(101)
    now = 20.0
    assert every.due(101)
    with every.doing():
        now = 25.0  # it took 5 s, and so waits for 50
    now = 74.0
    assert not every.due(102)
    now = 75.0
    assert every.due(102)
    assert [duration(s) for s in (40, 700, 9400)] == ["40 s", "12 min", "2.6 h"]


def test_slow_steps_leave_a_picture_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[set[str]] = []
    settings = config(
        tmp_path / "run",
        steps=3,
        checkpoint_every=1000,
        pictures_every=1000,
        checkpoint_seconds=1e-3,
        pictures_seconds=1e-3,
    )
    train(settings, on_step=lambda *_: seen.append({p.name for p in settings.out.iterdir()}))
    assert "checkpoint.pt" not in seen[0]
    assert seen[1] >= {"checkpoint.pt", "generator.safetensors", "reconstructions.png"}
    said = capsys.readouterr().err
    assert "the first step took" in said
    assert "2 more take about" in said
    assert "step 1: held-out fits" in said


def test_how_often_it_writes_may_change_on_resuming(tmp_path: Path) -> None:
    train(config(tmp_path / "run", steps=1))
    again = config(tmp_path / "run", steps=2, resume=True, loggers=(), pictures_every=1)
    assert train(replace(again, checkpoint_seconds=1.0)).steps == 2
    with pytest.raises(ValueError, match=r"checkpoint_seconds must be above 0, got 0"):
        config(tmp_path / "other", checkpoint_seconds=0)


def test_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", None)
    tiny = ["--data=digits", "--steps=1", "--iterations=2", "--latents-kept=8", "--quiet"]
    command = ["train-generator", *tiny, "--accelerator=cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"--loggers wandb needs .*'jiio-plugins\[wandb\]'"):
        main([*command, "--loggers", "wandb"])
    assert not list((tmp_path / "run").iterdir())
    logged: dict[str, float] = {}

    class WandbLogger:
        def __init__(self, **about: Any) -> None:
            self.about = about

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            assert step == 1
            logged.update(values)

        def finalize(self, status: str) -> None:
            logged[status] = 1.0

    fake: Any = types.ModuleType("loggers")
    fake.WandbLogger = WandbLogger
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", fake)
    main([*command, "--loggers", "tensorboard", "wandb"])
    assert set(logged) >= {"train/loss", "train/PSNR", "held-out/PSNR", "success"}
    assert list((tmp_path / "run").glob("events.out.tfevents*"))


def test_images_that_a_generator_does_not_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "run", steps=2))
    capsys.readouterr()
    lowest = lowest_psnr(tmp_path / "run")
    assert lowest == float(about(tmp_path / "run" / GENERATOR)["lowest_psnr"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    checkers = np.indices((8, 8)).sum(0) % 2 * 255
    Image.fromarray(checkers.astype(np.uint8)).save(pictures / "checkers.png")
    digit = (load_digits("test")[0][0, 0] * 255).byte().numpy()
    Image.fromarray(digit).save(pictures / "digit.png")
    for name in (str(tmp_path / "run"), "digits-generator"):
        main(["fit", name, str(pictures), "--json", "--overwrite", f"--out={tmp_path / 'fit'}"])
        said = capsys.readouterr()
        record = json.loads(said.out)
        assert [fit["far"] for fit in record["fits"]] == [True, False]
        assert record["fits"][0]["PSNR"] < record["held-out PSNR, lowest"]
        assert "1 of 2 images fit worse than the worst held-out image" in said.err
