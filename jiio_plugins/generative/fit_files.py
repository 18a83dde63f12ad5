"""``jiio fit``: latents and reconstructions of image files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jiio_plugins.data.files import SUFFIXES, read_files
from jiio_plugins.data.images import to_unit
from jiio_plugins.generative.config import CONFIG, check_penalty
from jiio_plugins.generative.files import LATENTS, load_generator, save_latents
from jiio_plugins.generative.latents import Fit, fit
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.methods.joint import Joint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from jiio_plugins.generative.config import FitConfig


def fit_files(config: FitConfig) -> Fit:
    """Fit image files. Write ``latents.safetensors``, ``fits.png`` and one PNG for each image.

    Raises:
        FileNotFoundError: a path that is not there, or no generator.
        ValueError: nothing readable, or images of another size. ``out`` is a run's folder.
    """
    out = config.out
    if (out / CONFIG).exists():
        raise ValueError(
            f"{out} is the folder of a run, whose latents would be replaced: give another --out"
        )
    check_penalty(config.latent_penalty)
    decoder = load_generator(config.run)
    files, images = _read(_find(config.images), decoder.image_shape, config.resize)
    method, penalty = Joint(max_iter=config.iterations), config.latent_penalty
    fitted = fit(decoder, images, method=method, latent_penalty=penalty, progress=True)
    out.mkdir(parents=True, exist_ok=True)
    save_latents(out / LATENTS, fitted.latents)
    write_sheet(out / "fits.png", torch.stack([images, fitted.images], 1).flatten(0, 1), 8)
    for k, path in enumerate(files):
        write_sheet(out / f"{k:04d}-{path.stem}.png", fitted.images[k : k + 1], 1)
        print(f"{float(fitted.psnr[k]):6.2f} dB  {path}")
    print(f"mean {float(fitted.psnr.mean()):.2f} dB; latents in {out / LATENTS}")
    return fitted


def _find(paths: Sequence[Path]) -> list[Path]:
    """Files as they are. Folders are searched recursively."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        files += inside if path.is_dir() else [path]
    return files


def _read(files: list[Path], shape: tuple[int, ...], resize: bool) -> tuple[list[Path], Tensor]:
    """The readable files, and their images in [0, 1] of the generator's ``shape``."""
    channels, height, width = shape
    if resize and height != width:
        raise ValueError(
            f"--resize makes squares, the generator makes {width}×{height} pixels: bring the "
            "images to that size"
        )
    pixels, skipped = read_files(files, height if resize else None, channels)
    for path in skipped:
        print(f"skipped, not readable: {path}")
    files = [p for p in files if p not in set(skipped)]
    if not files:
        raise ValueError(f"none of the {len(skipped)} files given can be read as an image")
    if pixels.shape[2:] != (height, width):
        raise ValueError(
            f"the generator makes {width}×{height} pixels, the images have "
            f"{pixels.shape[3]}×{pixels.shape[2]}: --resize crops and scales them"
        )
    return files, to_unit(pixels)
