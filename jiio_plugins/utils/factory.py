"""A network of the user's own, named on the command line as module:function."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from torch import nn


def build_network(factory: str, option: str) -> nn.Module:
    """What the function returns. Modules of the current folder are found, as with python -m.

    Args:
        factory: ``module:function``. The function takes no arguments.
        option: of the command line, for the messages.

    Raises:
        ValueError: not of that form, no such function, or it returns no module.
        ImportError: the module cannot be imported.
    """
    name, _, attribute = factory.partition(":")
    if not name or not attribute:
        raise ValueError(f"{option} must be module:function, got {factory!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(name), attribute, None)
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(build):
        raise ValueError(f"the module {name} has no function {attribute!r}")
    network = build()
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{factory} must return a torch.nn.Module, got {type(network).__name__}: a function "
            "without arguments that builds the network"
        )
    return network
