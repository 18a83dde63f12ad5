"""JIIO against PGD on deep equilibrium models as public code builds and trains them, in one run.

    python benchmarks/zoo.py [--kinds tutorial mdeq] [--samples 200] [--out out/benchmark-zoo]

Every kind of ``zoo_models`` is trained, or loaded from ``--cache``. Then it is attacked by

* PGD-20 with implicit gradients, with two schedules of its step. Each of its points is solved for z
  and for μ from scratch, by Anderson to 1e-3, each row for as long as it needs;
* the same with the steps of JIIO, from scratch and warm from the last point. They tell what as many
  steps along exact gradients come to;
* :class:`jiio_plugins.Joint` with its defaults, and with each of ``--iterations``.

All points are judged by solves in float64 that share no code with either, and by the model's own
answer. What counts of a row is the smaller loss of the two, and a class that is wrong by both. The
judge also compares the last gradient of each loop with the exact one at the same x. The columns:

* loss, accuracy: of all rows. The loss of an image is its squared error;
* share: of the loss of the stronger PGD, and its standard error, by rows;
* f+VJP: a row, then with the final verification. gain: PGD's f+VJP over the method's, both with it;
* cosine: of the two gradients, the median; wrong: rows below 0.9 whose status is CONVERGED;
* short: rows whose loss is more than 3 % below that of the stronger PGD; flagged: those of them
  whose status is another than CONVERGED;
* unjudged: rows for which the judge itself did not converge.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from zoo_models import KINDS, Case, Judge, load

from jiio_plugins import Anderson, Joint, Nested, Status, count_evaluations, optimize_input
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins import Solution
    from jiio_plugins.methods import Method, Progress

SHORT = 0.97  # of PGD's loss
ALIGNED = 0.9  # cosine above which a gradient is worth its name
SOLVER = Anderson(max_iter=200, tol=1e-3)
PGD = {
    "PGD-20, ε/4": Nested(solver=SOLVER, step_size=0.25, final_step_size=0.25),
    "PGD-20, ε to 0.04 ε": Nested(solver=SOLVER, step_size=1.0, final_step_size=0.04),
}

EXACT = {
    "JIIO's steps, cold": Nested(solver=SOLVER),
    "JIIO's steps, warm": Nested(solver=SOLVER, warm_start=True),
}


@dataclass
class Args:
    """Benchmark on the zoo of hard DEQs."""

    kinds: tuple[str, ...] = tuple(KINDS)
    """which models"""
    samples: int = 200
    """rows of each attack, at most 500"""
    iterations: tuple[int, ...] = (10, 80)
    """of JIIO, besides its defaults"""
    cache: Path = Path("out/zoo-weights")
    """folder of trained weights: what it lacks is trained"""
    out: Path = Path("out/benchmark-zoo")
    threads: int = 2
    """of each job"""
    jobs: int = 1
    """models that are attacked at a time"""


@dataclass
class Run:
    """What one method did on one case.

    Attributes:
        method: its name.
        loss: of each row, the smaller one of what the judge and the model's own answer say.
        judged: whether the judge converged, of each row.
        right: whether the class is right by either, of each row. Empty where the model is no
            classifier.
        status: names, of each row.
        cosine: of the loop's last gradient with the exact one, of each row. None where the judge
            did not converge.
        cost: f+VJP a row.
        cost_verified: the same with the final verification.
        seconds: of the call.
    """

    method: str
    loss: list[float]
    judged: list[bool]
    right: list[bool]
    status: list[str]
    cosine: list[float | None]
    cost: float
    cost_verified: float
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)


def run(name: str, method: Method, case: Case, judge: Judge) -> tuple[Run, Tensor]:
    """Attack and judge. Also the points that were found."""
    last: list[Progress] = []

    def keep(progress: Progress) -> None:
        last[:] = [progress]

    begin = time.perf_counter()
    solution: Solution = optimize_input(
        case.model,
        case.x,
        case.objective,
        method=method,
        constraint=case.constraint,
        callback=keep,
    )
    seconds = time.perf_counter() - begin
    x, stats = solution.x, solution.stats
    verdict = judge(x)
    exact = judge(last[0].v.reshape(case.x.shape), gradient=True)
    cosine = cosine_similarity(exact.gradient.flatten(1), last[0].gradient.double())
    known = exact.gradient_converged.tolist()
    cost = (stats.f_evals + stats.vjps).mean().item()
    found = Run(
        method=name,
        loss=verdict.sure_loss.tolist(),
        judged=verdict.converged.tolist(),
        right=[] if (right := verdict.right_by_either) is None else right.tolist(),
        status=[Status(int(code)).name for code in solution.status],
        cosine=[c if ok else None for c, ok in zip(cosine.tolist(), known, strict=True)],
        cost=cost,
        cost_verified=cost + (stats.verification_f_evals + stats.verification_vjps).mean().item(),
        seconds=seconds,
    )
    return found, x


def summarise(found: Run, peer: Run) -> None:
    """Fill in the figures of one run.

    Args:
        found: the run.
        peer: that of the stronger PGD.
    """
    loss, best = (torch.tensor(r.loss, dtype=torch.float64) for r in (found, peer))
    converged = torch.tensor([name == "CONVERGED" for name in found.status])
    cosine = torch.tensor([math.nan if c is None else c for c in found.cosine])
    known = torch.isfinite(cosine)
    short = loss < best - (1 - SHORT) * best.abs()
    right, of_peer = torch.tensor(found.right), best.mean()
    found.summary = {
        "loss": loss.mean().item(),
        "accuracy": right.double().mean().item() if len(right) else None,
        "share": (loss.mean() / of_peer).item(),
        "share_error": ((loss - best).std() / math.sqrt(len(loss)) / of_peer).item(),
        "gain": peer.cost_verified / found.cost_verified,
        "cosine": cosine[known].median().item() if bool(known.any()) else None,
        "wrong": ((cosine < ALIGNED) & known & converged).double().mean().item(),
        "short": int(short.sum()),
        "flagged": int((short & ~converged).sum()),
        "unjudged": found.judged.count(False),
        "status": dict(Counter(found.status)),
    }


def show(found: Run) -> None:
    s = found.summary
    accuracy = "" if s["accuracy"] is None else f"{s['accuracy']:.1%}"
    cosine = "" if s["cosine"] is None else f"{s['cosine']:.3f}"
    others = ", ".join(f"{n} {name}" for name, n in s["status"].items() if name != "CONVERGED")
    print(
        f"  {found.method:<22}{s['loss']:>8.3f}{accuracy:>9}{s['share']:>8.1%}"
        f" ±{s['share_error']:>5.1%}"
        f"{found.cost:>9.1f}{found.cost_verified:>9.1f}{s['gain']:>7.2f}{cosine:>8}"
        f"{s['wrong']:>8.1%}{s['short']:>6}{s['flagged']:>8}{s['unjudged']:>9}"
        f"{found.seconds:>7.1f}  {others}",
        flush=True,
    )


def header() -> str:
    return (
        f"  {'method':<22}{'loss':>8}{'accuracy':>9}{'share':>15}{'f+VJP':>9}{'verified':>9}"
        f"{'gain':>7}{'cosine':>8}{'wrong':>8}{'short':>6}{'flagged':>8}{'unjudged':>9}{'s':>7}"
        "  statuses other than CONVERGED"
    )


def own_evaluations(case: Case) -> float:
    """Of f a row, by the model's own solver."""
    with count_evaluations() as counter, torch.no_grad():
        case.model(case.x)
    return counter.f_evals / len(case.x)


