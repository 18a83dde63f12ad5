"""What is said while something runs: its result on stdout, how it goes on stderr.

A command that is to be quiet says its result alone. Progress bars and notes pass through here, so
that one switch does for all of them.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """In the block there are no notes and no bars, where ``quiet`` is set."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def note(text: object) -> None:
    """A line about how it goes, on stderr, above a bar that is there."""
    if not _quiet.get():
        tqdm.write(str(text), file=sys.stderr)


def progress_bar(items: Any = None, *, disable: bool = False, **options: Any) -> Any:
    """A bar of tqdm, on stderr.

    Args:
        items: to go through. None: the caller updates the bar.
        disable: no bar.
        **options: further arguments of ``tqdm``.
    """
    return tqdm(items, disable=disable or _quiet.get(), **options)
