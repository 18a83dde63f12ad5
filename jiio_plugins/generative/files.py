"""Files of a run: checkpoints that survive a kill or a full disk, and the finished generator."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from jiio_plugins.generative.config import CONFIG, Architecture, TrainConfig
from jiio_plugins.utils import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from jiio_plugins.models.decoder import MDEQDecoder

CHECKPOINT = "checkpoint.pt"
GENERATOR, LATENTS = "generator.safetensors", "latents.safetensors"
FORMAT = "jiio-plugins generator checkpoint 1"


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces the one before once it is whole; a full disk keeps that one.

    Raises:
        OSError: could not be written; the message says whether an older file is kept.
    """
    try:
        with checkpoint.replacing(path) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        kept = f"; the one before is kept ({path})" if path.exists() else ""
        raise OSError(f"could not write {path.name}{kept}: {error}. Free some space") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a nested dict of tensors and plain values; the old file stays until the new is whole.

    Raises:
        OSError: could not be written, such as on a full disk; the checkpoint before is kept.
    """
    with _whole(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read it back, tensors on the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: truncated, or not a checkpoint of train-generator.
    """
    state = checkpoint.read(path)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of jiio train-generator")
    return state


def load_state(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """``module.load_state_dict`` with an error that says which file does not fit, and how."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(
            f"{where} belongs to another model: {first} Use the settings of its run ({CONFIG} "
            "beside it)"
        ) from error


def save_config(path: Path, config: TrainConfig) -> None:
    """Write a run's settings."""
    with _whole(path) as file:
        file.write((config.to_json() + "\n").encode())


def save_generator(
    path: Path, decoder: MDEQDecoder, model: Architecture, **about_it: object
) -> None:
    """Write the weights together with what is needed to build the decoder again.

    Args:
        path: the file.
        decoder: whose weights.
        model: its sizes, all filled in.
        **about_it: plain values that :func:`about` reads.

    Raises:
        OSError: could not be written, such as on a full disk. An older file is kept.
    """
    about = {name: str(value) for name, value in about_it.items()}
    about["architecture"] = json.dumps({**asdict(model), "image_shape": decoder.image_shape})
    tensors = {name: t.detach().cpu().contiguous() for name, t in decoder.state_dict().items()}
    with _whole(path) as file:
        file.write(save(tensors, metadata=about))


def load_generator(path: str | Path) -> MDEQDecoder:
    """The generator of a run folder, or of a ``generator.safetensors``, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, or not written by :func:`save_generator`.
    """
    file = Path(path)
    file = file / GENERATOR if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no generator {file}: give the --out folder of jiio train-generator, which "
            "writes one with each checkpoint"
        )
    try:
        architecture = about(file).get("architecture")
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from error
    if architecture is None:
        raise ValueError(f"{file} does not say what it is: jiio train-generator did not write it")
    sizes = json.loads(architecture)
    shape = sizes.pop("image_shape")
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    decoder = Architecture(**sizes).build((shape[0], shape[1], shape[2]))
    load_state(decoder, weights, file)
    return decoder.eval()


def about(path: Path) -> dict[str, str]:
    """What a file of tensors says of itself, by name."""
    with safe_open(path, framework="pt") as opened:
        return opened.metadata() or {}


def save_latents(path: Path, latents: Tensor, **about_it: object) -> None:
    """Write latents together with what they are of.

    Args:
        path: the file.
        latents: ``(rows, *latent_shape)``.
        **about_it: plain values that :func:`about` reads.

    Raises:
        OSError: could not be written, such as on a full disk. An older file is kept.
    """
    about = {name: str(value) for name, value in about_it.items()}
    with _whole(path) as file:
        file.write(save({"latents": latents.detach().cpu().contiguous()}, metadata=about))


def load_latents(path: Path) -> Tensor:
    """Read latents ``(rows, *latent_shape)`` back.

    Raises:
        FileNotFoundError: there are none.
        ValueError: damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no latents {path}: jiio train-generator writes them when it is done"
        )
    try:
        return load_file(path)["latents"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
