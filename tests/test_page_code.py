"""The code of the pages: python runs and prints what is shown, and commands parse."""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import re
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import tyro

from jiio_plugins import Solution, Status
from jiio_plugins.cli.main import Command
from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

LANGUAGES = {"python", "text", "sh", "bibtex"}  # python runs; text is output, a formula or a sketch
HOSTS = {"art", "deepinv", "learn2learn", "torchattacks", "torchdeq", "sklearn", "matplotlib"}
FENCE = re.compile(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```$", re.M)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


class Block(NamedTuple):
    """A fenced block; ``shown`` is what the page says it prints, the block right after it."""

    language: str
    text: str
    line: int
    shown: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(FENCE.finditer(text))
    out = []
    for match, after in itertools.zip_longest(found, found[1:]):
        prints = after and after[2] == "text" and not text[match.end() : after.start()].strip()
        indent = len(match[1])
        body = "".join(line[indent:] or "\n" for line in match[4].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        out.append(Block(match[2], body, line, after[4] if prints and after else None))
    return out


def named(pages: list[Path]) -> Any:
    ids = [str(page.relative_to(ROOT)) for page in pages]
    return pytest.mark.parametrize("page", pages, ids=ids)


WITH_CODE = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@named(WITH_CODE)
def test_blocks_run(
    page: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after the other, as a reader would type them into one session."""
    code = [block for block in blocks(page) if block.language == "python"]
    imported = set(
        re.findall(r"^(?:from|import) (?:jiio_)?(\w+)", "\n".join(b.text for b in code), re.M)
    )
    for host in sorted(imported & HOSTS):
        if importlib.util.find_spec(host) is None:
            pytest.skip(f"{host} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in code:
        # so that a traceback has the page's own line
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        printed = capsys.readouterr().out
        if block.shown is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(block.shown, printed, flags)
            assert same, f"{page.name}, line {block.line} prints\n{printed}\nand not\n{block.shown}"
    for name, value in names.items():
        if isinstance(value, Solution):
            bad = {Status.NONFINITE, Status.NOT_VERIFIED} & {*value.status.tolist()}
            assert not bad, f"{name}: {value.report()}"


@named(PAGES)
def test_blocks_say_what_they_are(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    text = FENCE.sub("", page.read_text())
    indented = [
        line
        for before, line in re.findall(r"^(.*)\n\n {4}(\S.*)$", text, re.M)
        if not re.match(r" *(?:[-*]|\d+\.|!!!|\?\?\?|===) ?", before)
    ]
    assert indented == [], "fence it: ```python, ```sh or ```text"


@named([page for page in PAGES if re.search(r"^\s*jiio ", page.read_text(), re.M)])
def test_commands_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language != "sh":
            continue
        joined = re.sub(r"\\\n\s*", "", block.text)
        for line in re.findall(r"^jiio (.+)$", joined, re.M):
            words = shlex.split(line.partition(" #")[0])
            if not {"--help", "--version"} & {*words}:
                tyro.cli(Command, args=words, prog="jiio", console_outputs=False)
