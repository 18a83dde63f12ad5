"""Sheets of images as PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins import plots
from jiio_plugins.generative.latents import Fit, decode, sample_latents

if TYPE_CHECKING:
    from pathlib import Path

    from jiio_plugins.models.decoder import MDEQDecoder

PICTURES = ("reconstructions.png", "interpolations.png", "samples.png")  # of a run


def write_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Write images side by side as a PNG file, small ones enlarged.

    Args:
        path: the file.
        images: ``(images, c, h, w)`` in [0, 1]. What is outside is clipped.
        columns: images in a line of the sheet.
    """
    plots.save(path, plots.sheet(images, columns))


def interpolations(decoder: MDEQDecoder, first: Tensor, last: Tensor, steps: int = 8) -> Tensor:
    """Images along straight lines between latents, ``(pairs · steps, c, h, w)``, pair by pair.

    Args:
        decoder: the generator.
        first: where the lines start, ``(pairs, *latent_shape)``.
        last: where they end, likewise.
        steps: images a line, both ends included.
    """
    t = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype)
    t = t.reshape(1, -1, *[1] * (first.ndim - 1))
    between = first.unsqueeze(1) * (1 - t) + last.unsqueeze(1) * t
    return decode(decoder, between.flatten(0, 1))


def write_pictures(
    out: Path, decoder: MDEQDecoder, images: Tensor, fitted: Fit, latents: Tensor, seed: int
) -> None:
    """``reconstructions.png``, ``interpolations.png`` and ``samples.png``, the seed fixed.

    Args:
        out: folder.
        decoder: the generator.
        images: held-out images, ``(rows, c, h, w)`` in [0, 1]. The sheet shows them above their
            fits.
        fitted: their fits.
        latents: of training images, ``(rows, *latent_shape)``. A Gaussian fitted to them gives the
            samples.
        seed: of the samples.
    """
    shown = min(8, len(images))
    pairs = [
        torch.cat([images[k : k + shown], fitted.images[k : k + shown]])
        for k in range(0, len(images) - shown + 1, shown)
    ]
    write_sheet(out / PICTURES[0], torch.cat(pairs), shown)
    half = min(6, len(images) // 2)
    if half:
        lines = interpolations(decoder, fitted.latents[:half], fitted.latents[half : 2 * half])
        write_sheet(out / PICTURES[1], lines, 8)
    if len(latents) > 1:
        drawn = sample_latents(latents, 64, prior="gaussian", seed=seed)
        write_sheet(out / PICTURES[2], decode(decoder, drawn), 8)
