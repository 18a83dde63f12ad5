"""The data fidelity that fits a physics' noise model: minus the log-likelihood, per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepinv.optim import DataFidelity, PoissonLikelihood, StackedPhysicsDataFidelity
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

SIGMA_MIN = 0.05  # about what good generators miss a pixel by: less noise counts as this much
RATE_MIN = 1e-2  # counts, or intensities, below which a likelihood goes on as a parabola


def likelihood_of(physics: Physics, gain: Any = 1.0) -> DataFidelity:
    """Minus the log-likelihood of the measurements under ``physics.noise_model``, up to a constant.

    ========================  ======================================================================
    noise model               ``-log p(y | ŷ)`` summed over the entries, ŷ = A(x)
    ========================  ======================================================================
    ZeroNoise                 ``(ŷ − y)² / 2σ²`` with σ = 0.05 gain
    GaussianNoise             ``(ŷ − y)² / 2σ²``, σ per sample where the noise model has that,
                              and ``|ŷ − y|² / σ²`` of complex entries, as deepinv draws them
    UniformGaussianNoise      the same with the root mean square of its range of σ
    UniformNoise(a)           the same with ``σ = a/√3``, as its own, an indicator, has no slope
    PoissonNoise(γ)           ``rate − k log rate`` with ``rate = ŷ/γ`` and counts k
    PoissonGaussianNoise      the same with ``rate = ŷ/γ + σ²/γ²``, ``k = y/γ + σ²/γ²`` (shifted
                              Poisson: mean and variance are those of the sum)
    LogPoissonNoise           ``N₀ (exp(−μŷ) + μ ŷ exp(−μy))``
    GammaNoise(l)             ``l (log ŷ + y/ŷ)``
    FisherTippettNoise(l)     ``l (ŷ + exp(y − ŷ))``
    LaplaceNoise(b)           ``√((ŷ − y)² + b²) / b``, smoothed ``|ŷ − y|/b``
    SaltPepperNoise           the same with b = 0.05 gain, robust against outliers
    RicianNoise(σ)            ``(ŷ² + y²)/2σ² − log I₀(ŷy/σ²)``
    ========================  ======================================================================

    Letters of noise models are deepinv's. σ and b below 0.05 gain count as 0.05 gain. Where the
    rate, or ŷ of a GammaNoise, is below 0.01 a likelihood goes on as its parabola of second order.
    That keeps it finite and convex there. Stacked physics get a ``StackedPhysicsDataFidelity`` of
    their parts' likelihoods.

    Args:
        physics: the forward model, with its noise model.
        gain: how large an entry of A(x) is where one of x is 1. What a generator misses, 0.05 a
            pixel, reaches the measurements so. A number, one per sample ``(rows,)``, or for stacked
            physics a list of them.

    Returns:
        ``data(x, y, physics)``, one value per sample, ``(rows,)``.

    Raises:
        TypeError: another noise model, which only you can know the likelihood of.
    """
    if isinstance(physics, StackedPhysics):
        parts = physics.physics_list
        gains = gain if isinstance(gain, (list, tuple)) else [gain] * len(parts)
        return StackedPhysicsDataFidelity(
            [likelihood_of(part, each) for part, each in zip(parts, gains, strict=True)]
        )
    noise = physics.noise_model
    build = _BUILDERS.get(type(noise))
    if build is None:
        raise TypeError(
            f"no likelihood is known for the noise model {type(noise).__name__}: give "
            f"data_fidelity=. Known are {', '.join(kind.__name__ for kind in _BUILDERS)}"
        )
    return build(noise, gain)


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


def _at_least(width: Any, gain: Any, like: Tensor) -> Tensor:
    """A noise model's σ or b, or what a generator misses if that is more."""
    return _column(width, like).maximum(SIGMA_MIN * _column(gain, like))


def _gaussian(sigma: Any, gain: Any) -> DataFidelity:
    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        error = (y_hat - y) / _at_least(sigma, gain, y)
        # σ² is the variance of a complex entry, half of it that of each part
        return _sum(error.abs().square() if error.is_complex() else 0.5 * error.square())

    return DataFidelity(d=distance)


def _poisson(gain: Any, background: Any = 0.0, *, counts: bool = False) -> DataFidelity:
    """``rate − k log rate``, ``rate = ŷ/γ + background``, ``k = y/γ``, or y if it holds counts."""

    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        gamma, extra = _column(gain, y), _column(background, y)
        rate = y_hat / gamma + extra
        k = y if counts else y / gamma
        return _sum(rate - k * _extended_log(rate))

    return DataFidelity(d=distance)


