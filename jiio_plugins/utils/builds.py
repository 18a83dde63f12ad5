"""Libraries that are built for one version of torch. Another cannot import them."""

from __future__ import annotations

from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SAME_PLACE = (
    "install torch and torchvision from the same place, "
    "https://pytorch.org/get-started/locally/ has the command"
)


class OtherBuildError(ImportError):
    """The torchvision that is installed is built for another torch."""


@contextmanager
def importing_torchvision() -> Iterator[None]:
    """In the block torchvision is imported, or what brings it along.

    Raises:
        OtherBuildError: it is built for another torch. The message says what to do.
    """
    try:
        yield
    except (AttributeError, ImportError, RuntimeError) as error:
        # what is not installed is not of another build
        if isinstance(error, ModuleNotFoundError) or not _from_torchvision(error):
            raise
        from torch import __version__

        said = str(error).partition("\n")[0]
        raise OtherBuildError(
            f"torchvision cannot be imported, as it is built for another torch than {__version__} "
            f"({said}): {SAME_PLACE}",
            name="torchvision",
        ) from error


def _from_torchvision(error: Exception) -> bool:
    """Whether it arose while a module of torchvision's was run. The message need not name it."""
    imported = (
        frame.f_globals.get("__name__", "")
        for frame, _ in walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"  # a call of its functions may fail for other reasons
    )
    return any(name.partition(".")[0] == "torchvision" for name in imported)
