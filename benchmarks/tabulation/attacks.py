"""Tables of attacks, of their costs, and of robust accuracy."""

from __future__ import annotations

import re
from typing import Any

from jiio_plugins.evaluation import Row

from .kept import table

NAMES = {
    "nested cold, 20 steps, tol 0.001, 0.3 → 0.03 ε": "nested PGD-20, step 0.3 ε → 0.03 ε",
    "nested cold, 20 steps, tol 0.001, 2 → 0.1 ε": "nested PGD-20, step 2 ε → 0.1 ε",
    "nested cold, 20 steps, tol 0.01, 0.3 → 0.03 ε": "the same to 1e-2, step 0.3 ε → 0.03 ε",
    "nested cold, 20 steps, tol 0.01, 2 → 0.1 ε": "the same to 1e-2, step 2 ε → 0.1 ε",
}


def attacks(found: dict[str, Any], *, timed: bool = True) -> str:
    """Strength beside cost, an attack a line."""
    costs = ["f_evals", "vjps", "verification"] + ["seconds"] * timed
    gradient = sum(found["gradient"].values())
    rows = []
    for r in found["rows"]:
        cost = [f"{r[key]:.1f}" if r[key] else "" for key in costs]
        price = (r["f_evals"] + r["vjps"]) / gradient
        cost.insert(2, f"{price:.1f}" if price else "")
        name = NAMES.get(r["method"], r["method"])
        rows.append([name, f"{100 * r['accuracy']:.1f} %", f"{r['loss']:.2f}", *cost])
    head = "attack | accuracy | loss | f | VJP | in gradients | f + VJP of the verification"
    return table(head + " | seconds" * timed, rows)


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


def prices(found: dict[str, Any]) -> str:
    """The shortest attack that is as strong as ART's, in gradients, and where its passes go."""
    rows, parts = [], []
    for name, r in found["results"].items():
        cost, verified = r["row"]["cost"], r["row"]["cost"] + r["row"]["verification"]
        ratios = [f"{c / g:.2f}" for g in r["gradients"].values() for c in (cost, verified)]
        rows.append(
            [name, str(r["iterations"]), f"{r['peer']['cost']:.0f}", f"{cost:.1f}", *ratios]
        )
        parts.append([name, *(f"{value:.1f}" for value in r["parts"].values())])
    where = " | ".join(next(iter(found["results"].values()))["parts"])
    head = "attack | iterations | f + VJP of ART's PGD-20 | of JIIO | in gradients of ART's"
    price = table(f"{head} | verified | in clean ones | verified", rows)
    return "\n\n".join([price, table(f"attack | {where}", parts)])


def norm(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The results of the attack benchmark under one norm."""
    one: dict[str, Any] = next(r for r in found["results"] if r["norm"] == name)
    return one


def best_cold(found: dict[str, Any]) -> Row:
    """Of the nested loops that solve cold, the cheapest as strong as the best."""
    cold = [Row(**r) for r in found["rows"] if r["method"] in NAMES]
    strongest = max(cold, key=lambda r: r.loss)
    return min((r for r in cold if r.as_strong_as(strongest)), key=lambda r: r.cost)


def as_strong(found: dict[str, Any], peer: Row) -> Row:
    """JIIO's cheapest run as strong as a peer."""
    runs = [Row(**r) for r in found["rows"] if r["family"].startswith("JIIO")]
    return min((r for r in runs if r.as_strong_as(peer)), key=lambda r: r.cost)


def overhead(found: dict[str, Any]) -> str:
    """The loop beside the passes that it needs."""
    rows = []
    for r in found["cpu"]:
        ms, ops, mib = r["ms"], r["operations"], r["MiB"]
        rows.append(
            [
                r["cell"],
                str(r["rows"]),
                f"{ms['loop']:.2f}",
                f"{ms['bare']:.2f}",
                f"{ms['loop'] / ms['bare']:.2f}",
                f"{ops['loop']} / {ops['bare']}",
                f"{mib['loop'] / mib['model']:.2f}",
            ]
        )
    head = (
        "cell | batch | loop, ms | bare passes, ms | ratio | operations | memory over the model's"
    )
    return table(head, rows)


def operations(found: dict[str, Any]) -> str:
    """Of one iteration on an accelerator, the loop's beside those of the passes that it needs."""
    rows = [
        [
            r["cell"],
            r["norm"],
            *(f"{r[k]['loop']} / {r[k]['bare']}" for k in ("operations", "kernels")),
        ]
        for r in found["accelerator"]
    ]
    return table("cell | ball | operations | without views", rows)


def reports(found: dict[str, Any]) -> str:
    """Each attack of each radius: what it leaves standing, and what it costs."""
    parts = []
    for report in found["reports"]:
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
            f"L2 ball of radius {report['eps']:g}: clean {100 * report['clean']['value']:.1f} %, "
            f"robust accuracy {bound}"
            f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}], "
            f"{warned or 'no'} warning{'s' if warned > 1 else ''}.",
            table("attack | attacked | broken | accuracy so far | f | VJP", rows),
        ]
    return "\n\n".join(parts)


def disagreement(found: dict[str, Any]) -> str:
    """What is left where both kinds of solves must be wrong, by either alone, and the warnings."""
    (report,) = found["reports"]
    said = {
        "both must be wrong": "agreed_accuracy",
        "the model's own answer alone": "model_accuracy",
        "a converged solve alone": "converged_accuracy",
    }
    rows = [[judge, f"{100 * report[key]['value']:.1f} %"] for judge, key in said.items()]
    kinds = ", ".join(dict.fromkeys(f"`{w['kind']}`" for w in report["warnings"]))
    return table("judged by | accuracy", rows) + f"\n\nWarnings: {kinds}."


