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


def headline(attack: Found, price: Found, fits: Found) -> str:
    """The README's table: what JIIO costs where it is as strong as others at their best."""
    rows = []
    for name, what in (("L2", "Fashion-MNIST, L2"), ("Linf", "Fashion-MNIST, L∞")):
        art = price["results"][what]
        what = f"attack on {what}"
        ratios = [art["peer"][key] / art["row"][key] for key in ("cost", "seconds")]
        rows.append([what, "ART's PGD-20", *(f"1/{ratio:.1f}" for ratio in ratios)])
        found = attacks.norm(attack, name)
        peer = attacks.best_cold(found)
        ours = attacks.as_strong(found, peer)
        ratios = [peer.cost / ours.cost, peer.seconds / ours.seconds]
        label = "nested PGD-20, cold solves, the best of four"
        rows.append([what, label, *(f"1/{ratio:.1f}" for ratio in ratios)])
        fronts = [v["front"] for v in found["verdict"].values() if "front" in v]
        worst, best = (f"1/{1 / share:.1f}" for share in (max(fronts), min(fronts)))
        label = "nested PGD, warm-started, the cheapest of many settings"
        rows.append([what, label, f"{worst} to {best}", ""])
    arrived = [r for r in fits["rows"] if r["batch_cost"] is not None]
    joint, adam = (
        min((r for r in arrived if r["family"] == family), key=latents.price)
        for family in ("JIIO", "Adam, warm")
    )
    shares = [f"1/{adam[key] / joint[key]:.1f}" for key in ("batch_cost", "batch_seconds")]
    rows.append(["fitting latents", "Adam, warm-started, its best setting", *shares])
    return table("task | instead of | f + VJP | seconds", rows)


def under(norm: str, make: Callable[[Found], str]) -> Callable[[Found], str]:
    """Of the attack benchmark, what it found under one norm."""
    return lambda found: make(attacks.norm(found, norm))


GARMENTS = ("samples-garments", "samples-spatial")
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {  # made of what, and how
    "headline": (("attack", "price", "fits"), headline),
    "attack-l2": (("attack",), under("L2", attacks.attacks)),
    "attack-linf": (("attack",), under("Linf", attacks.attacks)),
    "attack-l2-shares": (("attack",), under("L2", attacks.shares)),
    "attack-linf-shares": (("attack",), under("Linf", attacks.shares)),
    "price": (("price",), attacks.prices),
    "overhead": (("loop",), attacks.overhead),
    "operations": (("loop",), attacks.operations),
    "bench": (("bench",), partial(attacks.attacks, timed=False)),
    "bench-shares": (("bench",), partial(attacks.shares, timed=False)),
    "solvers": (("solvers",), attacks.solvers),
    "scaling": (("scaling",), attacks.scaling),
    "precision": (("precision",), attacks.precision),
    "zoo": (("zoo",), attacks.zoo),
    "zoo-steps": (("zoo",), attacks.zoo_steps),
    "damped": (("damped",), attacks.damped),
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
