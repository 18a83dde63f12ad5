"""Benchmarks whose results are kept: how they are run, and what is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jiio_plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "results" / "data"
LONGEST = 60
_DIGITS = "--data digits --seeds 1 --repeats 1"
_GARMENTS = (
    "--data fashion-mnist --data-dir DIR --fashion-penalty 0 --fashion-epochs 4 --seeds 1 "
    "--repeats 1"
)

_ZOO = "python benchmarks/zoo.py --threads 1"
_HARD = "--iterations 80 --kinds"
_DAMPED = [f"damped-hard-{a}" for a in (0.15, 0.3, 1, 2, 2.2)]

COMMANDS = {  # what is measured: DIR is the folder of Fashion-MNIST
    "attack": "python benchmarks/attack.py --data DIR --threads 1 --repeats 1",
    "bench": "jiio bench --threads 1 --repeats 1",
    "price": "python benchmarks/price.py --data DIR",
    "loop": "python benchmarks/loop.py --even",
    "solvers": "python benchmarks/solvers.py --rounds 3",
    "scaling": "python benchmarks/scaling.py",
    "precision": "python benchmarks/precision.py --data DIR",
    "zoo": (
        f"{_ZOO} --jobs 2 {_HARD} tutorial mdeq mdeq-dropout mondeq-plain mondeq-forward-backward "
        "mondeq-peaceman-rachford unfolded-pgd gradient-descent transformer graph inr"
    ),
    "damped": f"{_ZOO} --jobs 2 {_HARD} {' '.join(_DAMPED)}",
    "robustness": "jiio evaluate --images 500 --eps 0.125 0.25 0.5",
    "robustness-garments": (
        "jiio evaluate --weights fashion-mnist --data DIR --images 200 --eps 0.25"
    ),
    "robustness-early": (
        "jiio evaluate --model benchmarks.stops_early:classifier --dataset fashion-mnist "
        "--data DIR --suite quick --eps 0.5 --images 200"
    ),
    "gradients": "python benchmarks/adversarial_training.py --data-dir DIR --no-train --repeats 1",
    "training-digits": (
        f'python benchmarks/adversarial_training.py {_DIGITS} --methods "JIIO, default" '
        '"JIIO, carried" "PGD-8 warm, tol 0.1, cap 2" --reference "PGD-8 warm, tol 0.1, cap 2"'
    ),
    "training-garments": (
        f'python benchmarks/adversarial_training.py {_GARMENTS} --methods "JIIO, carried, two" '
        '"JIIO, 4 iterations, adjoint 2, ω 1.2, step 4" "PGD-7 warm, cap 1, step 4" '
        '"PGD-4 warm, cap 1, step 4, settled" --reference "PGD-4 warm, cap 1, step 4, settled"'
    ),
    "user-cells": "python benchmarks/user_cells.py --seeds 5",
    "few-shot": (
        "python benchmarks/meta_learning.py --minutes 1 --test-tasks 300 --parts training overhead"
    ),
    "few-shot-optimum": (
        "python benchmarks/meta_learning.py --minutes 2 --methods jiio --parts training adaptation"
    ),
    "inverse-problems": (
        "python benchmarks/inverse_problems.py --data DIR --images 32 --cost-images 16 "
        '--validation 16 --tasks "denoise 0.2" "inpaint 50 %" --methods TV "latent Adam" JIIO'
    ),
    "inverse-trained": (
        'python benchmarks/inverse_problems.py --data DIR --minutes 6 --tasks box "sensing 25 %" '
        '--no-cost --methods U-Net "unfolded PGD" DEQ-PGD "JIIO, end to end, largest 1" '
        '"JIIO, unfolded, largest 1"'
    ),
    "fits": (
        "python benchmarks/generative.py --data DIR --images 8 --adam-steps 40 --joint-steps 50"
    ),
    "spatial-fits": (
        "python benchmarks/generative.py --data DIR --generator fashion-mnist-spatial --images 8 "
        "--adam-steps 100 --joint-steps 60"
    ),
    "generator-training": (
        "python benchmarks/generator_training.py --data DIR --target 18 --max-seconds 300 "
        '--methods JIIO "gradient, warm, cap 1" "Adam, warm, cap 1"'
    ),
    "generator-memory": "python benchmarks/generator_memory.py --data DIR",
    "samples-digits": "jiio sample digits-generator --prior gaussian --fits 500",
    "samples-garments": "jiio sample fashion-mnist-generator --folder DIR --latents 2048",
    "samples-spatial": "jiio sample fashion-mnist-spatial --folder DIR --latents 2048",
}


def measure(name: str, data: Path) -> None:
    """Run a benchmark and keep what it found, with all that is needed to repeat it."""
    words = shlex.split(COMMANDS[name].replace("DIR", shlex.quote(str(data.resolve()))))
    start = [sys.executable, "-m", "jiio_plugins"] if words[0] == "jiio" else [sys.executable]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([*start, *words[1:], "--out", out], cwd=ROOT, check=True)
        whole = Path(out, "results.json")  # beside which some keep what a stopped run goes on with
        (path,) = [whole] if whole.is_file() else Path(out).glob("*.json")
        keep(name, json.loads(path.read_text()))


def keep(name: str, found: dict[str, Any]) -> None:
    """Write a benchmark's results with their origin."""
    record = {
        "command": COMMANDS[name],
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)[:9],
        "version": jiio_plugins.__version__,
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "seeds": seeds(COMMANDS[name]),
        "found": without_long_lists(found),
    }
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def seeds(command: str) -> list[int]:
    """From 0 on, as many as the command asks for."""
    asked = re.search(r"--seeds (\d+)", command)
    return list(range(int(asked[1]) if asked else 1))


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
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    together = {" %": "\N{NO-BREAK SPACE}%", " ± ": "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"}
    for spaced, kept in together.items():
        text = text.replace(spaced, kept)
    return text


def origin(name: str, _: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    r = read(name)
    seeds = ", ".join(map(str, r["seeds"]))
    return (
        f"`{r['command']}`, version {r['version']} at commit {r['commit']}, {r['machine']}, "
        f"{r['date']}, seed{'s' * (len(r['seeds']) > 1)} {seeds}. [JSON](data/{name}.json)"
    )
