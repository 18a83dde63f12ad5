"""The code of the pages: python runs and prints what is shown, and commands parse."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from jiio_plugins import Solution, Status
from jiio_plugins.cli.main import parsed
from jiio_plugins.generative import TrainConfig
from jiio_plugins.generative.config import CONFIG
from jiio_plugins.generative.files import save_config
from tests.helpers import ROOT

LANGUAGES = {"python", "text", "sh", "bibtex"}  # python runs; text is output, a formula or a sketch
NEEDS = {  # pages with such code are skipped where the library is not installed
    r"^(?:from|import) (?:jiio_)?art\b": "art",
    r"^(?:from|import) (?:jiio_)?deepinv\b": "deepinv",
    r"^(?:from|import) (?:jiio_)?learn2learn\b": "learn2learn",
    r"^(?:from|import) (?:jiio_)?torchattacks\b": "torchattacks",
    r"^(?:from|import) (?:jiio_)?torchdeq\b": "torchdeq",
    r"^from matplotlib\b|\bplots\b": "matplotlib",
    r"load_digits|data=\"digits\"": "sklearn",
    r"\btrain\(TrainConfig": "lightning_fabric",
}
FENCE = re.compile(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```$", re.M)
NUMBER = r"\d+(?:\.\d+)?"
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


def alike(shown: str, printed: str) -> bool:
    """The same words, where ``...`` stands for any, and numbers that differ by a tenth at most.

    What a training or a search ends at is not the same to the digit on all machines.
    """
    text = " ".join(shown.split())
    words, numbers = re.split(NUMBER, text), re.findall(NUMBER, text)
    pattern = f"({NUMBER})".join(re.escape(w).replace(r"\.\.\.", ".*?") for w in words)
    found = re.fullmatch(pattern, " ".join(printed.split()))
    if found is None:
        return False
    pairs = zip(numbers, found.groups(), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.1, abs_tol=1e-9) for a, b in pairs)


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
    text = "\n".join(block.text for block in code)
    for pattern, library in NEEDS.items():
        if re.search(pattern, text, re.M) and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in code:
        # so that a traceback has the page's own line
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        printed = capsys.readouterr().out
        if block.shown is not None:
            same = alike(block.shown, printed)
            assert same, f"{page.name}, line {block.line} prints\n{printed}\nand not\n{block.shown}"
    for name, value in names.items():
        if isinstance(value, Solution):
            bad = {Status.NONFINITE, Status.NOT_VERIFIED} & {*value.status.tolist()}
            assert not bad, f"{name}: {value.report()}"


def test_what_is_alike() -> None:
    shown = "found 40 of 50\n... loss 1.25\n"
    assert alike(shown, "found 41 of 50\nand more, 3 lines\nloss 1.2")
    for other in ("found 40 of 60\n. loss 1.25", "found 40 of 50\n. cost 1.25", "found 40"):
        assert not alike(shown, other)


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
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mine")  # which the pages go on with
    save_config(run / CONFIG, TrainConfig(data="digits", out=run))
    for block in blocks(page):
        if block.language != "sh":
            continue
        joined = re.sub(r"\\\n\s*", "", block.text)
        for line in re.findall(r"^jiio (.+)$", joined, re.M):
            words = shlex.split(line.partition(" #")[0])
            if not {"--help", "--version"} & {*words}:
                parsed(words)
