"""Docstrings name things by Sphinx's roles; pages show them as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?(?:[\w.]+\.)?(\w+)`")


class Roles(griffe.Extension):
    """Writes ``Equilibrium`` for a role with ``jiio_plugins.equilibrium.layer.Equilibrium``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """What the docstring says, with names for roles."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
