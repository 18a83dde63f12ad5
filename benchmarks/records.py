"""Results of benchmarks: written whole, with the version of the product, and gone on with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from pathlib import Path


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a folder's results; stop where it holds those of others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():  # what is there is not touched: another run may be reading it
        write_json(path, settings)
    elif (found := read(path)) != settings:
        raise SystemExit(
            f"{folder} holds results of other settings, {found} instead of {settings}: "
            "choose another --out"
        )


def read(path: Path) -> dict[str, Any]:
    """What :func:`jiio_plugins.utils.write_json` was given, without the version."""
    found: dict[str, Any] = json.loads(path.read_text())
    found.pop("jiio_plugins", None)
    return found
