"""The tables of README and results pages are what the kept results make."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import pytest

from benchmarks import tabulation as tables
from benchmarks.tabulation.kept import seeds
from jiio_plugins.cli.main import parsed

if TYPE_CHECKING:
    from pathlib import Path

MARKED = [page for page in tables.pages() if tables.MARK.search(page.read_text())]


@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_every_table_stands_somewhere() -> None:
    shown = {m[2] for page in MARKED for m in tables.MARK.finditer(page.read_text())}
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize("path", sorted(tables.DATA.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_are_from(path: Path) -> None:
    record = json.loads(path.read_text())
    assert set(record) == {
        "command",
        "commit",
        "version",
        "machine",
        "date",
        "seeds",
        "found",
    }
    assert record["command"] == tables.COMMANDS[path.stem]


def test_seeds_are_those_that_a_command_asks_for() -> None:
    assert seeds("python x.py --seeds 3 --rounds 5") == [0, 1, 2]
    assert seeds("jiio bench") == [0]


@pytest.mark.parametrize("command", tables.COMMANDS.values(), ids=tables.COMMANDS)
def test_commands_are_there(command: str) -> None:
    first, *words = shlex.split(command)
    if first == "jiio":
        parsed(words)
    else:
        assert (tables.ROOT / words[0]).is_file()
