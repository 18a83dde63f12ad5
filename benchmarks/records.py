"""Folders of results that a benchmark goes on with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a folder's results; stop where it holds those of others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():  # what is there is not touched: another run may be reading it
        path.write_text(json.dumps(settings, indent=1) + "\n")
    elif (found := json.loads(path.read_text())) != settings:
        raise SystemExit(
            f"{folder} holds results of other settings, {found} instead of {settings}: "
            "choose another --out"
        )
