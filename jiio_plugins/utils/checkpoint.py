"""Checkpoints a training can be killed at and resumed from, bit by bit.

A checkpoint is written to a file beside its own and moved over it, so at every moment there is a
whole one. It holds tensors and plain numbers alone and is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.optim import Optimizer


FORMAT = "jiio-plugins training checkpoint 1"


@dataclass
class Trained:
    """What a training changes, all of which a checkpoint holds.

    Attributes:
        model: its parameters and buffers.
        optimizer: its state.
        scheduler: any of torch's, or None.
        settings: plain values that must be the same when a training is resumed.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    settings: Mapping[str, Any]

    def save(self, path: str | Path, progress: Mapping[str, Any]) -> None:
        """Write model, optimiser, scheduler, the global random states and ``progress``."""
        write(
            path,
            {
                "format": FORMAT,
                "settings": dict(self.settings),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "optimizer_type": type(self.optimizer).__name__,
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scheduler_type": _kind(self.scheduler),
                "random": random_states(),
                "progress": dict(progress),
            },
        )

    def load(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restore model, optimiser and scheduler; return ``progress`` and the random states.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of another model, optimiser, scheduler or setting. Nothing
                has been changed then.
        """
        saved = read(path)
        if saved.get("format") != FORMAT:
            raise ValueError(f"{path} is not a training checkpoint of this package")
        self._check(path, saved)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        return saved["progress"], saved["random"]

    def _check(self, path: str | Path, saved: dict[str, Any]) -> None:
        own = {name: tuple(t.shape) for name, t in _tensors(self.model.state_dict()).items()}
        other = {name: tuple(t.shape) for name, t in _tensors(saved["model"]).items()}
        if own != other:
            names = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
            name = names[0]
            raise ValueError(
                f"{path} is a checkpoint of another model: {len(names)} tensors differ, first "
                f"{name!r}, {other.get(name, 'absent')} there and {own.get(name, 'absent')} here"
            )
        groups = [len(g["params"]) for g in self.optimizer.state_dict()["param_groups"]]
        saved_groups = [len(g["params"]) for g in saved["optimizer"]["param_groups"]]
        kinds = (
            ("optimizer", saved["optimizer_type"], type(self.optimizer).__name__),
            ("optimizer's parameter groups", saved_groups, groups),
            ("scheduler", saved["scheduler_type"], _kind(self.scheduler)),
        )
        settings = {**dict.fromkeys(saved["settings"]), **self.settings}
        compared = [(name, saved["settings"].get(name), value) for name, value in settings.items()]
        for what, there, here in (*kinds, *compared):
            if there != here:
                raise ValueError(
                    f"{path} was written with another {what}, {there!r}, and cannot be resumed "
                    f"with {here!r}: use the same, or another file to start afresh"
                )


def fingerprint(*tensors: Tensor) -> str:
    """Of their bytes, to tell data apart."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _kind(scheduler: Any) -> str | None:
    return None if scheduler is None else type(scheduler).__name__


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once it is whole, also if the process is killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that ``path`` is whole at every moment."""
    with replacing(path) as file:
        torch.save(dict(content), file)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint: {type(error).__name__} while reading it. Give "
            "another file, or delete it to start afresh"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def random_states() -> dict[str, Any]:
    """The global random states of torch (all devices), NumPy and Python, as plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the global state is meant)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what :func:`random_states` returned; CUDA's where as many devices are there."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
