"""The tables of README and results pages, from the results in ``docs/results/data``.

    python benchmarks/tables.py                        # write the tables into the pages
    python benchmarks/tables.py --measure attack bench --data DIR

With ``--measure`` the named benchmarks are run first, one after the other, and their results kept
with command, commit, machine, date and seed. A table stands between two comments of a page,
``<!-- table: NAME -->`` and ``<!-- end -->``. ``tests/test_tables.py`` fails where it is another
one than the results make. Where none are kept, what stands there was copied from the output of the
command.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

import jiio_plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "results" / "data"
LONGEST = 60
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

COMMANDS = {  # what is measured: DIR is the folder of Fashion-MNIST
    "attack": "python benchmarks/attack.py --data DIR --threads 1 --repeats 1",
    "bench": "jiio bench --threads 1 --repeats 1",
    "fits": (
        "python benchmarks/generative.py --data DIR --images 8 --adam-steps 40 --joint-steps 50"
    ),
    "spatial-fits": (
        "python benchmarks/generative.py --data DIR --generator fashion-mnist-spatial --images 8 "
        "--adam-steps 100 --joint-steps 60"
    ),
    "robustness": "jiio evaluate --images 500 --eps 0.125 0.25 0.5",
    "gradients": "python benchmarks/adversarial_training.py --data-dir DIR --no-train --repeats 1",
}


@dataclass
class Args:
    """Fill in the tables of the pages."""

    measure: tuple[str, ...] = ()
    """run these benchmarks first"""
    data: Path = Path("data")
    """folder of Fashion-MNIST"""


def measure(name: str, data: Path) -> None:
    """Run a benchmark and keep what it found, with all that is needed to repeat it."""
    words = COMMANDS[name].replace("DIR", str(data.resolve())).split()
    start = [sys.executable, "-m", "jiio_plugins"] if words[0] == "jiio" else [sys.executable]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([*start, *words[1:], "--out", out], cwd=ROOT, check=True)
        (found,) = (json.loads(path.read_text()) for path in Path(out).glob("*.json"))
    keep(name, found)


def keep(name: str, found: dict[str, Any]) -> None:
    """Write a benchmark's results with their origin."""
    record = {
        "command": COMMANDS[name],
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)[:9],
        "version": jiio_plugins.__version__,
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "seeds": [0],
        "found": without_long_lists(found),
    }
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def without_long_lists(value: Any) -> Any:
    """What is listed for each image, or for each setting of a sweep, is no part of a table."""
    if isinstance(value, dict):
        short = {k: v for k, v in value.items() if not (isinstance(v, list) and len(v) > LONGEST)}
        return {k: without_long_lists(v) for k, v in short.items()}
    return [without_long_lists(v) for v in value] if isinstance(value, list) else value


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return record


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the head's cells are separated by bars."""
    lines = [head.split(" | "), ["---"] * (head.count(" | ") + 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(name: str) -> str:
    """Where the figures come from, in one line."""
    r = read(name)
    seeds = ", ".join(map(str, r["seeds"]))
    return (
        f"`{r['command']}`, version {r['version']} at commit {r['commit']}, {r['machine']}, "
        f"{r['date']}, seed {seeds}. [JSON](data/{name}.json)"
    )


NAMES = {
    "nested cold, 20 steps, tol 0.001, 0.3 → 0.03 ε": "nested PGD-20, step 0.3 ε → 0.03 ε",
    "nested cold, 20 steps, tol 0.001, 2 → 0.1 ε": "nested PGD-20, step 2 ε → 0.1 ε",
    "nested cold, 20 steps, tol 0.01, 0.3 → 0.03 ε": "the same to 1e-2, step 0.3 ε → 0.03 ε",
    "nested cold, 20 steps, tol 0.01, 2 → 0.1 ε": "the same to 1e-2, step 2 ε → 0.1 ε",
}


def attacks(found: dict[str, Any], *, timed: bool = True) -> str:
    """Strength beside cost, an attack a line."""
    costs = ["f_evals", "vjps", "verification"] + ["seconds"] * timed
    rows = []
    for r in found["rows"]:
        cost = [f"{r[key]:.1f}" if r[key] else "" for key in costs]
        name = NAMES.get(r["method"], r["method"])
        rows.append([name, f"{100 * r['accuracy']:.1f} %", f"{r['loss']:.2f}", *cost])
    head = "attack | accuracy | loss | f | VJP | f of the verification" + " | seconds" * timed
    return table(head, rows)


def shares(found: dict[str, Any], *, timed: bool = True) -> str:
    """JIIO against the cold nested loop, and against the front of the warm-started ones."""
    cold, warm = [], []
    for name, v in found["verdict"].items():
        if "jiio" in v:
            seconds = [f"1/{v['seconds']:.1f}"] * timed
            cold.append([NAMES.get(name, name), v["jiio"], f"1/{v['f+VJP']:.1f}", *seconds])
        elif v.get("front") is not None:
            warm.append([name.removesuffix(" / warm"), f"{v['front']:.2f}"])
    head = "as strong as | JIIO needs | of its f + VJP" + " | of its seconds" * timed
    front = "JIIO | f + VJP of the warm-started front at equal loss"
    return "\n\n".join([table(head, cold), table(front, warm)])


def norm(name: str) -> dict[str, Any]:
    """The results of the attack benchmark under one norm."""
    found: dict[str, Any] = next(r for r in read("attack")["found"]["results"] if r["norm"] == name)
    return found


def overhead() -> str:
    rows = [[name, f"{norm(name)['overhead']['ratio']:.2f}"] for name in ("L2", "Linf")]
    return table("norm | seconds of JIIO's loop over those of bare passes", rows)


def fits(name: str) -> str:
    """The cheapest setting of each family by the cost of the batch, else by that of an image."""
    best: dict[str, dict[str, Any]] = {}
    for r in read(name)["found"]["rows"]:
        old = best.get(r["family"])
        if old is None or _price(r) < _price(old):
            best[r["family"]] = r
    rows = []
    for r in best.values():
        batch = "not reached" if r["batch_cost"] is None else f"{r['batch_cost']:.0f}"
        seconds = "" if r["batch_seconds"] is None else f"{r['batch_seconds']:.2f}"
        cost = f"{r['f_evals'] + r['vjps']:.0f}"
        error = f"{r['error']:.5f}"
        rows.append([f"{r['family']}, {r['name']}", cost, str(r["missed"]), batch, seconds, error])
    head = "method, best setting | f + VJP an image | missed | of the batch | seconds | last error"
    return table(head, rows)


def _price(row: dict[str, Any]) -> tuple[int, float]:
    """What is cheapest, and of what has not reached the target what missed it on fewest images."""
    cost = row["batch_cost"]
    return (row["missed"], row["f_evals"] + row["vjps"]) if cost is None else (-1, cost)


def reports() -> str:
    """Each attack of each radius: what it leaves standing, and what it costs."""
    parts = []
    for report in read("robustness")["found"]["reports"]:
        rows = [
            [
                a["name"],
                str(a["attacked"]),
                str(a["broken"]),
                f"{100 * a['together']['value']:.1f} %",
                f"{a['f_evals']:.1f}",
                f"{a['vjps']:.1f}",
            ]
            for a in report["attacks"]
        ]
        share, warned = report["accuracy"], len(report["warnings"])
        bound = "at most " if report["unverified"] else ""
        parts += [
            f"L2 ball of radius {report['eps']:g}: robust accuracy {bound}"
            f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}], "
            f"{warned or 'no'} warning{'s' if warned > 1 else ''}.",
            table("attack | attacked | broken | accuracy so far | f | VJP", rows),
        ]
    return "\n\n".join(parts)


