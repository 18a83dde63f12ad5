"""What a reconstructor accepts, and the errors that say so."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from deepinv.optim import DataFidelity, Prior
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor, nn

from jiio_plugins.equilibrium import EquilibriumLayer
from jiio_plugins.joint import no_layer

if TYPE_CHECKING:
    from collections.abc import Sequence


def parts(y: Any) -> list[Tensor]:
    """The tensors of y."""
    return list(y.x) if isinstance(y, TensorList) else [y]


def shapes(y: Any) -> list[tuple[int, ...]]:
    """Their shapes."""
    return [tuple(t.shape) for t in parts(y)]


def check_modules(
    generator: nn.Module,
    encoder: nn.Module | None,
    data_fidelity: DataFidelity | None,
    prior: Prior | None,
) -> None:
    """Raise unless these are what the names say.

    Args:
        generator: a module with an equilibrium layer.
        encoder: a module, or None.
        data_fidelity: deepinv's, or None.
        prior: deepinv's, with a value to minimise, or None.

    Raises:
        TypeError: one of another type.
        ValueError: no equilibrium layer, or a prior without a value.
    """
    if not isinstance(generator, nn.Module):
        raise TypeError(f"generator must be an nn.Module, got {type(generator).__name__}")
    if not any(isinstance(module, EquilibriumLayer) for module in generator.modules()):
        raise ValueError(
            "the generator has no jiio_plugins.Equilibrium layer: there is nothing to optimise "
            "jointly. For other generators use deepinv.models.CSGMGenerator. "
            f"{no_layer(generator)}"
        )
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise TypeError(
            f"encoder must be an nn.Module called as encoder(y, physics), got "
            f"{type(encoder).__name__}; a function that is not to be trained is an init"
        )
    if data_fidelity is not None and not isinstance(data_fidelity, DataFidelity):
        raise TypeError(
            "data_fidelity must be a deepinv.optim.DataFidelity, got "
            f"{type(data_fidelity).__name__}"
        )
    if prior is not None and not isinstance(prior, Prior):
        raise TypeError(f"prior must be a deepinv.optim.Prior, got {type(prior).__name__}")
    if prior is not None and not prior.explicit_prior:
        raise ValueError(
            f"{type(prior).__name__} has no value to minimise (explicit_prior is False): give a "
            "prior that has one, such as deepinv.optim.TVPrior()"
        )


def latent_shape_of(generator: nn.Module, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one latent, as given or as the generator tells it.

    Args:
        generator: may have a ``latent_shape``.
        given: d, or a shape. None: ask the generator.

    Raises:
        ValueError: neither tells, or a size that is not positive.
    """
    shape: Any = given if given is not None else getattr(generator, "latent_shape", None)
    if shape is None:
        raise ValueError(
            "the generator does not tell its latent_shape: give latent_shape=64, or (c, h, w)"
        )
    sizes: tuple[int, ...] = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"latent_shape must hold positive integers, got {given!r}")
    return sizes


def check_weights(**weights: float) -> None:
    """Raise unless these are finite numbers, not negative.

    Raises:
        ValueError: one of them is not.
    """
    for name, value in weights.items():
        number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
        if not number or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number, not negative, got {value}")


def check_latents(w: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Some latents as they are, if they have the wanted shape.

    Args:
        w: what was given or returned.
        shape: ``(rows, *latent_shape)``.
        name: what the message calls them.

    Raises:
        ValueError: no tensor, or another shape.
    """
    if not isinstance(w, Tensor) or tuple(w.shape) != shape:
        raise ValueError(
            f"{name} must be, or return, latents of shape {shape}, got "
            f"{tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__}"
        )
    return w


def check_guess(guess: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What an encoder returned as mean and standard deviation, which is 1 if it names none.

    Args:
        guess: mean, or a pair (mean, std).
        shape: of both, ``(rows, *latent_shape)``.

    Raises:
        ValueError: another shape, complex, NaN or Inf, or a std that is not positive.
    """
    name = "encoder(y, physics)"
    pair = isinstance(guess, (tuple, list))
    if pair and len(guess) != 2:
        raise ValueError(
            f"{name} must return the latents' mean, or (mean, std), got {len(guess)} things"
        )
    mean = usable(check_latents(guess[0] if pair else guess, shape, f"{name}'s mean"))
    finite = torch.isfinite(mean).flatten(1).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"{name}'s mean holds NaN or Inf (first in sample {bad})")
    if mean.is_complex():
        raise ValueError(
            f"{name}'s mean must be real, as latents are: return real and imaginary parts as "
            "channels (torch.view_as_real)"
        )
    if not pair:
        return mean, torch.ones_like(mean)
    std = usable(check_latents(guess[1], shape, f"{name}'s std"))
    if std.is_complex() or not bool(((std > 0) & (std < torch.inf)).all()):
        raise ValueError(
            f"{name}'s std must be real, positive and finite: end it in a softplus or a sigmoid, "
            "and add a little"
        )
    return mean, std


