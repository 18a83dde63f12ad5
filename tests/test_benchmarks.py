"""The quick benchmarks run from end to end, at their smallest."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import precision, scaling, solvers
from benchmarks.tabulation import attacks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """The scripts set these for their process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


def run(script: Any, out: Path, **settings: Any) -> dict[str, Any]:
    script.main(script.Args(out=out, **settings))
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_solvers_arrive_and_are_judged(tmp_path: Path) -> None:
    found = run(
        solvers,
        tmp_path,
        cells=["linear-0.5", "digits, one row alone"],
        tolerances=[1e-3],
        rows=4,
        rounds=1,
    )
    for cell in found["results"]:
        runs = {r["solver"]: r for r in cell["runs"]}
        assert len(runs) == 3 + 10
        arrived = {name for name, r in runs.items() if r["arrived"]}
        assert {"Anderson", "Picard", "Broyden", "torchdeq fixed point"} <= arrived
        assert any(name.startswith("deepinv") for name in arrived)
        assert any(name.startswith("scipy") for name in arrived)
        assert all(runs[name]["residual"] <= 1.01e-3 for name in arrived)
        assert runs["Anderson"]["evaluations"] <= runs["Picard"]["evaluations"]
    _, _, *rows = attacks.solvers(found).splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| linear-0.5", "| digits, one row alone"]


def test_scaling_tells_the_cost_of_every_size(tmp_path: Path) -> None:
    found = run(scaling, tmp_path, axes=["batch", "classes"], iterations=3, rounds=1, largest=16)
    batch, classes = found["results"]["batch"], found["results"]["classes"]
    assert [row["batch"] for row in batch] == [1, 4, 16]
    assert all(row["f_evals"] == batch[0]["f_evals"] and row["vjps"] > 3 for row in batch)
    assert all(math.isfinite(row["exponent"]) for row in batch[1:])
    assert [row["classes"] for row in classes] == [10]
    _, _, *rows = attacks.scaling(found).splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["1", "4", "16", "10"]
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no such axis"):
        run(scaling, tmp_path, axes=["width"])


def test_precision_runs_the_same_attack_in_several_ways(tmp_path: Path) -> None:
    found = run(precision, tmp_path, images=4, iterations=6, rounds=1, compiled=False)
    (digits,) = found["results"]
    plain, half = digits["rows"]
    assert (plain["name"], half["name"]) == ("as it is", "bfloat16")
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.2)
    assert plain["vjps"] >= 6
    _, _, *rows = attacks.precision(found).splitlines()
    assert len(rows) == 2
