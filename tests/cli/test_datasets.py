"""Commands on images and a model of the user's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from jiio_plugins.cli.main import main
from jiio_plugins.evaluation import against_nested
from tests.data.helpers import save_picture

if TYPE_CHECKING:
    from pathlib import Path

COLOUR = """
import torch
from torch import nn
from jiio_plugins.models import ConvDEQClassifier

def build(classes=12):
    torch.manual_seed(0)
    return ConvDEQClassifier(in_channels=3, channels=4, classes=classes)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x):
        return {"hidden": x, "out": self.net(x)}

def one():
    return build(classes=1)

def flat():
    return nn.Flatten(0)
"""
QUICK = ["--images", "6", "--model", "my_colour_deq:build"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of ones own, a folder of twelve classes and an npz file, in the current folder."""
    (tmp_path / "my_colour_deq.py").write_text(COLOUR)
    monkeypatch.chdir(tmp_path)
    for k in range(12):
        (tmp_path / "images" / f"{k:02d}").mkdir(parents=True)
        save_picture(tmp_path / "images" / f"{k:02d}" / "a.png", (32, 32, 3), k)
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(8))
    return tmp_path


def test_evaluate_on_a_folder(folder: Path) -> None:
    colour = ["0.5", "0.4", "0.3", "0.2", "0.2", "0.2"]
    quick = ["--suite", "quick", "--audit", "0", "--eps", "0.1", "--normalize", *colour]
    named = ["--images", "6", "--model", "my_colour_deq:Named", "--output", "out"]
    main(["evaluate", *named, "--dataset", "images", "--out", "out", *quick])
    record = json.loads((folder / "out" / "robustness.json").read_text())
    assert (record["dataset"], record["weights"]) == ("images", None)
    assert record["normalize"] == [float(c) for c in colour]
    assert record["reports"][0]["images"] == 6


def test_bench_on_an_npz(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOLERANCES": (0.1,), "OUTER": (5,), "CAPS": (2,)}.items():
        monkeypatch.setattr(against_nested, name, value)
    for name, few in {"JOINT": (2,), "RETRY": ()}.items():
        monkeypatch.setattr(against_nested, name, few)
    short = ["--images", "2", "--repeats", "1", "--no-sweep", "--out", "out"]
    main(["bench", *QUICK, "--dataset", "mine.npz", *short])
    assert json.loads((folder / "out" / "results.json").read_text())["dataset"] == "mine.npz"


def test_what_does_not_fit(folder: Path) -> None:
    def refused(message: str, *words: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main(["evaluate", *(words or QUICK), "--out", "out"])

    on_images = [*QUICK, "--dataset", "images"]
    refused(
        r"cannot be called on images of digits, which are \(1, 8, 8\)",
        *QUICK,
        "--dataset",
        "digits",
    )
    refused("say what to attack on images: --model", "--dataset", "images")
    refused("must have one for each class", *QUICK, "--dataset", "images/00")
    refused("2 means, the images have 3", *on_images, "--normalize", "0", "0", "1", "1")
    refused("as many standard deviations", *on_images, "--normalize", "0", "0", "1")
    refused("must return logits", "--model", "my_colour_deq:flat", "--dataset", "images")
    named = ["--model", "my_colour_deq:Named", "--dataset", "images"]
    refused("returns dict. .*, --output says which", *named)
    refused("output='y' is not in .* dict with 'hidden', 'out'", *named, "--output", "y")
    refused("2 classes or more, got 1", "--model", "my_colour_deq:one", "--dataset", "images")
    (folder / "images" / "05" / "a.png").unlink()
    refused("no images in the class folders 05", *on_images)
    (folder / "images" / "05").rmdir()
    refused("classes are missing: images has 11 .* tells 12 apart", *on_images)
    x = np.zeros((8, 32, 32, 3), np.uint8)
    np.savez(folder / "mine.npz", x=x, y=np.arange(5, 13))
    refused(
        r"out of range: mine\.npz has label 12, .* 0 to 11",
        *QUICK,
        "--images",
        "8",
        "--dataset",
        "mine.npz",
    )
    refused("the data set must be digits, .* got 'imagse'", *QUICK, "--dataset", "imagse")
    assert not (folder / "out").exists()
