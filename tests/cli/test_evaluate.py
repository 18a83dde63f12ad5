"""``jiio evaluate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import save_file

from jiio_plugins.cli.main import main
from jiio_plugins.evaluation import robust_accuracy
from jiio_plugins.models import ConvDEQClassifier, load_pretrained

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["evaluate", "--images", "8", "--suite", "quick", "--audit", "0", "--eps"]


def test_writes_json_plot_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "0.4", "0.2", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"robustness.json", "robustness.png"}
    small, large = json.loads((tmp_path / "robustness.json").read_text())["reports"]
    assert (small["eps"], large["eps"]) == (0.2, 0.4)
    assert small["images"] == large["images"] == 8
    assert large["attacks"][0]["name"] == "known"
    assert large["accuracy"]["value"] < small["accuracy"]["value"] <= small["clean"]["value"]
    printed = capsys.readouterr().out
    assert "8 images, L2 ball of radius 0.2" in printed
    assert "JIIO, DLR" in printed


def test_a_radius_that_is_done_outlives_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="sklearn is not installed")  # the digits
    judged = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if judged:
            raise KeyboardInterrupt
        judged.append(robust_accuracy(*args, **kwargs))
        return judged[0]

    monkeypatch.setattr("jiio_plugins.cli.evaluate.robust_accuracy", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main([*QUICK, "0.4", "0.2", "--out", str(tmp_path)])
    (report,) = json.loads((tmp_path / "robustness.json").read_text())["reports"]
    assert report["eps"] == 0.2
    assert (tmp_path / "robustness.png").is_file()


def test_weights_from_a_file(tmp_path: Path) -> None:
    save_file(load_pretrained("digits").state_dict(), tmp_path / "mine.safetensors")
    main([*QUICK, "0.3", "--weights", str(tmp_path / "mine.safetensors"), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "robustness.json").read_text())["dataset"] == "digits"


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_deq.py").write_text(
        "from jiio_plugins.models import ConvDEQClassifier\n"
        "build = lambda: ConvDEQClassifier(channels=8)\n"
        "number = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "w.safetensors"
    save_file(ConvDEQClassifier(channels=8).state_dict(), weights)
    own = [*QUICK, "0.3", "--out", str(tmp_path), "--overwrite", "--model", "my_own_deq:build"]
    main([*own, "--dataset", "digits", "--weights", str(weights)])
    with pytest.raises(SystemExit, match="--dataset digits, fashion-mnist"):
        main(own)
    with pytest.raises(SystemExit, match="has no function 'nothing'"):
        main([*QUICK, "0.3", "--model", "my_own_deq:nothing"])
    with pytest.raises(SystemExit, match=r"must return a torch\.nn\.Module, got int"):
        main([*QUICK, "0.3", "--model", "my_own_deq:number"])
    with pytest.raises(SystemExit, match="no_such_module"):
        main([*QUICK, "0.3", "--model", "no_such_module:build"])
    save_file(ConvDEQClassifier(channels=12).state_dict(), weights)
    with pytest.raises(SystemExit, match="does not fit the model of my_own_deq:build"):
        main([*own, "--dataset", "digits", "--weights", str(weights)])


def test_bad_weights(tmp_path: Path) -> None:
    other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
    save_file(ConvDEQClassifier().state_dict(), other)
    broken.write_bytes(other.read_bytes()[:100])
    for weights, message in (
        (str(other), "none of the shipped architectures"),
        (str(broken), "not a whole safetensors file"),
        (str(tmp_path / "no.safetensors"), "there is no file"),
        ("cifar", "must be digits, fashion-mnist or a .safetensors file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*QUICK, "0.3", "--weights", weights])
    with pytest.raises(SystemExit, match="images must be at least 1"):
        main(["evaluate", "--images", "0"])
