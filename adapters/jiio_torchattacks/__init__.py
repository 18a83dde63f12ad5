"""JIIO for torchattacks: ``adversarial = JIIO(model, norm="L2", eps=1.0)(images, labels)``."""

from jiio_torchattacks.attack import JIIO

__all__ = ["JIIO"]
