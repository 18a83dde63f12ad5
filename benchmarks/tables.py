"""The tables of README and results pages, from the results in ``docs/results/data``.

    python benchmarks/tables.py                        # write the tables into the pages
    python benchmarks/tables.py --measure attack bench --data DIR

With ``--measure`` the named benchmarks are run first, one after the other, and their results kept
with command, commit, machine, date and seeds. ``tabulation/`` has the commands and makes the
tables. One stands between two comments of a page, ``<!-- table: NAME -->`` and ``<!-- end -->``.
``tests/test_tables.py`` fails where it is another one than the results make. Where none are kept,
what stands there stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tabulation import COMMANDS, ROOT, filled, measure, pages


@dataclass
class Args:
    """Fill in the tables of the pages."""

    measure: tuple[str, ...] = ()
    """run these benchmarks first"""
    data: Path = Path("data")
    """folder of Fashion-MNIST"""


def main(args: Args) -> None:
    if unknown := sorted({*args.measure} - {*COMMANDS}):
        raise SystemExit(f"no benchmark {', '.join(unknown)}; there are {', '.join(COMMANDS)}")
    for name in args.measure:
        measure(name, args.data)
    for page in pages():
        before = page.read_text()
        if (after := filled(before)) != before:
            page.write_text(after)
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
