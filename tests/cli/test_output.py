"""What all commands do alike: results on stdout, nothing overwritten, errors that say more."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jiio_plugins import __version__
from jiio_plugins.cli import demo
from jiio_plugins.cli.main import main
from jiio_plugins.evaluation import against_nested
from jiio_plugins.utils.distributed import launch
from tests.data.helpers import save_picture

CHECK = ["check", "--images", "2", "--out"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_picture(folder / "noise.png", (8, 8))
    return folder


def commands(out: Path, pictures: Path) -> dict[str, list[str]]:
    """A short run of each."""
    quick = ["--images", "2", "--suite", "quick", "--audit", "0", "--eps", "0.4"]
    tiny = ["--data=digits", "--steps=1", "--iterations=2", "--latents-kept=8"]
    return {
        "adapters": ["adapters"],
        "check": [*CHECK, str(out)],
        "evaluate": ["evaluate", *quick, "--out", str(out)],
        "demo": ["demo", "--images", "2", "--out", str(out)],
        "bench": ["bench", "--images", "2", "--repeats=1", "--no-sweep", "--out", str(out)],
        "train-generator": ["train-generator", *tiny, "--accelerator=cpu", "--out", str(out)],
        "sample": ["sample", "digits-generator", "--latents=40", "--no-metrics", f"--out={out}"],
        "fit": ["fit", "digits-generator", str(pictures), "--iterations=5", f"--out={out}"],
    }


def keys_on_the_page(command: str) -> list[str]:
    """What ``docs/reference/cli.md`` says that the JSON of a command holds in any case."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text()
    said = page.partition("## What `--json` holds")[2]
    (row,) = re.findall(rf"^\| `{command}` \| (.*?) \|", said, re.M)
    return re.findall(r"`(.*?)`", row.partition("with metrics")[0])


