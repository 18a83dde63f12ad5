"""JIIO for the Adversarial Robustness Toolbox (ART)."""

from jiio_art.attack import JIIOAttack
from jiio_art.record import AttackRecord
from jiio_art.trainer import JIIOAdversarialTrainer

__all__ = ["AttackRecord", "JIIOAdversarialTrainer", "JIIOAttack"]
