"""``jiio demo``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from jiio_plugins.cli import demo
from jiio_plugins.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


def test_demo_writes_table_pictures_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STEPS", {"ART PGD": (2, 20), "JIIO in ART": (4, 16)})
    main(["demo", "--images", "12", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "JIIO in ART" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "curve.png",
        "images.png",
        "results.json",
    }
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["family"] for row in rows] == ["clean", *["ART PGD"] * 2, *["JIIO in ART"] * 2]
    assert [row["setting"].get("steps") for row in rows] == [None, 2, 20, 4, 16]
    clean, strongest = rows[0], rows[-1]
    assert strongest["loss"] > clean["loss"]
    pgd = rows[2]
    assert strongest["f_evals"] + strongest["vjps"] < (pgd["f_evals"] + pgd["vjps"]) / 5


def test_no_images_for_the_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="images must be at least 1, got 0"):
        main(["demo", "--images", "0", "--out", str(tmp_path / "demo")])


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path: Path) -> None:
    out = str(tmp_path / "demo")
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        main(["demo", "--dataset", "fashion-mnist", "--folder", str(tmp_path), "--out", out])
