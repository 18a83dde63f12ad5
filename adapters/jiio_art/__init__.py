"""JIIO for the Adversarial Robustness Toolbox (ART)."""

from jiio_art.attack import JIIOAttack
from jiio_art.record import AttackRecord

__all__ = ["AttackRecord", "JIIOAttack"]
