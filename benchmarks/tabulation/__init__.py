"""Results that are kept, with the commands they are from, and the tables that are made of them."""

from .kept import COMMANDS, DATA, ROOT, measure
from .pages import MARK, TABLES, filled, pages

__all__ = ["COMMANDS", "DATA", "MARK", "ROOT", "TABLES", "filled", "measure", "pages"]
