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
from jiio_plugins.generative.train import Trained, train

__all__ = [
    "Architecture",
    "Fit",
    "LatentPrior",
    "TrainConfig",
    "Trained",
    "decode",
    "fit",
    "fit_latents",
    "fit_prior",
    "load_generator",
    "load_latents",
    "sample_latents",
    "train",
]
