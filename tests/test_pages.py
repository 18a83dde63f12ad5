"""Files and names that the pages mention are there. Their code is run by test_page_code.py."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "jiio_plugins", "adapters", "examples", "tests")  # which pages name files from
# learn2learn's own, and one that a page shows
ELSEWHERE = {"gbml_test.py", "metasgd_test.py", "tests/unit/algorithms/maml_test.py"}

pages = pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)


def located(path: str) -> Path | None:
    """The file, if there is one."""
    files = (ROOT / folder / path for folder in FOLDERS)
    return next((file for file in files if file.is_file()), None)


@pages
def test_files_are_there(page: Path) -> None:
    mentioned = set(re.findall(r"[\w./-]+\.py\b", page.read_text())) - ELSEWHERE
    assert [path for path in sorted(mentioned) if not located(path)] == []


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pages
def test_names_are_there(page: Path) -> None:
    text = page.read_text()
    names = re.findall(r"\bjiio_\w+(?:\.\w+)+", re.sub(r"\S+\.(?:py|md)\b", "", text))
    names = sorted({*names} - {"jiio_plugins.adapters"})  # that is a group of entry points
    assert [name for name in names if pydoc.locate(name) is None] == []


@pages
def test_names_are_in_their_files(page: Path) -> None:
    """Of ``name`` in ``file.py``: ``Method.run`` in ``methods/base.py``."""
    lost = []
    for name, path in re.findall(r"`([\w.]+)` in `([\w./]+\.py)`", page.read_text()):
        file = located(path)
        text = file.read_text() if file else ""
        parts = (rf"\b(?:class|def) {part}\b|^{part}\b.*=" for part in name.split("."))
        if not all(re.search(part, text, re.M) for part in parts):
            lost.append((name, path))
    assert lost == []
