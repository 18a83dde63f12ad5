"""JIIO for TorchDEQ: ``model = adapt(model)``, and every tool here takes the model."""

from jiio_torchdeq.layer import adapt

__all__ = ["adapt"]
