"""Checkpoints a training can be killed at and resumed from, bit by bit.

A checkpoint is written to a file beside its own and moved over it, so at every moment there is a
whole one. It holds tensors and plain numbers alone and is read with ``weights_only=True``. Its last
bytes are a checksum of all others.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.utils.files import (
    EMPTY_SEAL,
    damaged,
    read_sealed,
    replacing,
    sealed,
    understood,
)
from jiio_plugins.utils.randomness import random_states

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.optim import Optimizer

FORMAT = "jiio-plugins training checkpoint 2"


@dataclass
class TrainingState:
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
        """Write model, optimiser, scheduler, the global random states and ``progress``.

        Args:
            path: the file, which replaces the one before once it is whole.
            progress: tensors and plain values, which :meth:`load` returns.

        Raises:
            OSError: it could not be written, such as on a full disk. The one before is kept.
        """
        write(
            path,
            {
                "format": FORMAT,
                "settings": self._common(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "random": random_states(),
                "progress": dict(progress),
            },
        )

    def load(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restore model, optimiser and scheduler. Return ``progress`` and the random states.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of another model, optimiser, scheduler or setting. Nothing
                has been changed then.
        """
        saved = read(path)
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a training checkpoint of this version of jiio-plugins: give "
                "another file, or delete it to start afresh"
            )
        missing = sorted(
            {"settings", "model", "optimizer", "scheduler", "random", "progress"} - set(saved)
        )
        if missing:
            raise damaged(path, f"it has no {', '.join(missing)}")
        check_weights(self.model, saved["model"], path)
        here, there = self._common(), saved["settings"]
        for name in {**there, **here}:
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{path} was written with another {name}, {there.get(name)!r}, and cannot be "
                    f"resumed with {here.get(name)!r}: use the same, or another file to start "
                    "afresh"
                )
        with understood(path):  # the optimiser first: it is the one that checks
            self.optimizer.load_state_dict(saved["optimizer"])
            self.model.load_state_dict(saved["model"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved["scheduler"])
        return saved["progress"], saved["random"]

    def _common(self) -> dict[str, Any]:
        """What it must have in common with the training that wrote a checkpoint."""
        groups = self.optimizer.state_dict()["param_groups"]
        settings = {
            "optimizer": type(self.optimizer).__name__,
            "optimizer's parameter groups": [len(group["params"]) for group in groups],
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            **self.settings,
        }
        # numbers of NumPy become Python's: a file that holds them cannot be read back
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=float))
        return plain


def check_weights(model: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """ValueError unless ``state``, as it stands in ``path``, has the names and shapes of a model's.

    Args:
        model: whose tensors they are to become.
        state: tensors by name. Other values are not looked at.
        path: for the message.
    """
    here, there = (
        {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
        for tensors in (model.state_dict(), state)
    )
    names = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if names:
        raise ValueError(
            f"{path} belongs to another model: {len(names)} tensors differ, first {names[0]!r}, "
            f"{there.get(names[0], 'absent')} there and {here.get(names[0], 'absent')} here. Build "
            "the model with the settings that the file was written with"
        )


def fingerprint(*tensors: Tensor) -> str:
    """Of their bytes, to tell data apart."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that ``path`` is whole at every moment."""
    whole = io.BytesIO()
    torch.save(dict(content), whole)
    whole.write(EMPTY_SEAL.encode())
    with replacing(path) as file:
        file.write(sealed(whole.getvalue()))


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    whole = io.BytesIO(read_sealed(path).removesuffix(EMPTY_SEAL.encode()))
    try:
        with understood(path):
            content = torch.load(whole, map_location="cpu", weights_only=True)
    except (EOFError, pickle.UnpicklingError) as error:
        raise damaged(path, type(error).__name__) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}")
    return content
