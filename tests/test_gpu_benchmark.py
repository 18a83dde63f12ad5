"""The benchmark for a CUDA device runs, and prints all that it is to print, on a CPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu import Args, main

SMALL = {"images": 4, "peer_images": 2, "batch": 4, "rows": (2,), "large_rows": 2, "large": (8, 8)}


@pytest.mark.slow
def test_it_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(Args(device="cpu", iterations=4, repeats=1, **SMALL))
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line[:8].strip()}
    for name in ("digits", "fashion", "large"):
        assert len(rows[name]) == 12
        assert float(rows[name][4]) > 0  # the loop over what it needs
        assert rows[name][-1] == "0"  # a CPU never waits
    printed = "\n".join(lines)
    assert "4 images" in printed
    assert "2 images" in printed
    assert "Joint takes" in printed
