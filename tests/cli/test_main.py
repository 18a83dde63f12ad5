"""The command line, the adapters' loader and the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jiio_plugins.cli import bench as _bench, demo as _demo
from jiio_plugins.cli.main import main
from jiio_plugins.hosts import available_adapters, load_adapter

ROOT = Path(__file__).resolve().parents[2]


def test_readme_quickstart_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(import torch.*?)```\n\n(    .*?)\n\n", text, re.S)
    assert code is not None
    names = {"__name__": "readme"}
    exec(compile(code[1], "README.md", "exec"), names)
    assert capsys.readouterr().out.strip() == code[2].strip()
    more = re.findall(r"```python\n(from .*?)```", text, re.S)
    assert len(more) == 2
    for block in more:  # with the network of the first
        exec(compile(block, "README.md", "exec"), names)
        assert names["x_adv"].shape == (8, 1, 8, 8)
        assert names["attack"].solution is not None


def test_demo_writes_table_pictures_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_demo, "PGD_STEPS", (2, 20))
    monkeypatch.setattr(_demo, "JIIO_STEPS", (4, 16))
    main(["demo", "--images", "12", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "JIIO in ART" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "curve.png",
        "images.png",
        "results.json",
    }
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["attack"] for row in rows] == ["clean", *["ART PGD"] * 2, *["JIIO in ART"] * 2]
    clean, strongest = rows[0], rows[-1]
    assert strongest["loss"] > clean["loss"]
    pgd = rows[2]
    assert strongest["f_evals"] + strongest["vjps"] < (pgd["f_evals"] + pgd["vjps"]) / 5


def test_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TOLERANCES": (0.1,), "OUTER": (5, 10), "CAPS": (2,)}.items():
        monkeypatch.setattr(_bench, name, value)
    main(["bench", "--images", "12", "--repeats", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "curve.png"}
    record = json.loads((tmp_path / "results.json").read_text())
    rows, warm = record["rows"], record["warm"]
    assert len(warm) == 2 * 3
    assert rows[0]["method"] == "clean"
    assert all(row["loss"] > rows[0]["loss"] for row in (*rows[1:], *warm))
    assert all(row["seconds"] > 0 for row in rows[1:])
    cheap, cold = rows[5], rows[1]
    assert cheap["method"] == "JIIO, 8 iterations"
    assert 10 * (cheap["f_evals"] + cheap["vjps"]) < cold["f_evals"] + cold["vjps"]
    printed = capsys.readouterr().out
    assert "is as strong as [nested cold, 20 steps, tol 0.001" in printed
    assert "of the warm-started nested front" in printed or "no warm-started" in printed


def test_fronts() -> None:
    points = [(10, 1.0), (20, 3.0), (30, 2.0), (40, 4.0)]
    rows = [_bench.Row("", "", loss=loss, f_evals=cost) for cost, loss in points]
    assert [r.loss for r in _bench.front(rows)] == [1.0, 3.0, 4.0]
    assert _bench.cost_at(2.0, rows) == 15
    assert _bench.cost_at(3.5, rows) == 30
    assert _bench.cost_at(0.5, rows) == 10
    assert _bench.cost_at(4.1, rows) is None


def test_bad_benches(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must be at least 1, got 0 and 3"):
        main(["bench", "--images", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"eps must be above 0, got -1\.0"):
        main(["bench", "--eps", "-1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        main(["demo", "--dataset", "fashion-mnist", "--data", str(tmp_path)])


def test_adapters_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["adapters"])
    printed = capsys.readouterr().out
    assert set(available_adapters()) == {
        "art",
        "deepinv",
        "learn2learn",
        "torchattacks",
        "torchdeq",
    }
    assert printed.count("ready") == 5


def test_load_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_adapter("art").__name__ == "jiio_art"
    with pytest.raises(ValueError, match="art, deepinv, learn2learn, torchattacks, torchdeq"):
        load_adapter("nothing")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name="torchattacks")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'jiio-plugins\[torchattacks\]'"):
        load_adapter("torchattacks")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("jiio ")