def _shifted_poisson(noise: Any, gain: Any) -> DataFidelity:
    """``rate − k − k log(rate/k)`` with ``rate = ŷ/γ + σ²/γ²``, ``k = y/γ + σ²/γ²``.

    What does not depend on ŷ is taken off: for a small γ, rate and k are large and nearly equal.
    """

    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        variance = _at_least(noise.sigma, gain, y).square()
        # less would add no hundredth of σ² to the variance, and counts too large for float32
        gamma = _column(noise.gain, y).maximum(0.01 * variance)
        counts = y / gamma + variance / gamma.square()
        k = counts.clamp(min=RATE_MIN)
        excess = (y_hat - y) / gamma + (counts - k)  # rate − k
        near = excess.maximum(RATE_MIN - k)
        t = (excess + k - RATE_MIN).clamp(max=0) / RATE_MIN  # as in _extended_log
        return _sum(excess - k * ((near / k).log1p() + t - 0.5 * t.square()))

    return DataFidelity(d=distance)


def _extended_log(x: Tensor) -> Tensor:
    """``log x``, below ``RATE_MIN`` its expansion of second order there: concave everywhere."""
    near = x.clamp(min=RATE_MIN)
    t = (x - near) / RATE_MIN
    return near.log() + t - 0.5 * t.square()


def _gamma(noise: Any) -> DataFidelity:
    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        near = y_hat.clamp(min=RATE_MIN)
        below = (y_hat - near) / near
        ratio = y / near
        # 1/ŷ = (1 − t + t²)/near to second order, t = (ŷ − near)/near
        return _sum(
            _column(noise.l, y) * (near.log() + below + ratio * (1 - below + below.square()))
        )

    return DataFidelity(d=distance)


def _fisher_tippett(noise: Any) -> DataFidelity:
    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        return _sum(_column(noise.l, y) * (y_hat + (y - y_hat).exp()))

    return DataFidelity(d=distance)


def _log_poisson(noise: Any) -> DataFidelity:
    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        mu, N0 = _column(noise.mu, y), _column(noise.N0, y)
        return _sum(N0 * ((-mu * y_hat).exp() + mu * y_hat * (-mu * y).exp()))

    return DataFidelity(d=distance)


def _smoothed_l1(b: Any, gain: Any) -> DataFidelity:
    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        scale = _at_least(b, gain, y)
        error = (y_hat - y).abs() if y.is_complex() else y_hat - y
        return _sum((error / scale).square().add(1).sqrt() - 1)

    return DataFidelity(d=distance)


def _rician(noise: Any, gain: Any) -> DataFidelity:
    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        variance = _at_least(noise.sigma, gain, y).square()
        # log I₀(t) = log i0e(t) + t, so that nothing overflows
        bessel = torch.special.i0e(y_hat * y / variance).log()
        return _sum((y_hat.abs() - y).square() / (2 * variance) - bessel)

    return DataFidelity(d=distance)


def _root_mean_square(noise: Any) -> Tensor:
    low, high = noise.sigma_min, noise.sigma_max
    rms: Tensor = ((low.square() + low * high + high.square()) / 3).sqrt()
    return rms


# from the noise model, and how large a measurement is where a pixel is 1
_BUILDERS: dict[type, Callable[[Any, Any], DataFidelity]] = {
    ZeroNoise: lambda noise, gain: _gaussian(0.0, gain),
    GaussianNoise: lambda noise, gain: _gaussian(noise.sigma, gain),
    UniformGaussianNoise: lambda noise, gain: _gaussian(_root_mean_square(noise), gain),
    UniformNoise: lambda noise, gain: _gaussian(noise.a / 3**0.5, gain),
    PoissonNoise: lambda noise, _: _poisson(noise.gain, counts=not bool(noise.normalize)),
    PoissonGaussianNoise: _shifted_poisson,
    LogPoissonNoise: lambda noise, _: _log_poisson(noise),
    GammaNoise: lambda noise, _: _gamma(noise),
    FisherTippettNoise: lambda noise, _: _fisher_tippett(noise),
    LaplaceNoise: lambda noise, gain: _smoothed_l1(noise.b, gain),
    SaltPepperNoise: lambda noise, gain: _smoothed_l1(0.0, gain),
    RicianNoise: _rician,
}
