"""The logits of a classifier that returns more than them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from jiio_plugins.losses import Output, check_output, logits_of


class LogitsOf(nn.Module):
    """A classifier that returns its logits alone, by :func:`jiio_plugins.losses.logits_of`.

    Args:
        network: returns them in a tuple, a list, a dict or an object.
        output: which of these they are. None: by the rule.

    Shape:
        ``forward(*inputs)`` returns logits ``(rows, classes)``.

    Raises:
        TypeError: an ``output`` that says nothing.

    Example:
        >>> plain = LogitsOf(model)  # whose output is a tensor: it stays as it is
        >>> bool((plain(x) == model(x)).all())
        True
    """

    def __init__(self, network: nn.Module, output: Output = None) -> None:
        super().__init__()
        check_output(output)
        self.network, self.output = network, output

    def forward(self, *inputs: Any) -> Tensor:
        """See the class."""
        found: Tensor = logits_of(self.network(*inputs), self.output)
        return found
