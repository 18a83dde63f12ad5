"""Docstrings as the site needs them: names instead of Sphinx's roles, and examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?(?:[\w.]+\.)?(\w+)`")
EXAMPLE = re.compile(r"^Example:$", re.M)  # ours; the parser knows the plural


class Roles(griffe.Extension):
    """Writes ``Equilibrium`` for a role with ``jiio_plugins.equilibrium.layer.Equilibrium``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """What the docstring says, in the words of the parser."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)
