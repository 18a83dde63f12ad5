"""``jiio fit``: latents and reconstructions of image files."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from jiio_plugins.data.files import SUFFIXES, read_files
from jiio_plugins.data.images import to_unit
from jiio_plugins.generative.config import CONFIG, check_penalty
from jiio_plugins.generative.files import LATENTS, about, load_generator, lowest_psnr, save_latents
from jiio_plugins.generative.latents import fit
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.methods.joint import Joint
from jiio_plugins.utils.console import note
from jiio_plugins.utils.device import check_device
from jiio_plugins.utils.files import keep_results, owning

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from jiio_plugins.generative.config import FitConfig

_PICTURE = re.compile(r"\d{4,}-[^/]+\.png")


def fit_files(config: FitConfig) -> dict[str, Any]:
    """Fit image files. Write ``latents.safetensors``, ``fits.png`` and one PNG for each image.

    An image is *far* if its fit is worse than those of all held-out images that the generator was
    judged by when it was trained, of 20 at least. With ``overwrite`` the PNGs of the call that the
    files are from go.

    Returns:
        The PSNR of each fit, whether the image is far (None: not known), and the files written.

    Raises:
        FileNotFoundError: a path that is not there, or no generator.
        FileExistsError: ``out`` has such files, and ``overwrite`` is not set.
        ValueError: nothing readable, or images of another size. ``out`` is a run's folder. No such
            device.
        BlockingIOError: another process writes to ``out``.
    """
    out = config.out
    if (out / CONFIG).exists():
        raise ValueError(
            f"{out} is the folder of a run, whose latents would be replaced: give another --out"
        )
    check_penalty(config.latent_penalty)
    device = check_device(config.device)
    decoder, lowest = load_generator(config.run).to(device), lowest_psnr(config.run)
    files, images = _read(_find(config.images), decoder.image_shape, config.resize)
    each = [out / f"{k:04d}-{path.stem}.png" for k, path in enumerate(files)]
    written = [out / LATENTS, out / "fits.png", *each]
    keep_results(out, [path.name for path in written], config.overwrite)
    method, penalty = Joint(max_iter=config.iterations), config.latent_penalty
    with owning(*written):
        images = images.to(device)
        fitted = fit(decoder, images, method=method, latent_penalty=penalty, progress=True)
        kept = {path.resolve() for path in (*each, *files)}  # an input may be one of them
        for path in _earlier(written[0]) - kept:  # else they would lie among the new ones
            path.unlink(missing_ok=True)
        names = json.dumps([path.name for path in each])
        save_latents(written[0], fitted.latents, pictures=names)
        write_sheet(written[1], torch.stack([images, fitted.images], 1).flatten(0, 1), 8)
        for path, image in zip(each, fitted.images, strict=True):
            write_sheet(path, image[None], 1)
    values: list[float] = fitted.psnr.tolist()
    far = [None if lowest is None else value < lowest for value in values]
    for path, value, is_far in zip(files, values, far, strict=True):
        print(f"{value:6.2f} dB  {path}{'  (far from the training images)' * bool(is_far)}")
    mean = float(fitted.psnr.mean())
    print(f"mean {mean:.2f} dB; latents in {written[0]}")
    if lowest is None:
        print(
            "whether they are far from its training images is not known: the training of this "
            "generator has not ended, or held fewer than 20 images out"
        )
    if any(far):
        print(
            f"{sum(map(bool, far))} of {len(far)} images fit worse than the worst held-out image "
            f"of the training, {lowest:.2f} dB: this generator does not make such images. Train "
            "one on images like them"
        )
    return {
        "fits": [
            {"file": path, "PSNR": value, "far": is_far}
            for path, value, is_far in zip(files, values, far, strict=True)
        ],
        "mean PSNR": mean,
        "held-out PSNR, lowest": lowest,
        "files": written,
    }


def _earlier(latents: Path) -> set[Path]:
    """The pictures that an earlier call wrote beside its latents, which name them."""
    with suppress(OSError, ValueError):  # latents that cannot be read name none
        names = json.loads(about(latents).get("pictures", "[]"))
        near = latents.resolve()
        return {near.with_name(name) for name in names if _PICTURE.fullmatch(name)}
    return set()


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
        note(f"skipped, not readable: {path}")
    files = [p for p in files if p not in set(skipped)]
    if not files:
        raise ValueError(f"none of the {len(skipped)} files given can be read as an image")
    if pixels.shape[2:] != (height, width):
        raise ValueError(
            f"the generator makes {width}×{height} pixels, the images have "
            f"{pixels.shape[3]}×{pixels.shape[2]}: --resize crops and scales them"
        )
    return files, to_unit(pixels)
