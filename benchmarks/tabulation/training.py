"""Tables of trainings: against attacks, and of few-shot learners."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from .kept import table


def gradients(found: dict[str, Any]) -> str:
    """Cosines to the exact gradient, the median over batches and the lowest."""
    sets = {n.removesuffix(" / gradients"): v for n, v in found.items() if n.endswith("gradients")}
    rows = []
    for refine in next(iter(sets.values())):
        cosines = [values[refine] for values in sets.values()]
        cells = [f"{statistics.median(c):.4f} ({min(c):.4f})" for c in cosines]
        rows.append([f"`{refine}`", *cells])
    return table("refinement | " + " | ".join(sets), rows)


def trained(found: dict[str, Any]) -> str:
    """Accuracies of each seed, and what a step costs."""
    runs: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, value in found.items():
        if "/ seed" in key:
            runs[key.split(" / ")[1]].append(value)
    rows = []
    for name, seeds in runs.items():
        robust, clean = (
            ", ".join(f"{100 * r['report'][what]['value']:.1f}" for r in seeds) + " %"
            for what in ("accuracy", "clean")
        )
        seconds = [r["seconds a step"] for r in seeds]
        residuals = [r["history"][-1]["residual"] for r in seeds]
        rows.append(
            [
                name,
                robust,
                clean,
                " to ".join(dict.fromkeys(f"{s:.3f}" for s in (min(seconds), max(seconds)))),
                f"{seeds[0]['f']:.1f}",
                f"{seeds[0]['vjp']:.1f}",
                f"{max(residuals):.3f}",
            ]
        )
    head = "training | robust, per seed | clean, per seed | CPU s a step | f | VJP"
    return table(f"{head} | residual of z, largest", rows)


def differences(found: dict[str, Any]) -> str:
    """Paired differences to the reference, in points."""
    rows = []
    for name, gaps in next(v for k, v in found.items() if k.endswith("/ differences")).items():
        cells = [
            f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for value, low, high in (gaps["robust"], gaps["clean"])
        ]
        rows.append([name, *cells])
    return table(f"minus {found['args']['reference']} | robust | clean", rows)


def steps(found: dict[str, Any]) -> str:
    """One step of every method, on the shipped weights and on trained ones."""
    shipped, trained = (v for k, v in found.items() if " / steps" in k)
    ours = "JIIO, default"
    rows = []
    for name, r in shipped.items():
        cells = [
            text
            for where in (shipped, trained)
            for text in (
                f"{where[name]['seconds']:.3f}",
                f"{where[name]['loss']:.3f}",
                f"{where[ours]['seconds'] / where[name]['seconds']:.2f}",
            )
        ]
        rows.append([name, f"{r['f']:.1f}", f"{r['vjp']:.1f}", *cells])
    head = "one step | f | VJP | shipped: CPU s | loss found | the default's seconds over these"
    return table(f"{head} | trained: CPU s | loss found | the default's seconds over these", rows)


def user_cells(found: dict[str, Any]) -> str:
    """Cells that are not ours: means over seeds, robust accuracy of each, and how far apart."""
    runs: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for key, value in found.items():
        if "/ seed" in key:
            kind, name, _ = key.split(" / ")
            runs[kind, name].append(value)
    rows = []
    for (kind, name), seeds in runs.items():
        judged = {k: [100 * r["judged"][k] for r in seeds] for k in seeds[0]["judged"]}
        (peer,) = [run for (other, by), run in runs.items() if other == kind and "PGD" in by]
        pairs = zip(judged["robust"], peer, strict=True)
        beyond = [ours - 100 * theirs["judged"]["robust"] for ours, theirs in pairs]
        error = statistics.stdev(beyond) / len(beyond) ** 0.5
        rows.append(
            [
                kind,
                name,
                f"{statistics.mean(judged['clean']):.1f} %",
                f"{statistics.mean(judged['robust']):.1f} %",
                ", ".join(f"{v:.1f}" for v in judged["robust"]) + " %",
                "" if seeds is peer else f"{statistics.mean(beyond):+.1f} ± {error:.1f}",
                f"{min(judged['verified']):.1f} %",
                f"{statistics.mean(r['seconds'] for r in seeds):.0f}",
            ]
        )
    head = "cell | training | clean | robust | robust, per seed | minus PGD-7 | verified, lowest"
    return table(f"{head} | CPU s", rows)


def learners(found: dict[str, Any]) -> str:
    """Accuracy after equal time."""
    rows = [
        [name, f"{100 * r['accuracy']:.1f} ± {100 * r['half_width']:.1f} %", f"{r['steps']:,}"]
        for name, r in found["training"].items()
    ]
    return table("method | accuracy | meta-steps", rows)


def learner_overhead(found: dict[str, Any]) -> str:
    r = found["overhead"]
    row = [f"{r['adapt']:.2f}", f"{r['bare']:.2f}", f"{r['ratio']:.2f}"]
    return table("CPU s of `adapt` | of bare passes | ratio", [row])


def optima(found: dict[str, Any]) -> str:
    """Cost of a task's optimum, the best setting of each method."""
    r = found["adaptation"]
    ours = r["best"]["joint"]["f_evals"] + r["best"]["joint"]["vjps"]
    rows = []
    for name, best in r["best"].items():
        cost = best["f_evals"] + best["vjps"]
        setting = ", ".join(f"{k} {v:g}" for k, v in best["setting"].items())
        times, seconds = f"{cost / ours:.1f}", f"{best['seconds']:.1f}"
        rows.append([name, setting, str(best["arrived"]), f"{cost:.0f}", times, seconds])
    return table("method | best setting | arrived | f + VJP | of joint | seconds", rows)
