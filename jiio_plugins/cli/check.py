"""``jiio check``: what a model of the user's own is like, before anything is run on it."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from jiio_plugins.cli.commands import Check
from jiio_plugins.cli.task import load_pair
from jiio_plugins.diagnosis import check
from jiio_plugins.utils.files import keep_results

FILES = ("check.json", "check.png")


def run_check(settings: Check) -> dict[str, Any]:
    """Print the sentences, write ``check.json`` and, where matplotlib is there, ``check.png``."""
    keep_results(settings.out, FILES, settings.overwrite)
    task = load_pair(settings)
    found = check(task.model, task.x)
    print(found)
    written = [settings.out / name for name in FILES]
    found.save(written[0])
    if found.plain and find_spec("matplotlib"):
        found.plot(written[1])
    else:
        written.pop().unlink(missing_ok=True)  # that of an earlier run is of another model
    print(f"written: {', '.join(str(path) for path in written)}")
    return {**asdict(found), "files": written}
