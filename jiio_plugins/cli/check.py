"""``jiio check``: what a model of the user's own is like, before anything is run on it."""

from __future__ import annotations

from importlib.util import find_spec

from jiio_plugins.cli.commands import Check
from jiio_plugins.cli.task import load_pair
from jiio_plugins.diagnosis import check


def run_check(settings: Check) -> None:
    """Print the sentences, write ``check.json`` and, where matplotlib is there, ``check.png``."""
    task = load_pair(settings, settings.device)
    found = check(task.model, task.x)
    print(found)
    out = settings.out
    found.save(out / "check.json")
    written = [out / "check.json"]
    if found.plain and find_spec("matplotlib"):
        found.plot(out / "check.png")
        written.append(out / "check.png")
    print(f"written: {', '.join(str(path) for path in written)}")
