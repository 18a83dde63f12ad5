"""Random calls of the engine and its adapters on random tiny models, held against what is known.

    python benchmarks/fuzz.py --count 1000 --seed 0
    python benchmarks/fuzz.py --count 1 --first 417   # one call again

A call is told by (seed, number) alone: ``fuzzing/`` draws it. Cells contract (rates from 0.3 to
0.999), rotate, run away, draw random numbers, or return NaN for some rows. States are tensors,
tuples or dicts, of one layer or two, whose solver is this library's, their own or TorchDEQ's.
Batches have 0 to 9 rows in float64, float32, or half precision. Called are ``optimize_input`` (of
inputs and of parameters, differentiable or not), ``attack``, ``joint_solution`` with
``envelope_loss``, and the adapters. One call in ten has a bad input. What must hold of each:

- an error is a TypeError or ValueError, and names what was wrong;
- x is finite and within ball, box and mask;
- a value that is called CONVERGED is that of a solve in float64 which shares no code with the
  engine, at a state whose residual is as small as was asked;
- no verified problem is worse than its start;
- a gradient through an optimum is that of the exact one;
- a row alone ends where it does in its batch, and the same call gives the same bits;
- nothing of the caller's is changed.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import Any

import torch
import tyro
from fuzzing import checks, drawn

from jiio_plugins.utils import write_json


@dataclass(frozen=True)
class Args:
    """Random calls, each held against what is known."""

    count: int = 1000
    """calls"""
    seed: int = 0
    """of all of them"""
    first: int = 0
    """number of the first"""
    hosts: bool = True
    """through the adapters, too"""
    out: Path | None = None
    """file for the figures, as JSON"""


def run(args: Args) -> dict[str, Any]:
    """Make the calls, print what does not hold, and count."""
    begin, kinds, violations = time.perf_counter(), Counter[str](), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(args.first, args.first + args.count):
            call = drawn(args.seed, number, hosts=args.hosts)
            kinds["bad input" if call.expected else call.how] += 1
            for wrong in checks.check(call, again=number % 3 == 0):
                model, method = call.model, type(call.method).__name__
                what = [getattr(model, name, "") for name in ("kind", "layer", "form")]
                shape = tuple(getattr(call.x, "shape", ()))
                line = f"{call.how}, {', '.join(what)}, {method}, x {shape}: {wrong}"
                again = f"--seed {args.seed} --first {number} --count 1"
                violations.append(f"{line} [{again}]")
                print(violations[-1], flush=True)
    seconds = time.perf_counter() - begin
    record = {
        "calls": args.count,
        "of": dict(kinds),
        "violations": violations,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }
    print(f"{args.count} calls in {seconds:.0f} s, {dict(kinds)}: {len(violations)} violations")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"seed": args.seed, **record})
    return record


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(run(tyro.cli(Args, description=__doc__))["violations"]))