def gradients() -> str:
    """Cosines to the exact gradient, the median over batches and the lowest."""
    found = read("gradients")["found"]
    sets = {n.removesuffix(" / gradients"): v for n, v in found.items() if n.endswith("gradients")}
    rows = []
    for refine in next(iter(sets.values())):
        cosines = [values[refine] for values in sets.values()]
        cells = [f"{statistics.median(c):.4f} ({min(c):.4f})" for c in cosines]
        rows.append([f"`{refine}`", *cells])
    return table("refinement | " + " | ".join(sets), rows)


def headline() -> str:
    """The README's table: what JIIO costs where it is as strong as the nested loop."""
    rows = []
    for name, what in (("L2", "attack on Fashion-MNIST, L2"), ("Linf", "the same, L∞")):
        for reference, v in norm(name)["verdict"].items():
            if "jiio" in v and reference in NAMES:
                against = f"{NAMES[reference]}, cold solves"
                rows.append([what, against, f"1/{v['f+VJP']:.1f}", f"1/{v['seconds']:.1f}"])
    found = [r for r in read("fits")["found"]["rows"] if r["batch_cost"] is not None]
    ours = min((r for r in found if r["family"] == "JIIO"), key=_price)
    for family in ("Adam, cold", "Adam, warm"):
        best = min((r for r in found if r["family"] == family), key=_price)
        cost = best["batch_cost"] / ours["batch_cost"]
        seconds = best["batch_seconds"] / ours["batch_seconds"]
        rows.append(
            ["fitting latents", f"{family}, best setting", f"1/{cost:.1f}", f"1/{seconds:.1f}"]
        )
    return table("task | instead of | f + VJP | seconds", rows)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {  # what each is made from, and how
    "headline": (("attack", "fits"), headline),
    "attack-l2": (("attack",), lambda: attacks(norm("L2"))),
    "attack-linf": (("attack",), lambda: attacks(norm("Linf"))),
    "attack-l2-shares": (("attack",), lambda: shares(norm("L2"))),
    "attack-linf-shares": (("attack",), lambda: shares(norm("Linf"))),
    "overhead": (("attack",), overhead),
    "bench": (("bench",), lambda: attacks(read("bench")["found"], timed=False)),
    "bench-shares": (("bench",), lambda: shares(read("bench")["found"], timed=False)),
    "fits": (("fits",), lambda: fits("fits")),
    "spatial-fits": (("spatial-fits",), lambda: fits("spatial-fits")),
    "robustness": (("robustness",), reports),
    "gradients": (("gradients",), gradients),
    **{f"{name}-origin": ((name,), partial(origin, name)) for name in COMMANDS},
}


def filled(text: str) -> str:
    """A page with its tables as the results make them."""

    def fill(match: re.Match[str]) -> str:
        sources, make = TABLES[match[2]]
        if not all((DATA / f"{name}.json").is_file() for name in sources):
            return match[0]
        return f"{match[1]}{make()}\n{match[3]}"

    return MARK.sub(fill, text)


def pages() -> list[Path]:
    """README, and what is under docs."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


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
