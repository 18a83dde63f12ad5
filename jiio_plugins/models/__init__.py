"""Equilibrium models in sizes for tests, demos and benchmarks."""

from jiio_plugins.models.conv import ConvDEQClassifier
from jiio_plugins.models.decoder import MDEQDecoder
from jiio_plugins.models.features import ConvFeatures
from jiio_plugins.models.fewshot import MDEQFewShot, SinusoidDEQ
from jiio_plugins.models.logits import LogitsOf
from jiio_plugins.models.mdeq import MDEQCell, MDEQClassifier
from jiio_plugins.models.normalized import Normalized
from jiio_plugins.models.pretrained import CLASSIFIERS, available_weights, load_pretrained
from jiio_plugins.models.refiner import MDEQRefiner

__all__ = [
    "CLASSIFIERS",
    "ConvDEQClassifier",
    "ConvFeatures",
    "LogitsOf",
    "MDEQCell",
    "MDEQClassifier",
    "MDEQDecoder",
    "MDEQFewShot",
    "MDEQRefiner",
    "Normalized",
    "SinusoidDEQ",
    "available_weights",
    "load_pretrained",
]
