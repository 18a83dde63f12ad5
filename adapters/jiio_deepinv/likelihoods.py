"""The data fidelity that fits a physics' noise model: minus the log-likelihood, per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepinv.optim import (
    DataFidelity,
    PoissonLikelihood,
    StackedPhysicsDataFidelity,
)
from deepinv.physics import (
    FisherTippettNoise,
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    LogPoissonNoise,
    PoissonGaussianNoise,
    PoissonNoise,
    RicianNoise,
    SaltPepperNoise,
    StackedPhysics,
    UniformGaussianNoise,
    UniformNoise,
    ZeroNoise,
)
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepinv.physics import Physics

    Distance = Callable[[Tensor, Tensor], Tensor]

SIGMA_MIN = 0.05  # about what good generators miss an image by: less noise counts as this much
RATE_MIN = 1e-2  # counts, or intensities, below which a likelihood goes on as a parabola


def likelihood_of(physics: Physics) -> DataFidelity:
    """Minus the log-likelihood of the measurements under ``physics.noise_model``, up to a constant.

    ========================  ======================================================================
    noise model               ``-log p(y | z)`` summed over the entries, z = A(x)
    ========================  ======================================================================
    ZeroNoise                 ``(z − y)² / 2σ²`` with σ = 0.05
    GaussianNoise             ``(z − y)² / 2σ²``, σ per sample where the noise model has that
    UniformGaussianNoise      the same with the root mean square of its range of σ
    UniformNoise(a)           the same with ``σ = a/√3``; its own, an indicator, has no slope
    PoissonNoise(γ)           ``λ − k log λ`` with ``λ = z/γ`` and counts k
    PoissonGaussianNoise      the same with ``λ = (z + σ²)/γ``, ``k = (y + σ²)/γ`` (shifted Poisson)
    LogPoissonNoise           ``N₀ (exp(−μz) + μ z exp(−μy))``
    GammaNoise(l)             ``l (log z + y/z)``
    FisherTippettNoise(l)     ``l (z + exp(y − z))``
    LaplaceNoise(b)           ``√((z − y)² + b²) / b``, smoothed ``|z − y|/b``
    SaltPepperNoise           the same with b = 0.05, robust against outliers
    RicianNoise(σ)            ``(z² + y²)/2σ² − log I₀(zy/σ²)``
    ========================  ======================================================================

    σ below 0.05 counts as 0.05. The Poisson and Gamma likelihoods go on as their parabola of second
    order where λ or z is below 0.01, so they are finite and convex there. Stacked physics get a
    ``StackedPhysicsDataFidelity`` of their parts' likelihoods.

    Raises:
        TypeError: another noise model, which only you can know the likelihood of.
    """
    if isinstance(physics, StackedPhysics):
        return StackedPhysicsDataFidelity([likelihood_of(part) for part in physics.physics_list])
    noise = physics.noise_model
    build = _BUILDERS.get(type(noise))
    if build is None:
        raise TypeError(
            f"no likelihood is known for the noise model {type(noise).__name__}: give "
            f"data_fidelity=. Known are {', '.join(kind.__name__ for kind in _BUILDERS)}"
        )
    return build(noise)


def per_sample(fidelity: DataFidelity) -> DataFidelity:
    """The same data fidelity, without deepinv's mixing of samples.

    deepinv 0.5's ``PoissonLikelihood`` adds the whole batch's logarithms to each sample's value.
    """
    if isinstance(fidelity, StackedPhysicsDataFidelity):
        return StackedPhysicsDataFidelity([per_sample(p) for p in fidelity.data_fidelity_list])
    if type(fidelity) is PoissonLikelihood:
        return _poisson(fidelity.gain, fidelity.bkg, counts=not fidelity.d.denormalize)
    return fidelity


def _sum(per_entry: Tensor) -> Tensor:
    return per_entry.flatten(1).sum(1)


def _column(parameter: Any, like: Tensor) -> Tensor:
    """A noise model's parameter, a number or one per sample, to broadcast over measurements."""
    value = torch.as_tensor(parameter).to(like.device)
    if value.ndim == 0 or value.numel() == 1:
        return value.reshape(())
    if value.ndim == 1:
        return value.reshape(-1, *[1] * (like.ndim - 1))
    return value


