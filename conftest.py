"""Settings for the whole suite, and the names that the examples in docstrings start from."""

import signal
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from jiio_plugins.data import load_digits
from jiio_plugins.models import load_pretrained

# reproducible examples
settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

# a job in the background ignores it, and so would the programs that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# rounding then does not depend on how many cores the machine has
torch.set_num_threads(1)


class Halve(nn.Module):
    """``f(z, u) = z / 2 + u``, whose fixed point is 2 u."""

    def forward(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """One evaluation."""
        return z / 2 + u


@pytest.fixture(autouse=True)
def _names(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """The shipped model of the digits, new for each example, and four images it has not seen."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    torch.manual_seed(0)
    x, y = (tensor[:4] for tensor in load_digits("test"))
    model = load_pretrained("digits")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    doctest_namespace.update(
        model=model, x=x, y=y, optimizer=optimizer, cell=Halve(), encoder=nn.Flatten()
    )
