"""Shipped weights: safetensors files beside the package, each with a training script of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from jiio_plugins.models.decoder import MDEQDecoder
from jiio_plugins.models.features import ConvFeatures
from jiio_plugins.models.mdeq import MDEQClassifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"

CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "digits": lambda: MDEQClassifier(channels=(16, 16), stride=1),
    "fashion-mnist": lambda: MDEQClassifier(channels=(16, 32), stride=2),
}
GENERATORS: dict[str, Callable[[], nn.Module]] = {
    "digits-generator": lambda: MDEQDecoder(
        latent_shape=16, image_shape=(1, 8, 8), channels=(16, 16), stride=1
    ),
    "fashion-mnist-generator": lambda: MDEQDecoder(
        latent_shape=64, image_shape=(1, 28, 28), channels=(16, 32), stride=2
    ),
    "fashion-mnist-spatial": lambda: MDEQDecoder(
        latent_shape=(4, 7, 7), image_shape=(1, 28, 28), channels=(16, 32), stride=2
    ),
}
FEATURES: dict[str, Callable[[], nn.Module]] = {"fashion-mnist-features": ConvFeatures}
ARCHITECTURES = CLASSIFIERS | GENERATORS | FEATURES


def available_weights() -> tuple[str, ...]:
    """Names that :func:`load_pretrained` accepts."""
    return tuple(ARCHITECTURES)


def load_pretrained(name: str) -> nn.Module:
    """A trained classifier, generator or feature network in eval mode, on the CPU.

    Args:
        name: "digits" (8×8, 1 channel) and "fashion-mnist" (28×28, 1 channel) are classifiers.
            "digits-generator" (latent 16), "fashion-mnist-generator" (latent 64) and
            "fashion-mnist-spatial" (latent 4×7×7, closer fits) are generators.
            "fashion-mnist-features" is what sets of garments are compared by. Images are in [0, 1].

    Raises:
        ValueError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"no weights called {name!r}; there are {', '.join(ARCHITECTURES)}")
    model = ARCHITECTURES[name]()
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()
