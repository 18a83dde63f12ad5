"""Files of the root are pages of the site, and what is found in the API stands last in a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The root's file in place of the page that stands for it, with links as the site has them."""
    if page.file.src_uri.startswith("reference/api/"):
        page.meta["search"] = {"boost": 0.5}
    source = PAGES.get(page.file.src_uri)
    return (ROOT / source).read_text().replace("](docs/", "](") if source else markdown
