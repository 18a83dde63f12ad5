"""Finding the adapters: they register as entry points of the group ``jiio_plugins.adapters``."""

from __future__ import annotations

import importlib
import io
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

from jiio_plugins.utils.builds import importing_torchvision

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

GROUP = "jiio_plugins.adapters"
# An extra cannot carry a build option, and without this one learn2learn 0.2.0 compiles stale C code
# that needs Python 3.10 or older.
_INSTALL = {
    "learn2learn": (
        "pip install --config-settings='--build-option=build_ext' learn2learn==0.2.0 'jiio-plugins'"
    )
}


def available_adapters() -> dict[str, str]:
    """Adapter name -> import package, as installed."""
    return {point.name: point.value for point in sorted(entry_points(group=GROUP))}


def install_command(name: str) -> str:
    """What installs the adapter's host library."""
    return _INSTALL.get(name, f"pip install 'jiio-plugins[{name}]'")


@contextmanager
def importing_host() -> Iterator[None]:
    """In the block a library is imported, and what it says of itself on the way is dropped.

    Such as gym's notice that it is no longer maintained, which learn2learn brings along.
    """
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), catch_warnings():
        simplefilter("ignore")
        yield


def load_adapter(name: str) -> ModuleType:
    """Import an adapter package.

    Args:
        name: one of :func:`available_adapters`: "art", "deepinv", "learn2learn", "torchattacks",
            "torchdeq".

    Returns:
        The module, e.g. ``jiio_art``.

    Raises:
        ValueError: no adapter of that name.
        ImportError: the host library is missing, or built for another torch. The message says
            what to install.
    """
    adapters = available_adapters()
    if name not in adapters:
        known = ", ".join(adapters) or "none installed"
        raise ValueError(f"no adapter called {name!r}; there are: {known}")
    try:
        with importing_host(), importing_torchvision():
            return importlib.import_module(adapters[name])
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == adapters[name]:
            raise
        raise ImportError(
            f"the adapter {name!r} needs {error.name}, which is not installed: "
            + install_command(name),
            name=error.name,
        ) from error
