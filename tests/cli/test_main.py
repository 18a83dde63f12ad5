"""``jiio adapters`` and ``jiio --version``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from jiio_plugins.cli.main import main
from jiio_plugins.hosts import available_adapters

if TYPE_CHECKING:
    import pytest


def test_adapters_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["adapters"])
    printed = capsys.readouterr().out
    assert set(available_adapters()) == {
        "art",
        "deepinv",
        "learn2learn",
        "torchattacks",
        "torchdeq",
    }
    there = [name for name in available_adapters() if find_spec(name)]
    assert printed.count("ready") == len(there)
    for name in {*available_adapters()} - {*there}:
        assert f"needs {name}: " in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("jiio ")
