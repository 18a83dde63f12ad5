"""``jiio bench``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from jiio_plugins.cli.main import main
from jiio_plugins.evaluation import against_nested

if TYPE_CHECKING:
    from pathlib import Path


def test_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TOLERANCES": (0.1,), "OUTER": (5, 10), "CAPS": (2,)}.items():
        monkeypatch.setattr(against_nested, name, value)
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


def test_bad_benches(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="images must be at least 1, got 0"):
        main(["bench", "--images", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"eps must be above 0, got -1\.0"):
        main(["bench", "--eps", "-1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
