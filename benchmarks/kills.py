"""Trainings killed at random moments: each must end, bit by bit, where an undisturbed one does.

    python benchmarks/kills.py --kills 200
    python benchmarks/kills.py --kills 50 --kinds trainer --seed 1

Two kinds: the command ``jiio train-generator``, and ART's trainer with a checkpoint. A process with
everything imported forks for each run, which gets SIGKILL after a random time, or as soon as it is
writing a file. Then it is resumed. Every file that can be read is whole after each kill, and no
temporary file is left at the end. After a few kills the run is left alone, and its weights are
compared with those of one that nobody killed.

With ``--flips N`` bits of the files of a finished run are flipped, one at a time: each must be
noticed by whatever reads the file.
"""

from __future__ import annotations

import hashlib
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn

from jiio_plugins.data import load_digits
from jiio_plugins.generative import TrainConfig, load_generator, load_latents
from jiio_plugins.methods import Joint
from jiio_plugins.models import ConvDEQClassifier
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATOR = (
    "--data=kills:images --batch-size=8 --steps=10 --iterations=2 --warmup=1 --step-size=0.3 "
    "--model.latent 2 --model.channels 4 --model.expansion 1 --checkpoint-every=2 --refine=1 "
    "--accelerator=cpu --latents-kept=8 --latents=table"
)


def images() -> Tensor:
    """A few tiny ones, ``(images, c, h, w)``."""
    return torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Args:
    """Trainings killed at random moments."""

    kills: int = 200
    """of each kind"""
    kinds: tuple[str, ...] = ("generator", "trainer")
    """what is killed"""
    flips: int = 0
    """bits flipped in the files of a finished run of each kind"""
    minutes: float = 60.0
    """for each kind, at most"""
    seed: int = 0
    """of the moments"""
    out: Path | None = None
    """file for the figures, as JSON"""


def train_generator(folder: Path) -> None:
    """The command, resumed where there is a run."""
    resume = ["--resume"] if (folder / "config.json").exists() else []
    sys.argv = ["jiio", "train-generator", "--out", str(folder), *GENERATOR.split(), *resume]
    runpy.run_module("jiio_plugins", run_name="__main__")


def train_classifier(folder: Path) -> None:
    """ART's trainer."""
    from art.estimators.classification import PyTorchClassifier

    from jiio_art import JIIOAdversarialTrainer, JIIOAttack

    torch.manual_seed(0)
    model = ConvDEQClassifier(channels=4, groups=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, clip_values=(0, 1)
    )
    attack = JIIOAttack(classifier, norm=2, eps=0.3, method=Joint(max_iter=3), verbose=False)
    trainer = JIIOAdversarialTrainer(
        classifier,
        attack,
        checkpoint=folder / "run.pt",
        checkpoint_every=1,
        resume=True,
        verbose=False,
    )
    x, y = load_digits("train")
    trainer.fit(x[:48].numpy(), y[:48].numpy(), batch_size=16, nb_epochs=3)
    torch.save(model.state_dict(), folder / "weights.pt")


RUNS = {"generator": train_generator, "trainer": train_classifier}
WEIGHTS = {"generator": "generator.safetensors", "trainer": "weights.pt"}


def fork(kind: str, folder: Path) -> int:
    """A run in a process of its own."""
    if child := os.fork():
        return child
    code = 1
    try:
        log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        RUNS[kind](folder)
        code = 0
    except SystemExit as end:
        print(end.code, flush=True)
        code = 0 if end.code in (None, 0) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def finish(kind: str, folder: Path) -> float:
    """Run to the end. Returns the seconds it took."""
    begin = time.perf_counter()
    _, status = os.waitpid(fork(kind, folder), 0)
    if status:
        log = (folder.parent / "log.txt").read_text()
        raise SystemExit(f"a {kind} did not end by itself in {folder}:\n{log[-3000:]}")
    return time.perf_counter() - begin


def writing(folder: Path) -> bool:
    """Whether there is a temporary file."""
    return any(name.endswith(".tmp") for name in os.listdir(folder))


