"""``jiio adapters`` and ``jiio --version``."""

from __future__ import annotations

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
    assert printed.count("ready") == 5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("jiio ")
