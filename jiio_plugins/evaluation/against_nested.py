"""JIIO beside the nested loop at its strongest settings.

For a ball within the pixel box these run on the same images:

* the nested loop, cold: two step schedules, relative tolerances 1e-3 and 1e-2 in both solves.
* the nested loop, warm-started: every combination of tolerance, outer steps, inner cap and first
  step, with JIIO's own schedule and warm-up. Its Pareto front is what JIIO is held against.
* JIIO at several numbers of iterations, and a short run with a longer one for the images that
  withstand it (the verification that finds these counts).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from jiio_plugins.attacks import attack
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.evaluation.comparison import SWEEP, Comparison, Row, cost_at
from jiio_plugins.methods.joint import Joint
from jiio_plugins.methods.nested import Nested
from jiio_plugins.utils.console import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jiio_plugins.evaluation.attack import Run
    from jiio_plugins.methods.base import Method

# of the warm-started nested loop
TOLERANCES = (1e-3, 1e-2, 1e-1, 3e-1)
OUTER = (10, 15, 20, 30, 40)
CAPS = (1, 2, 30)
STEPS = (0.5, 1.0, 2.0)
# iterations of JIIO; with a retry, 40 more for the images that withstand them
JOINT = (8, 10, 12, 15, 20, 22, 30, 45, 80)
RETRY = (12, 14, 15)


def compare_with_nested(
    comparison: Comparison,
    others: Iterable[tuple[Row, Run]] = (),
    *,
    sweep: bool = True,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure both and say at what share of the nested loop's cost JIIO is as strong.

    Args:
        comparison: model, images and ball. Its ``rows`` are filled and printed.
        others: further attacks to compare, each with its row.
        sweep: run the settings of the warm-started nested loop.
        repeats: times each attack outside the sweep is run, all of them in turn, for its seconds.

    Returns:
        For JSON: JIIO's cheapest run as strong as cold PGD-20, and each run against the front of
        the sweep.
    """
    contenders = [*others, *_cold(comparison), *_joint(comparison)]
    for _ in progress_bar(range(repeats), desc="compared rows"):
        for row, run in contenders:
            comparison.measure(row, run)
    if sweep:
        for row, method in progress_bar(warm_settings(), desc="nested warm sweep"):
            comparison.measure(row, _run(comparison, method))
    print(f"\n{comparison}")
    cold = [r for r in comparison.rows if r.family == _cold_family(1e-3)]
    found = {r.method: comparison.against(r) for r in cold}
    if sweep:
        ours = [r for r in comparison.rows if r.family == "JIIO"]
        found |= {f"{r.method} / warm": _against_front(r, comparison.sweep) for r in ours}
    return {name: shares for name, shares in found.items() if shares}


def warm_settings() -> list[tuple[Row, Nested]]:
    """Every warm-started nested setting. A cap of 1 leaves the tolerance without effect."""
    out = []
    for tol, outer, cap, step in itertools.product(TOLERANCES, OUTER, CAPS, STEPS):
        if cap == 1 and tol != TOLERANCES[0]:
            continue
        solver = Anderson(max_iter=cap, tol=tol)
        method = Nested(max_iter=outer, step_size=step, warm_start=True, solver=solver)
        name = f"nested warm, {outer} steps, cap {cap}, tol {tol:g}, step {step:g} ε"
        setting = {"outer": outer, "cap": cap, "tol": tol, "step": step}
        out.append((Row(name, SWEEP, setting=setting), method))
    return out


def _run(comparison: Comparison, method: Method, retry: Method | None = None) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = attack(model, x, y, **vars(comparison.threat), method=method, retry=retry).x
        assert isinstance(found, Tensor)
        return found

    return run


def _cold_family(tol: float) -> str:
    return f"nested, cold, tol {tol:g}"


def _cold(comparison: Comparison) -> list[tuple[Row, Run]]:
    out = []
    for tol, (first, last) in itertools.product((1e-3, 1e-2), ((0.3, 0.03), (2.0, 0.1))):
        method = Nested(
            max_iter=20, step_size=first, final_step_size=last, solver=Anderson(tol=tol)
        )
        name = f"nested cold, 20 steps, tol {tol:g}, {first:g} → {last:g} ε"
        out.append((Row(name, _cold_family(tol)), _run(comparison, method)))
    return out


def _joint(comparison: Comparison) -> list[tuple[Row, Run]]:
    out = [
        (Row(f"JIIO, {k} iterations", "JIIO"), _run(comparison, Joint(max_iter=k))) for k in JOINT
    ]
    for k in RETRY:
        row = Row(f"JIIO, {k} iterations, retry with 40", "JIIO with retry")
        out.append((row, _run(comparison, Joint(max_iter=k), Joint(max_iter=40))))
    return out


def _against_front(row: Row, sweep: list[Row]) -> dict[str, Any]:
    peer = cost_at(row.loss, sweep)
    real = min((r.cost for r in sweep if r.loss >= row.loss), default=None)
    if peer is None or real is None:
        print(f"{row.method}: loss {row.loss:.3f}, which no warm-started nested point reaches")
        return {}
    print(
        f"{row.method}: f+VJP {row.cost / peer:.2f} of the warm-started nested front at equal "
        f"loss ({row.cost / real:.2f} of its cheapest point that is at least as strong)"
    )
    return {"front": row.cost / peer, "point": row.cost / real}
