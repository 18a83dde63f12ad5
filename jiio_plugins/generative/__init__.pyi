from .config import Architecture, TrainConfig
from .files import load_generator, load_latents
from .latents import (
    Fit,
    LatentPrior,
    decode,
    fit,
    fit_latents,
    fit_prior,
    sample_latents,
)
from .metrics import distances, nearest, nearness, psnr, ssim
from .pictures import write_sheet
from .step import Encoder, StepResult, default_step_size
from .training import Trained, train

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