def kill(kind: str, folder: Path, after: float, *, in_writing: bool) -> str:
    """Start a run and kill it. Returns where that hit it."""
    child, begin = fork(kind, folder), time.perf_counter()
    while time.perf_counter() - begin < after or (in_writing and not writing(folder)):
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            return "after its end"
        time.sleep(0 if in_writing else 0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if writing(folder):
        return "while it wrote"
    return "between writes" if list(folder.iterdir()) else "before its first file"


def weights(kind: str, folder: Path) -> str:
    """A fingerprint of the final weights."""
    path, digest = folder / WEIGHTS[kind], hashlib.sha256()
    tensors = load_file(path) if kind == "generator" else torch.load(path, weights_only=True)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def kept(folder: Path) -> list[str]:
    """Names of its files, but for TensorBoard's, of which each start makes one."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("events"))


@dataclass
class Record:
    """What happened to one kind of run."""

    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    flips: Counter[str] = field(default_factory=Counter)


def measure(kind: str, args: Args, place: Path) -> Record:
    """Kill runs of one kind, and compare their ends with that of one which nobody killed."""
    rng, whole, warm = random.Random(f"{args.seed}/{kind}"), place / "whole", place / "warm"
    warm.mkdir(parents=True)
    with suppress(SystemExit):
        RUNS[kind](warm)  # what is imported or made once is there in those that are forked
    whole.mkdir()
    record = Record(finish(kind, whole))
    expected, files = weights(kind, whole), kept(whole)
    end = time.perf_counter() + 60 * args.minutes
    while record.kills.total() < args.kills and time.perf_counter() < end:
        folder = place / f"run{record.runs}"
        folder.mkdir()
        for _ in range(rng.randrange(1, 8)):
            after = rng.uniform(0, record.seconds)
            hit = kill(kind, folder, after, in_writing=rng.random() < 0.5)
            if hit == "after its end":
                break
            record.kills[hit] += 1
        finish(kind, folder)
        record.runs += 1
        if weights(kind, folder) != expected:
            record.wrong.append(f"{folder.name} ended elsewhere")
        elif (left := kept(folder)) != files:
            record.wrong.append(f"{folder.name} has {left} in place of {files}")
        shutil.rmtree(folder)
    flip(kind, whole, args.flips, rng, record)
    return record


def flip(kind: str, whole: Path, count: int, rng: random.Random, record: Record) -> None:
    """Flip bits of the files of a run, one at a time, and read each as its next user would."""
    files = [p for p in sorted(whole.iterdir()) if p.name in READERS or p.name in CHECKPOINTS]
    for _ in range(count):
        path = rng.choice(files)
        before = path.read_bytes()
        place = rng.randrange(len(before))
        flipped = bytes([before[place] ^ (1 << rng.randrange(8))])
        path.write_bytes(before[:place] + flipped + before[place + 1 :])
        if is_refused(kind, path):
            record.flips[path.name] += 1
        else:
            record.wrong.append(f"a bit flipped in {path.name}, byte {place}, was read as whole")
        path.write_bytes(before)


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": TrainConfig.read,
    "generator.safetensors": load_generator,
    "latents.safetensors": load_latents,
}
CHECKPOINTS = ("checkpoint.pt", "run.pt")


def is_refused(kind: str, path: Path) -> bool:
    """Whether a file is an error of one line to what reads it: a resumed run, or a function."""
    if path.name in CHECKPOINTS:
        log = path.parent.parent / "log.txt"
        log.unlink(missing_ok=True)
        _, status = os.waitpid(fork(kind, path.parent), 0)
        return status != 0 and "damaged" in log.read_text()
    try:
        READERS[path.name](path)
    except ValueError as error:
        return "\n" not in str(error)
    return False


def run(args: Args) -> dict[str, Any]:
    """All kinds."""
    records = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as place:
            record = measure(kind, args, Path(place) / kind)
        records[kind] = {**vars(record), "kills": dict(record.kills), "flips": dict(record.flips)}
        print(
            f"{kind}: {record.kills.total()} kills, {dict(record.kills)}, in {record.runs} runs of "
            f"{record.seconds:.1f} s; flips noticed: {record.flips.total()}; "
            f"wrong: {record.wrong or 'none'}",
            flush=True,
        )
    if args.out is not None:
        write_json(args.out, records)
    return records


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(any(record["wrong"] for record in run(tyro.cli(Args, description=__doc__)).values()))
