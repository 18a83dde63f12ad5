"""The README's code prints what it says."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from tests.helpers import ROOT

if TYPE_CHECKING:
    import pytest


def test_readme_quickstart_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(import torch.*?)```\n\n(    .*?)\n\n", text, re.S)
    assert code is not None
    names = {"__name__": "readme"}
    exec(compile(code[1], "README.md", "exec"), names)
    assert capsys.readouterr().out.strip() == textwrap.dedent(code[2]).strip()
    more = re.findall(r"```python\n(from .*?)```", text, re.S)
    assert len(more) == 2
    for block in more:  # with the network of the first
        exec(compile(block, "README.md", "exec"), names)
        assert names["x_adv"].shape == (8, 1, 8, 8)
        assert names["attack"].solution is not None
