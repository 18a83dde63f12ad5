"""Where a library is not installed, what needs it is skipped and nothing fails."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ("deepinv", "torchdeq"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_what_needs_a_library_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    paths = [str(tmp_path), str(ROOT), str(ROOT / "adapters")]
    tests = ["tests/adapters/torchdeq", "adapters/jiio_deepinv", "tests/cli/test_main.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "torchdeq is not installed" in run.stdout
    assert "deepinv is not installed" in run.stdout
    assert " passed" in run.stdout  # what needs none of them
