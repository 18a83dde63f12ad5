"""The code of the page on one's own DEQ runs, from its top to its end."""

from __future__ import annotations

import re
from typing import Any

import torch

from jiio_plugins import Solution, Status
from tests.helpers import ROOT


def test_every_block_runs() -> None:
    text = (ROOT / "docs" / "your-own-deq.md").read_text()
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, "your-own-deq.md", "exec"), names)
    for name in ("found", "worse", "found_there", "found_here", "found_in_order", "found_by_key"):
        solution = names[name]
        assert isinstance(solution, Solution)
        assert not set(solution.status.tolist()) & {Status.NONFINITE, Status.NOT_VERIFIED}
    assert type(names["model"][2]) is names["FixedPointLayer"]
    assert torch.allclose(names["model"](names["found"].x), names["found"].output, atol=1e-3)
