"""What is tabled where."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from . import attacks, latents, training
from .kept import COMMANDS, DATA, ROOT, origin, read, table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


Found = dict[str, Any]


def headline(attack: Found, fits: Found) -> str:
    """The README's table: what JIIO costs where it is as strong as the nested loop."""
    rows = []
    for name, what in (("L2", "attack on Fashion-MNIST, L2"), ("Linf", "the same, L∞")):
        verdict = attacks.norm(attack, name)["verdict"]
        cold = {reference: v for reference, v in verdict.items() if reference in attacks.NAMES}
        for reference, v in cold.items():
            against = f"{attacks.NAMES[reference]}, cold solves"
            rows.append([what, against, f"1/{v['f+VJP']:.1f}", f"1/{v['seconds']:.1f}"])
        for ours in dict.fromkeys(v["jiio"] for v in cold.values()):
            if warm := verdict.get(f"{ours} / warm"):
                against = "nested PGD, warm-started, the cheapest settings of many"
                rows.append([what, against, f"1/{1 / warm['front']:.1f}", ""])
    found = [r for r in fits["rows"] if r["batch_cost"] is not None]
    ours = min((r for r in found if r["family"] == "JIIO"), key=latents.price)
    for family in ("Adam, cold", "Adam, warm"):
        best = min((r for r in found if r["family"] == family), key=latents.price)
        cost = best["batch_cost"] / ours["batch_cost"]
        seconds = best["batch_seconds"] / ours["batch_seconds"]
        rows.append(
            ["fitting latents", f"{family}, best setting", f"1/{cost:.1f}", f"1/{seconds:.1f}"]
        )
    return table("task | instead of | f + VJP | seconds", rows)


def under(norm: str, make: Callable[[Found], str]) -> Callable[[Found], str]:
    """Of the attack benchmark, what it found under one norm."""
    return lambda found: make(attacks.norm(found, norm))


GARMENTS = ("samples-garments", "samples-spatial")
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {  # made of what, and how
    "headline": (("attack", "fits"), headline),
    "attack-l2": (("attack",), under("L2", attacks.attacks)),
    "attack-linf": (("attack",), under("Linf", attacks.attacks)),
    "attack-l2-shares": (("attack",), under("L2", attacks.shares)),
    "attack-linf-shares": (("attack",), under("Linf", attacks.shares)),
    "overhead": (("loop",), attacks.overhead),
    "operations": (("loop",), attacks.operations),
    "bench": (("bench",), partial(attacks.attacks, timed=False)),
    "bench-shares": (("bench",), partial(attacks.shares, timed=False)),
    "solvers": (("solvers",), attacks.solvers),
    "scaling": (("scaling",), attacks.scaling),
    "precision": (("precision",), attacks.precision),
    "zoo": (("zoo",), attacks.zoo),
    "zoo-steps": (("zoo",), attacks.zoo_steps),
    "robustness": (("robustness",), attacks.reports),
    "robustness-garments": (("robustness-garments",), attacks.reports),
    "robustness-early": (("robustness-early",), attacks.disagreement),
    "gradients": (("gradients",), training.gradients),
    "training-digits": (("training-digits",), training.trained),
    "training-digits-differences": (("training-digits",), training.differences),
    "training-digits-steps": (("training-digits",), training.steps),
    "training-garments": (("training-garments",), training.trained),
    "training-garments-differences": (("training-garments",), training.differences),
    "training-garments-steps": (("training-garments",), training.steps),
    "user-cells": (("user-cells",), training.user_cells),
    "few-shot": (("few-shot",), training.learners),
    "few-shot-overhead": (("few-shot",), training.learner_overhead),
    "few-shot-optimum": (("few-shot-optimum",), training.optima),
    "inverse-problems": (("inverse-problems",), latents.reconstructions),
    "inverse-costs": (("inverse-problems",), latents.costs),
    "inverse-trained": (("inverse-trained",), latents.reconstructions),
    "fits": (("fits",), latents.fits),
    "spatial-fits": (("spatial-fits",), latents.fits),
    "generator-training": (("generator-training",), latents.trainings),
    "generator-vae": (("generator-training",), latents.beside_vae),
    "generator-memory": (("generator-memory",), latents.memory),
    "samples": (("samples-digits", *GARMENTS), latents.samples),
    "distances": (GARMENTS, latents.distances),
    **{f"{name}-origin": ((name,), partial(origin, name)) for name in COMMANDS},
}


def filled(text: str) -> str:
    """A page with its tables as the results make them."""

    def fill(match: re.Match[str]) -> str:
        sources, make = TABLES[match[2]]
        if not all((DATA / f"{name}.json").is_file() for name in sources):
            return match[0]
        return f"{match[1]}{make(*(read(name)['found'] for name in sources))}\n{match[3]}"

    return MARK.sub(fill, text)


def pages() -> list[Path]:
    """README, and what is under docs."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
