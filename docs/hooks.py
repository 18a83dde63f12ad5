"""Pages of the site that are files at the root of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The root's file in place of the page that stands for it, with links as the site has them."""
    source = PAGES.get(page.file.src_uri)
    return (ROOT / source).read_text().replace("](docs/", "](") if source else markdown
