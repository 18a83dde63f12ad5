"""What is the user's own, named on the command line as module:function."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from jiio_plugins.utils.builds import importing_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable


def load_function(name: str, option: str) -> Callable[[], Any]:
    """A function by its name. Modules of the current folder are found, as with python -m.

    Args:
        name: ``module:function``.
        option: of the command line, for the messages.

    Raises:
        ValueError: not of that form, or no such function.
        ImportError: the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{option} must be module:function, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with importing_torchvision():  # as models of images do
            found = getattr(importlib.import_module(module), attribute, None)
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise ValueError(f"the module {module} has no function {attribute!r}")
    function: Callable[[], Any] = found
    return function


def build_network(factory: str, option: str) -> nn.Module:
    """What the function returns.

    Args:
        factory: ``module:function``. The function takes no arguments.
        option: of the command line, for the messages.

    Raises:
        ValueError: see :func:`load_function`, or it returns no module.
        ImportError: the module cannot be imported.
    """
    network = load_function(factory, option)()
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{factory} must return a torch.nn.Module, got {type(network).__name__}: a function "
            "without arguments that builds the network"
        )
    return network
