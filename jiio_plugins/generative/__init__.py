"""Generators with optimised latents: train without an encoder, sample, fit new images.

Needs ``pip install 'jiio-plugins[generative]'``.
"""

from jiio_plugins.generative.config import Architecture, TrainConfig
from jiio_plugins.generative.files import load_generator, load_latents
from jiio_plugins.generative.latents import (
    Fit,
    LatentPrior,
    decode,
    fit,
    fit_latents,
    fit_prior,
    sample_latents,
)
from jiio_plugins.generative.metrics import distances, nearest, nearness, psnr, ssim
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.generative.step import Encoder, StepResult, default_step_size
from jiio_plugins.generative.training import Trained, train

__all__ = [
    "Architecture",
    "Encoder",
    "Fit",
    "LatentPrior",
    "StepResult",
    "TrainConfig",
    "Trained",
    "decode",
    "default_step_size",
    "distances",
    "fit",
    "fit_latents",
    "fit_prior",
    "load_generator",
    "load_latents",
    "nearest",
    "nearness",
    "psnr",
    "sample_latents",
    "ssim",
    "train",
    "write_sheet",
]