@pytest.mark.parametrize("command", list(commands(__file__, __file__)))  # type: ignore[arg-type]
def test_json_is_one_object_and_quiet_is_quiet(
    command: str,
    tmp_path: Path,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "STEPS", {"ART PGD": (2,), "JIIO in ART": (4,)})
    for name, few in {"JOINT": (2,), "RETRY": ()}.items():
        monkeypatch.setattr(against_nested, name, few)
    words = commands(tmp_path / "one", pictures)[command]
    main([*words, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["jiio_plugins"] == __version__
    assert set(keys_on_the_page(command)) < set(record)
    for name in record.get("files", []):
        assert name.startswith(str(tmp_path))
    for path in (tmp_path / "one").glob("*.json"):
        assert json.loads(path.read_text())["jiio_plugins"] == __version__
    main([*commands(tmp_path / "two", pictures)[command], "--quiet"])
    said = capsys.readouterr()
    assert said.out.strip()
    assert said.err == ""


def test_results_are_kept(tmp_path: Path, pictures: Path) -> None:
    for name, words in commands(tmp_path, pictures).items():
        if name in ("adapters", "train-generator"):
            continue
        out = tmp_path / name
        out.mkdir()
        files = {
            "check": "check.png",
            "evaluate": "robustness.json",
            "demo": "images.png",
            "bench": "curve.png",
            "sample": "samples-gmm.png",
            "fit": "0000-noise.png",
        }
        (out / files[name]).write_text("precious")
        again = [*[w for w in words if w not in (str(tmp_path), f"--out={tmp_path}", "--out")]]
        with pytest.raises(
            SystemExit, match=rf"{files[name]}\): choose another --out, or .*--over"
        ):
            main([*again, "--out", str(out)])
        assert {path.name for path in out.iterdir()} == {files[name]}
        assert (out / files[name]).read_text() == "precious"
    main([*CHECK, str(tmp_path / "check"), "--overwrite", "--quiet"])
    assert (tmp_path / "check" / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_of_an_earlier_fit_go_and_nothing_else(tmp_path: Path) -> None:
    out, many = tmp_path / "out", tmp_path / "many"
    many.mkdir()
    for name in ("a", "b", "c"):
        save_picture(many / f"{name}.png", (8, 8))
    words = ["fit", "digits-generator", "--iterations=2", "--quiet", f"--out={out}"]
    main([*words, str(many)])
    mine = {out / "2024-holiday.png", out / "0007-of-mine.png", out / "notes.txt"}
    for path in mine:
        path.write_text("precious")
    main([*words, str(many / "b.png"), "--overwrite"])
    names = {"latents.safetensors", "fits.png", "0000-b.png"}
    assert {*out.iterdir()} == mine | {out / name for name in names}
    assert {path.read_text() for path in mine} == {"precious"}
    (out / "latents.safetensors").write_bytes(b"damaged")  # they name no pictures then
    main([*words, str(many / "a.png"), "--overwrite"])
    assert {*out.iterdir()} == mine | {out / name for name in (*names, "0000-a.png")}


def test_figures_of_earlier_samples_go(tmp_path: Path) -> None:
    words = ["sample", "digits-generator", "--latents=40", "--quiet", f"--out={tmp_path}"]
    main([*words, "--measured=4", "--fits=2"])
    main([*words, "--prior=gaussian", "--no-metrics"])
    assert len(list(tmp_path.iterdir())) == 4
    main([*words, "--no-metrics", "--overwrite"])
    assert {path.name for path in tmp_path.iterdir()} == {"samples-gmm.png", "samples-gaussian.png"}


def test_a_picture_of_an_earlier_check_goes(tmp_path: Path) -> None:
    (tmp_path / "check.png").write_text("of another model")
    (tmp_path / "no_deq.py").write_text("from torch import nn\nbuild = nn.Flatten\n")
    words = [*CHECK, str(tmp_path), "--model=no_deq:build", "--dataset=digits", "--overwrite"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        main([*words, "--quiet"])
    assert not (tmp_path / "check.png").exists()


COMPUTE = [name for name in commands(__file__, __file__) if name != "adapters"]  # type: ignore[arg-type]


@pytest.mark.parametrize("command", COMPUTE)
def test_a_device_that_is_not_there(command: str, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    words = [word for word in commands(out, pictures)[command] if word != "--accelerator=cpu"]
    for device in ("cuda:7", "abacus", "meta"):
        with pytest.raises(SystemExit, match=rf"--device {device} cannot be used: .* There is cpu"):
            main([*words, "--device", device])
    assert not out.exists()


def test_a_training_on_a_named_device(tmp_path: Path, pictures: Path) -> None:
    words = commands(tmp_path, pictures)["train-generator"]
    main([*[word for word in words if word != "--accelerator=cpu"], "--device=cpu", "--quiet"])
    assert json.loads((tmp_path / "config.json").read_text())["accelerator"] == "cpu"
    main([*words, "--resume", "--quiet"])


def test_one_device_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cpu:0 is one device, for 2 processes: give cpu, of"):
        launch("cpu:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("command", COMPUTE)
def test_on_a_gpu(
    command: str, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With figures and neighbours, which are made of images that lie on the CPU."""
    monkeypatch.setattr(demo, "STEPS", {"ART PGD": (2,), "JIIO in ART": (4,)})
    for name, few in {"JOINT": (2,), "RETRY": ()}.items():
        monkeypatch.setattr(against_nested, name, few)
    spare = ("--accelerator=cpu", "--no-metrics")
    words = [word for word in commands(tmp_path, pictures)[command] if word not in spare]
    words += ["--measured=20", "--fits=4"] if command == "sample" else []
    torch.cuda.reset_peak_memory_stats()
    main([*words, "--device", "cuda:0", "--quiet"])
    assert torch.cuda.max_memory_allocated() > 0


def test_a_generator_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="which is no classifier: jiio sample and jiio fit take"):
        main([*CHECK, str(tmp_path / "out"), "--weights", "digits-generator"])
    with pytest.raises(SystemExit, match="or a shipped one: digits-generator, fashion-mnist-gen"):
        main(["fit", "digits", str(tmp_path)])


@pytest.mark.parametrize("command", ["demo", "evaluate", "bench"])
def test_what_a_missing_library_costs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kw: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return there(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(
        SystemExit, match=rf"{command} needs matplotlib, .*pip install 'jiio-plugins\[cli\]'"
    ):
        main([command, "--out", str(tmp_path / "out")])


def test_hosts_are_silent() -> None:
    for words in (["-m", "jiio_plugins", "adapters"], ["-c", "import jiio_learn2learn"]):
        run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        assert run.stderr == ""
