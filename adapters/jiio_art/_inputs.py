"""ART's arguments of ``generate`` as checked arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from art.config import ART_NUMPY_DTYPE
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch

if TYPE_CHECKING:
    import numpy.typing as npt
    from art.estimators.classification import PyTorchClassifier


def as_images(x: Any, classifier: PyTorchClassifier) -> npt.NDArray[np.float32]:
    """Images as float32, ``(rows, *input_shape)``, finite.

    Args:
        x: images, as ``generate`` got them.
        classifier: ART's, which names the ``input_shape``.

    Raises:
        TypeError: complex numbers.
        ValueError: another shape, NaN or Inf.
    """
    if np.iscomplexobj(x):
        raise TypeError(
            f"x must be real, got {np.asarray(x).dtype}: give the real and imaginary parts as "
            "channels, and have the model put them together"
        )
    with np.errstate(over="ignore"):  # too large for float32 becomes Inf, and an error below
        images: npt.NDArray[np.float32] = np.asarray(x, dtype=ART_NUMPY_DTYPE)
    if images.ndim and not len(images):
        return images
    wanted, got = tuple(classifier.input_shape), images.shape[1:]
    # a defence may crop or resize what it gets, a standardisation does not
    strict = all(
        isinstance(step, StandardisationMeanStdPyTorch)
        for step in classifier.preprocessing_operations
    )
    if not images.ndim or len(got) != len(wanted) or (strict and got != wanted):
        raise ValueError(
            f"x must have shape (n, {', '.join(map(str, wanted))}) as the classifier's input_shape "
            f"says, got {images.shape}"
        )
    finite = np.isfinite(images.reshape(len(images), -1)).all(1)
    if not finite.all():
        raise ValueError(
            f"x holds NaN or Inf (first in sample {int(np.argmin(finite))}): clean the images"
        )
    return images


def class_indices(y: Any, rows: int, classes: int) -> npt.NDArray[np.int64]:
    """Labels as indices ``(rows,)``.

    Args:
        y: one-hot ``(rows, classes)``, or indices ``(rows,)`` or ``(rows, 1)``.
        rows: number of images.
        classes: number of classes.

    Raises:
        ValueError: another shape, soft labels, not whole numbers, or classes that do not exist.
    """
    labels = np.asarray(y)
    if labels.shape == (rows, classes):
        if np.isnan(labels).any():
            raise ValueError("y holds NaN: give one-hot labels or indices")
        hot = np.isin(labels, (0, 1)).all(axis=1) & (labels.astype(np.float64).sum(axis=1) == 1)
        if not hot.all():
            first = int(np.argmin(hot))
            raise ValueError(
                "y must be one-hot, a single 1 and zeros, or indices of classes, got "
                f"{labels[first].tolist()} for sample {first}: soft labels would be reduced to "
                "their largest. Say so with y.argmax(axis=1), or for smoothed ones take "
                "nn.CrossEntropyLoss(label_smoothing=...)"
            )
        chosen: npt.NDArray[np.int64] = labels.argmax(axis=1)
        return chosen
    if labels.shape not in ((rows,), (rows, 1)):
        raise ValueError(
            f"y must be one-hot of shape ({rows}, {classes}) or indices of shape ({rows},), "
            f"got shape {labels.shape}"
        )
    flat = labels.reshape(rows).astype(np.float64)
    wrong = (flat != np.floor(flat)) | (flat < 0) | (flat >= classes)
    if wrong.any():
        raise ValueError(
            f"y must hold classes 0 … {classes - 1} (the classifier has {classes}), "
            f"got {flat[wrong][0]:g} for sample {int(np.argmax(wrong))}"
        )
    return flat.astype(np.int64)


def _free_pixels(mask: Any, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """A mask as booleans of the images' shape: where a perturbation is allowed.

    Raises:
        ValueError: not bool or non-negative floats, or a shape that does not broadcast.
    """
    if mask is None:
        return None
    mask = np.asarray(mask)
    is_float = np.issubdtype(mask.dtype, np.floating)
    if not is_float and mask.dtype != bool:
        raise ValueError(f"mask must be of type bool or float, got {mask.dtype}")
    if is_float and not (mask >= 0).all():  # NaN is not >= 0 either
        raise ValueError("mask must be zero or positive everywhere, got negative or NaN entries")
    return _broadcast("mask", mask != 0, shape)


@dataclass(frozen=True)
class Region:
    """Where the perturbation may go, one entry per image.

    Attributes:
        radius: ε in the units of the images, ``(rows,)``.
        step: first step α in units of ε, ``(rows,)``. None: the method's own.
        lower: least pixel values, of the images' shape, or None.
        upper: largest pixel values, likewise.
        mask: where a perturbation is allowed, bool of the images' shape, or None.
    """

    radius: npt.NDArray[np.float64]
    step: npt.NDArray[np.float64] | None
    lower: npt.NDArray[np.float32] | None
    upper: npt.NDArray[np.float32] | None
    mask: npt.NDArray[np.bool_] | None

    @classmethod
    def of(
        cls,
        x: npt.NDArray[np.float32],
        *,
        norm: float,
        eps: Any,
        eps_step: Any,
        scale: npt.NDArray[np.float64] | None,
        clip_values: Any,
        mask: Any,
    ) -> Region:
        """The region around some images.

        Args:
            x: the images, ``(rows, *input_shape)``.
            norm: of the ball, 1, 2 or inf.
            eps: ε in the units of x, a number, one per image, or what broadcasts to x.
            eps_step: first step in the units of x, likewise. None: the method's own.
            scale: factor of ε, and with it of the step, ``(rows,)``. None: 1.
            clip_values: the classifier's pixel range, a pair of numbers or arrays, or None.
            mask: where a perturbation is allowed, bool or non-negative floats, or None.

        Raises:
            ValueError: an array that does not fit the images, or images outside ``clip_values``.
        """
        lower, upper = _clip_bounds(clip_values, x)
        sizes = _per_pixel("eps", eps, x.shape)
        radius = sizes.reshape(len(x), -1).max(axis=1)
        step = None
        if eps_step is not None:
            steps = _per_pixel("eps_step", eps_step, x.shape).reshape(len(x), -1).max(axis=1)
            step = np.divide(steps, radius, out=np.ones_like(radius), where=radius > 0)
        if scale is not None:
            radius = radius * scale
            sizes = sizes * scale.reshape(-1, *[1] * (x.ndim - 1))
        if (sizes.reshape(len(x), -1) != radius[:, None]).any():
            # an L∞ ball with one radius per pixel is a box within the ball of the largest radius
            if norm != math.inf:
                raise ValueError(
                    f"eps must be one value per sample with norm {norm:g}, got shape "
                    f"{np.shape(eps)} (one value per pixel describes a ball in the L∞ norm only)"
                )
            lower = (x - sizes if lower is None else np.maximum(lower, x - sizes)).astype(x.dtype)
            upper = (x + sizes if upper is None else np.minimum(upper, x + sizes)).astype(x.dtype)
        return cls(radius, step, lower, upper, _free_pixels(mask, x.shape))

    def batch(self, rows: slice) -> Region:
        """The same for some of the images."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, part in parts.items():
            parts[name] = None if part is None else part[rows]
        return Region(**parts)


def _per_pixel(name: str, value: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """A number, one value per image ``(rows,)``, or what broadcasts, as a view of ``shape``."""
    array = np.asarray(value, dtype=np.float64)
    if array.shape == shape[:1]:
        array = array.reshape(-1, *[1] * (len(shape) - 1))
    return _broadcast(name, array, shape)


def _clip_bounds(
    clip_values: Any, x: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | tuple[None, None]:
    """Lower and upper pixel bounds as views of the images' shape, or None.

    Raises:
        ValueError: images outside, or bounds whose shape does not broadcast.
    """
    if clip_values is None:
        return None, None
    lower, upper = (
        _broadcast("clip_values", np.asarray(bound, dtype=ART_NUMPY_DTYPE), x.shape)
        for bound in clip_values
    )
    outside = ((x < lower) | (x > upper)).reshape(len(x), -1).any(1)
    if outside.any():
        raise ValueError(
            f"x must lie within the classifier's clip_values {lower.min():g} … {upper.max():g}, "
            f"got values from {x.min():g} to {x.max():g} (first outside in sample "
            f"{int(np.argmax(outside))}): scale the images, or set clip_values to their range"
        )
    return lower, upper


def _broadcast(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}, which does not broadcast to the images' shape {shape}"
        ) from None
