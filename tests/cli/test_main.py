"""``jiio`` by itself, ``jiio adapters``, ``jiio --version``, and words that are none of its."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jiio_plugins.cli.main import COMMANDS, main, parsed
from jiio_plugins.hosts import available_adapters


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


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_a_misspelt_option_is_compared_with_those_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--imges", "3"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("--images") == 1
    assert "jiio bench --help" in said


@pytest.mark.parametrize("name", ["demo", "check", "evaluate", "bench", "train-generator"])
def test_data_has_one_name_in_all(name: str) -> None:
    out = ["--out", "run"]
    command: Any = parsed([name, "--dataset", "mnist", "--folder", "there", *out])
    of_training = name == "train-generator"
    dataset = command.data if of_training else command.dataset
    assert (dataset, command.folder) == ("mnist", Path("there"))
    older: Any = parsed([name, "--data", "there", *out])  # as commands were written before
    assert older.data == "there" if of_training else older.folder == Path("there")


def test_a_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bnch"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in COMMANDS)


def test_a_reader_that_stops_reading() -> None:
    statement = "from jiio_plugins.cli.main import main; main(['bench', '-h'])"
    run = [sys.executable, "-c", statement]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