def check_measurements(y: Any) -> None:
    """Raise unless ``y`` is a finite batch of measurements.

    Raises:
        TypeError: no tensor or TensorList, or of integers.
        ValueError: no batch, NaN or Inf.
    """
    if not isinstance(y, (Tensor, TensorList)):
        raise TypeError(f"y must be a tensor or a deepinv TensorList, got {type(y).__name__}")
    for part in parts(y):
        if not (part.is_floating_point() or part.is_complex()):
            raise TypeError(f"y must be floating point or complex, got {part.dtype}")
        if part.ndim < 2 or not len(part):
            raise ValueError(f"y must be batch first and not empty, got shape {tuple(part.shape)}")
        finite = torch.isfinite(part)
        if not bool(finite.all()):
            bad = int((~finite.flatten(1).all(1)).nonzero()[0])
            raise ValueError(f"y holds NaN or Inf (first in sample {bad}): clean the measurements")


def check_physics(physics: Any) -> None:
    """Raise unless it is deepinv's.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(physics, Physics):
        raise TypeError(
            f"physics must be a deepinv.physics.Physics, got {type(physics).__name__}; a function "
            "becomes one by deepinv.physics.Physics(A=function)"
        )


def check_keywords(given: dict[str, Any], kind: type) -> None:
    """Raise where a setting of the class was meant for a single call.

    Args:
        given: keywords of the call.
        kind: the class.

    Raises:
        TypeError: names them.
    """
    settings = [name for name in given if name in inspect.signature(kind).parameters]
    if settings:
        raise TypeError(
            f"{', '.join(settings)}: settings of {kind.__name__}(generator, ...), not of a call"
        )


def check_truth(x_gt: Any, batch: int) -> None:
    """Raise unless there is a true image per sample, or none.

    Args:
        x_gt: true images, or None.
        batch: rows of y.

    Raises:
        ValueError: no tensor, or another number of them.
    """
    if x_gt is not None and (not isinstance(x_gt, Tensor) or x_gt.shape[:1] != (batch,)):
        got = tuple(x_gt.shape) if isinstance(x_gt, Tensor) else type(x_gt).__name__
        raise ValueError(f"x_gt must hold an image per sample of y, {batch} of them, got {got}")


def check_usable(generator: nn.Module) -> None:
    """Raise where no gradient can pass the generator.

    Raises:
        ValueError: it was made in inference mode.
    """
    if any(t.is_inference() for t in [*generator.parameters(), *generator.buffers()]):
        raise ValueError(
            "the generator was made in inference mode, so that no gradient can pass it: make or "
            "load it outside of torch.inference_mode()"
        )


def usable(y: Any) -> Any:
    """``y`` as autograd takes it: a tensor made in inference mode is cloned.

    A subclass is seen as a plain tensor: deepinv's transforms leave one that has its own minus.
    """
    if any(part.is_inference() for part in parts(y)):
        y = y.clone()
    plain = [part.as_subclass(Tensor) for part in parts(y)]
    return TensorList(plain) if isinstance(y, TensorList) else plain[0]


def usable_physics(physics: Physics) -> Physics:
    """The physics, or where inference mode made some of its tensors a copy that has others."""
    tensors = [*physics.parameters(), *physics.buffers()]
    return copy.deepcopy(physics) if any(t.is_inference() for t in tensors) else physics
