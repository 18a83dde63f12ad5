"""JIIO for deepinv: ``x_hat = JIIOReconstructor(generator)(y, physics)``."""

from jiio_deepinv.encoders import GaussianEncoder
from jiio_deepinv.likelihoods import likelihood_of
from jiio_deepinv.losses import JacobianLoss
from jiio_deepinv.reconstructor import JIIOReconstructor

__all__ = ["GaussianEncoder", "JIIOReconstructor", "JacobianLoss", "likelihood_of"]
