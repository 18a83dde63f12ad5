"""JIIO for learn2learn: ``JIIOLearner(model, lr=0.1)`` in place of ``MAML(model, lr=0.1)``."""

from jiio_plugins.hosts import importing_host

with importing_host():
    from jiio_learn2learn.learner import JIIOLearner

__all__ = ["JIIOLearner"]