def loaded(args: Args, kind: str, samples: int) -> Case:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    return load(kind, samples, args.cache)


def run_kind(args: Args, kind: str) -> dict[str, Any]:
    begin = time.perf_counter()
    case = loaded(args, kind, args.samples)
    ready = time.perf_counter() - begin
    judge = Judge(case)
    clean = judge(case.x)
    accuracy = None if clean.right is None else clean.right.double().mean().item()
    facts = {
        "clean_loss": clean.loss[clean.converged].mean().item(),
        "clean_accuracy": accuracy,
        "own_evaluations": own_evaluations(case),
        "unjudged_clean": int((~clean.converged).sum()),
    }
    print(
        f"\n{kind} (trained or loaded in {ready:.0f} s): clean loss {facts['clean_loss']:.3f}"
        + ("" if accuracy is None else f", accuracy {accuracy:.1%}")
        + f", its own solver takes {facts['own_evaluations']:.1f} evaluations",
        flush=True,
    )
    default = Joint()
    methods: dict[str, Method] = {
        **PGD,
        **EXACT,
        f"JIIO, {default.max_iter} (defaults)": default,
        **{f"JIIO, {k}": Joint(max_iter=k) for k in args.iterations},
    }
    runs, points = {}, {}
    for name, method in (bar := tqdm(methods.items(), leave=False)):
        bar.set_description(f"{kind}: {name}")
        runs[name], points[name] = run(name, method, case, judge)
    best = max(PGD, key=lambda name: torch.tensor(runs[name].loss).mean().item())
    radius = judge(points[best], radius=True).radius
    middle, largest = radius.median().item(), radius.max().item()
    facts["radius"] = {"median": middle, "largest": largest}
    print(f"  ρ(J_z) where {best} ended: median {middle:.3f}, largest {largest:.3f}")
    print(header())
    for found in runs.values():
        summarise(found, runs[best])
        show(found)
    every = [asdict(r) for r in runs.values()]
    return {"kind": kind, **facts, "peer": best, "runs": every}


def told(args: Args, kind: str) -> tuple[dict[str, Any], str]:
    """What there is to keep of a kind, and to print. For a process of its own."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        found = run_kind(args, kind)
    return found, text.getvalue()


def main(args: Args) -> None:
    if unknown := set(args.kinds) - set(KINDS):
        raise SystemExit(f"no such kind: {sorted(unknown)}. There are {', '.join(KINDS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []

    def keep(found: dict[str, Any]) -> None:
        results.append(found)
        results.sort(key=lambda result: args.kinds.index(result["kind"]))
        record = {"samples": args.samples, "results": results}
        write_json(args.out / "results.json", record)

    if args.jobs > 1:
        for kind in args.kinds:  # two may share weights, which must not be trained twice
            loaded(args, kind, 1)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
            for job in as_completed([pool.submit(told, args, kind) for kind in args.kinds]):
                found, text = job.result()
                print(text, end="", flush=True)
                keep(found)
    else:
        for kind in args.kinds:
            keep(run_kind(args, kind))
    print(f"\nwritten: {args.out}/results.json")


if __name__ == "__main__":
    main(tyro.cli(Args))