def _gaussian(sigma: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        error = (z - y) / _column(sigma, y).clamp(min=SIGMA_MIN)
        return 0.5 * _sum(error.abs().square() if error.is_complex() else error.square())

    return DataFidelity(d=distance)


def _poisson(gain: Any, background: Any = 0.0, *, counts: bool = False) -> DataFidelity:
    """``λ − k log λ`` with ``λ = z/γ + background``, ``k = y/γ``, or y if that holds counts."""

    def distance(z: Tensor, y: Tensor) -> Tensor:
        g, extra = _column(gain, y), _column(background, y)
        rate = z / g + extra
        k = y if counts else y / g
        return _sum(rate - k * _extended_log(rate))

    return DataFidelity(d=distance)


def _shifted_poisson(noise: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        # a smaller gain is Gaussian noise, and its counts too large for float32
        gain = _column(noise.gain, y).clamp(min=1e-3)
        shift = _column(noise.sigma, y).square()
        rate, k = (z + shift) / gain, ((y + shift) / gain).clamp(min=0)
        return _sum(rate - k * _extended_log(rate))

    return DataFidelity(d=distance)


def _extended_log(x: Tensor) -> Tensor:
    """``log x``, below ``RATE_MIN`` its expansion of second order there: concave everywhere."""
    near = x.clamp(min=RATE_MIN)
    t = (x - near) / RATE_MIN
    return near.log() + t - 0.5 * t.square()


def _gamma(noise: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        near = z.clamp(min=RATE_MIN)
        below = (z - near) / near
        ratio = y / near
        # 1/z = (1 − t + t²)/near to second order, t = (z − near)/near
        return _sum(
            _column(noise.l, y) * (near.log() + below + ratio * (1 - below + below.square()))
        )

    return DataFidelity(d=distance)


def _fisher_tippett(noise: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        return _sum(_column(noise.l, y) * (z + (y - z).exp()))

    return DataFidelity(d=distance)


def _log_poisson(noise: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        mu, N0 = _column(noise.mu, y), _column(noise.N0, y)
        return _sum(N0 * ((-mu * z).exp() + mu * z * (-mu * y).exp()))

    return DataFidelity(d=distance)


def _smoothed_l1(b: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        scale = _column(b, y).clamp(min=SIGMA_MIN)
        error = (z - y).abs() if y.is_complex() else z - y
        return _sum((error / scale).square().add(1).sqrt() - 1)

    return DataFidelity(d=distance)


def _rician(noise: Any) -> DataFidelity:
    def distance(z: Tensor, y: Tensor) -> Tensor:
        variance = _column(noise.sigma, y).clamp(min=SIGMA_MIN).square()
        # log I₀(a) = log i0e(a) + a, so that nothing overflows
        bessel = torch.special.i0e(z * y / variance).log()
        return _sum((z.abs() - y).square() / (2 * variance) - bessel)

    return DataFidelity(d=distance)


def _root_mean_square(noise: Any) -> Tensor:
    low, high = noise.sigma_min, noise.sigma_max
    rms: Tensor = ((low.square() + low * high + high.square()) / 3).sqrt()
    return rms


_BUILDERS: dict[type, Callable[[Any], DataFidelity]] = {
    ZeroNoise: lambda noise: _gaussian(SIGMA_MIN),
    GaussianNoise: lambda noise: _gaussian(noise.sigma),
    UniformGaussianNoise: lambda noise: _gaussian(_root_mean_square(noise)),
    UniformNoise: lambda noise: _gaussian(noise.a / 3**0.5),
    PoissonNoise: lambda noise: _poisson(noise.gain, counts=not bool(noise.normalize)),
    PoissonGaussianNoise: _shifted_poisson,
    LogPoissonNoise: _log_poisson,
    GammaNoise: _gamma,
    FisherTippettNoise: _fisher_tippett,
    LaplaceNoise: lambda noise: _smoothed_l1(noise.b),
    SaltPepperNoise: lambda noise: _smoothed_l1(SIGMA_MIN),
    RicianNoise: _rician,
}
