"""Files of a run beside its checkpoint: settings, generator, latents. Each is whole or absent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import safe_open

from jiio_plugins.generative.config import Architecture, TrainConfig
from jiio_plugins.models.pretrained import GENERATORS, WEIGHTS, load_pretrained
from jiio_plugins.utils.checkpoint import check_weights
from jiio_plugins.utils.files import damaged, load_tensors, replacing, save_tensors, understood

if TYPE_CHECKING:
    from torch import Tensor

    from jiio_plugins.models.decoder import MDEQDecoder

CHECKPOINT = "checkpoint.pt"
GENERATOR, LATENTS = "generator.safetensors", "latents.safetensors"


def save_config(path: Path, config: TrainConfig) -> None:
    """Write a run's settings.

    Args:
        path: the file.
        config: the settings.

    Raises:
        OSError: could not be written, such as on a full disk. An older file is kept.
    """
    with replacing(path) as file:
        file.write(config.to_json().encode())


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
    architecture = json.dumps({**asdict(model), "image_shape": decoder.image_shape})
    save_tensors(path, decoder.state_dict(), **about_it, architecture=architecture)


def is_shipped(name: str | Path) -> bool:
    """Whether it is the name of a shipped generator, and of nothing in the current folder.

    Args:
        name: or a path.
    """
    return str(name) in GENERATORS and not Path(name).exists()


def load_generator(path: str | Path) -> MDEQDecoder:
    """A generator in eval mode, on the CPU.

    Args:
        path: the folder of a run, a ``generator.safetensors``, or the name of a shipped one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, or not written by :func:`save_generator`.
    """
    if is_shipped(path):
        return cast("MDEQDecoder", load_pretrained(str(path)))
    file = Path(path)
    file = file / GENERATOR if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no generator {file}: give the --out folder of jiio train-generator, which "
            f"writes one with each checkpoint, or a shipped one: {', '.join(GENERATORS)}"
        )
    weights, said = load_tensors(file)
    with understood(file):
        sizes = json.loads(said["architecture"])
        c, h, w = sizes.pop("image_shape")
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
        decoder = Architecture(**sizes).build((c, h, w))
    check_weights(decoder, weights, file)
    decoder.load_state_dict(weights)
    return decoder.eval()


def lowest_psnr(path: str | Path) -> float | None:
    """PSNR of the worst fit of a held-out image in a generator's training, in dB, if it is known.

    Args:
        path: as in :func:`load_generator`.
    """
    file = WEIGHTS / f"{path}.safetensors" if is_shipped(path) else Path(path)
    with safe_open(file / GENERATOR if file.is_dir() else file, framework="pt") as opened:
        said = (opened.metadata() or {}).get("lowest_psnr")
    return None if said is None else float(said)


def about(path: Path) -> dict[str, str]:
    """What a file of tensors says of itself, by name."""
    return load_tensors(path)[1]


def save_latents(path: Path, latents: Tensor, **about_it: object) -> None:
    """Write latents together with what they are of.

    Args:
        path: the file.
        latents: ``(rows, *latent_shape)``.
        **about_it: plain values that :func:`about` reads.

    Raises:
        OSError: could not be written, such as on a full disk. An older file is kept.
    """
    save_tensors(path, {"latents": latents}, **about_it)


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
    tensors, _ = load_tensors(path)
    if tensors.keys() != {"latents"}:
        raise damaged(path, f"it holds {', '.join(tensors)}, not latents")
    return tensors["latents"]
