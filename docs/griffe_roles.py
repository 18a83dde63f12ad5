"""Docstrings as the site needs them: names instead of Sphinx's roles, and examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^Example:$", re.M)  # ours; the parser knows the plural


class Roles(griffe.Extension):
    """A role becomes the last part of its name, a link where the site has the object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """What the docstring says, in the words of the parser."""
        if obj.docstring:
            text = ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)


def _link(role: re.Match[str]) -> str:
    path = role[1] if "." in role[1] else f"jiio_plugins.{role[1]}"
    return f'<autoref optional identifier="{path}">`{path.rpartition(".")[2]}`</autoref>'
