"""Checks of plain arguments."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_count(value: object, least: int) -> bool:
    """Whether it is an integer, numpy's included, not below a least one.

    Args:
        value: what was given. A boolean is no integer here.
        least: smallest integer accepted.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return int(value) >= least


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd takes of one made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def check_counts(settings: object, **least: int) -> None:
    """Raise unless these attributes are integers, none below its least.

    Args:
        settings: what has the attributes.
        **least: name of an attribute = smallest integer accepted.

    Raises:
        TypeError: an attribute that is no integer.
        ValueError: one below its least.
    """
    for name, smallest in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