def solvers(found: dict[str, Any]) -> str:
    """Our solvers beside the best peer, by evaluations and by seconds."""
    rows = []
    for r in found["results"]:
        runs = {run["solver"]: run for run in r["runs"]}
        ours = [runs.pop(name) for name in ("Anderson", "Broyden", "Picard")]
        cells = [f"{run['evaluations']:.1f}" if run["arrived"] else "no" for run in ours]
        peers = [run for run in runs.values() if run["arrived"]]
        fewest = min(peers, key=lambda run: run["evaluations"])
        fastest = min(peers, key=lambda run: run["seconds"])
        times = f"{ours[0]['seconds'] / fastest['seconds']:.2f}" if ours[0]["arrived"] else ""
        rows.append(
            [
                r["cell"],
                f"{r['tol']:.0e}".replace("e-0", "e-"),
                *cells,
                f"{fewest['evaluations']:.1f}, {re.split(' (?:m|eps)=', fewest['solver'])[0]}",
                f"{times}, {re.split(' (?:m|eps)=', fastest['solver'])[0]}",
            ]
        )
    head = "cell | to | Anderson | Broyden | Picard | fewest of a peer"
    return table(f"{head} | Anderson's seconds over those of the fastest peer", rows)


def zoo(found: dict[str, Any]) -> str:
    """A kind a line: JIIO with its defaults beside the stronger of two PGD-20."""
    rows = []
    for kind in found["results"]:
        runs = {run["method"]: run for run in kind["runs"]}
        (ours,) = [run for name, run in runs.items() if name.endswith("(defaults)")]
        peer = runs[kind["peer"]]
        said, known = ours["summary"], peer["summary"]
        broken = ["", ""]
        if known["accuracy"] is not None:
            broken = [f"{100 * s['accuracy']:.1f} %" for s in (known, said)]
        rows.append(
            [
                kind["kind"],
                f"{kind['radius']['median']:.2f}",
                f"{100 * said['share']:.1f} ± {100 * said['share_error']:.1f} %",
                *broken,
                f"{peer['cost']:.0f}",
                f"{ours['cost']:.0f}",
                f"1/{said['gain']:.1f}",
                f"{100 * said['unjudged'] / found['samples']:.0f} %",
                f"{100 * said['status'].get('GRADIENT_UNSETTLED', 0) / found['samples']:.0f} %",
                f"{100 * said['wrong']:.1f} %",
            ]
        )
    head = "model | ρ | loss | PGD's accuracy | JIIO's | PGD's f + VJP | JIIO's | verified"
    return table(f"{head} | unjudged | unsettled | untold", rows)


def zoo_steps(found: dict[str, Any]) -> str:
    """What loops with exact gradients come to, in shares of the stronger PGD-20's loss."""
    rows = []
    for kind in found["results"]:
        shares = {run["method"]: run["summary"]["share"] for run in kind["runs"]}
        rows.append([kind["kind"], *(f"{100 * share:.1f} %" for share in shares.values())])
    return table(" | ".join(["model", *shares]), rows)


def damped(found: dict[str, Any]) -> str:
    """The same fixed points by cells ``z + a (f − z)``: strength and price by a."""
    kinds = {}
    for kind in found["results"]:
        runs = {run["method"]: run for run in kind["runs"]}
        kinds[float(kind["kind"].rpartition("-")[2])] = kind, runs
    plain = kinds[1.0][1]["JIIO, 30 (defaults)"]
    rows = []
    for a, (kind, runs) in kinds.items():
        ours, longer, peer = (runs[n] for n in ("JIIO, 30 (defaults)", "JIIO, 80", kind["peer"]))
        rows.append(
            [
                f"{a:g}",
                f"{kind['radius']['median']:.2f}",
                *(
                    f"{100 * s['share']:.1f} ± {100 * s['share_error']:.1f} %"
                    for s in (ours["summary"], longer["summary"])
                ),
                *(f"{run['cost']:.0f}" for run in (ours, longer, peer)),
                f"{100 * ours['summary']['loss'] / plain['summary']['loss']:.1f} %",
                f"{ours['cost'] / plain['cost']:.2f}",
            ]
        )
    head = "a | ρ | JIIO, 30 | JIIO, 80 | f + VJP of 30 | of 80 | of PGD-20"
    return table(f"{head} | 30: loss over that at a = 1 | f + VJP over those", rows)


def precision(found: dict[str, Any]) -> str:
    """Each way to run an attack beside the first."""
    rows = [
        [
            part["classifier"],
            row["name"],
            f"{100 * row['accuracy']:.1f} %",
            f"{row['loss']:.2f}",
            *(f"{row[key]:.1f}" for key in ("f_evals", "vjps", "verification")),
            f"{row['ratio']:.2f}",
            f"{row['first_seconds']:.0f}",
        ]
        for part in found["results"]
        for row in part["rows"]
    ]
    head = "classifier | run | accuracy | loss | f | VJP | f + VJP of the verification"
    return table(f"{head} | seconds over the first's | first call, s", rows)


def scaling(found: dict[str, Any]) -> str:
    """Seconds of an attack by size, and how they grow from one size to the next."""
    rows = []
    for axis, sizes in found["results"].items():
        for r in sizes:
            cost = f"{r['f_evals']:.0f} + {r['vjps']:.0f}"
            growth = f"{r['exponent']:.2f}" if "exponent" in r else ""
            rows.append([axis, f"{r['at']:,}", cost, f"{r['seconds']:.2f}", growth])
    return table("axis | size | f + VJP | seconds | exponent", rows)
