"""deepinv's own tests, which its wheel ships, as modules: their tables and bodies are run here."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


def upstream(name: str) -> ModuleType:
    """A module of ``deepinv/tests``; they import each other by their bare names."""
    spec = find_spec("deepinv.tests")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = str(Path(next(iter(spec.submodule_search_locations))))
    sys.path.insert(0, folder)
    ours = sys.modules.pop("conftest", None)  # they mean their own
    try:
        return importlib.import_module(f"deepinv.tests.{name}")
    finally:
        sys.path.remove(folder)
        if ours is not None:
            sys.modules["conftest"] = ours
