"""Checks of plain arguments."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import torch

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


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise unless a tensor is of real floating-point numbers.

    Args:
        tensor: what was given.
        name: what the message calls it. The last word is a name in code.

    Raises:
        TypeError: of integers, booleans or complex numbers.
    """
    if tensor.is_floating_point():
        return
    symbol = name.split()[-1]
    advice = f"convert it with {symbol}.float()"
    if tensor.dtype == torch.uint8:
        advice += f", pixels of 0 to 255 with {symbol}.float() / 255"
    if tensor.is_complex():
        advice = (
            f"give its real and imaginary parts, torch.view_as_real({symbol}), and put them "
            "together inside, with torch.view_as_complex"
        )
    raise TypeError(f"{name} must be real floating point, got {tensor.dtype}: {advice}")


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
