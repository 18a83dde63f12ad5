"""A classifier of normalised images, attacked in pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class Normalized(nn.Module):
    """``network((x − mean) / std)``: images, radius and box stay in pixels of [0, 1].

    Args:
        network: what sees normalised images.
        mean: of each channel, or one for all, in pixels.
        std: likewise, above 0.

    Shape:
        ``forward(x)`` takes images ``(rows, c, h, w)`` and returns what the network does.

    Raises:
        ValueError: other numbers of them, or a std that is not positive.

    Example:
        >>> plain = Normalized(model, mean=[0.0], std=[1.0])
        >>> torch.equal(plain(x), model(x))
        True
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or not min(std) > 0:
            raise ValueError(
                "normalize takes means, then as many standard deviations above 0, one a channel or "
                f"one for all of them: got {[*mean]} and {[*std]}"
            )
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(values).reshape(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class.

        Args:
            x: images in [0, 1], ``(rows, c, h, w)``.
        """
        if self.mean.shape[1] not in (1, x.shape[1]):
            raise ValueError(
                f"normalize has {self.mean.shape[1]} means, the images have {x.shape[1]} channels: "
                "give one a channel, or one for all"
            )
        out: Tensor = self.network((x - self.mean) / self.std)
        return out
