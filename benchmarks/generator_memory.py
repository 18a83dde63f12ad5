"""How long ``jiio train-generator`` takes to show progress, and its memory over epochs.

    python benchmarks/generator_memory.py --data DIR [--epochs 5]

Both on Fashion-MNIST's 60,000 training images and as a user runs it, from a shell: the clock starts
with the process and stops when the bar shows the first finished step, with default settings (the
processor time used by then says what it would be on an idle machine).
Resident memory is read while a small generator goes through whole epochs, with the table of
latents, a checkpoint and pictures in each; the largest value of every epoch is printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro

from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20
BATCH = 2000


@dataclass
class Args:
    """Measure the start and the memory of a training run."""

    data: Path = Path("data")
    """folder of Fashion-MNIST"""
    epochs: int = 5
    out: Path = Path("out/generator-memory")
    """where results.json goes"""


class Seen(NamedTuple):
    """What the progress bar said, and of the process: seconds, of the processor too, and MB."""

    step: int
    seconds: float
    cpu: float
    resident: float


def steps(command: list[str]) -> Iterator[Seen]:
    """Run it; look at it whenever its progress bar is drawn."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0
    ) as run:
        assert run.stderr is not None
        text = b""
        try:
            while part := run.stderr.read(1):
                text = (text + part)[-300:]
                if part == b"|" or part == b"[":
                    found = re.findall(rb"training:[^\r]*\| (\d+)/\d+ \[$", text)
                    if found:
                        stat = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()
                        cpu, pages = int(stat[11]) + int(stat[12]), int(stat[21])
                        seconds = time.perf_counter() - begin
                        yield Seen(int(found[-1]), seconds, cpu / TICK, pages * PAGE)
        finally:
            run.kill()
    if run.returncode > 0:
        raise SystemExit(f"the run failed: {text.decode()}")


def main(args: Args) -> None:
    base = [sys.executable, "-m", "jiio_plugins", "train-generator", "--dataset", "fashion-mnist"]
    base += ["--folder", str(args.data)]
    with tempfile.TemporaryDirectory() as folder:
        progress = steps([*base, "--out", f"{folder}/default"])
        first = next(seen for seen in progress if seen.step >= 1)
        progress.close()
        print(f"first step shown after {first.seconds:.1f} s, {first.cpu:.1f} s of the processor")
        per_epoch = 60_000 // BATCH
        small = [
            "--out",
            f"{folder}/small",
            "--epochs",
            str(args.epochs),
            "--batch-size",
            str(BATCH),
            "--latents",
            "table",
            "--iterations",
            "1",
            "--warmup",
            "1",
            "--refine",
            "0",
            "--model.channels",
            "4",
            "--model.stride",
            "7",
            "--model.latent",
            "8",
            "--checkpoint-every",
            str(per_epoch),
            "--pictures-every",
            str(per_epoch),
            "--latents-kept",
            "256",
        ]
        largest = [0.0] * args.epochs
        for seen in steps([*base, *small]):
            epoch = min(seen.step // per_epoch, args.epochs - 1)
            largest[epoch] = max(largest[epoch], seen.resident)
    print("largest resident memory of each epoch, MB:", " ".join(f"{mb:.0f}" for mb in largest))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", {"first step, s": first, "epochs, MB": largest})


if __name__ == "__main__":
    main(tyro.cli(Args))
