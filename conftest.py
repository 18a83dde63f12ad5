"""Settings of the whole suite, what is skipped, and the names that examples in docstrings use.

What needs a library that is not installed is skipped, be it a module or a test.
"""

import signal
import sys
import traceback
from collections.abc import Generator, Iterator
from importlib.util import find_spec
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


OPTIONAL = {  # what the base install does not bring
    "PIL",
    "art",
    "deepinv",
    "learn2learn",
    "lightning_fabric",
    "matplotlib",
    "ptwt",
    "scipy",
    "sklearn",
    "tensorboard",
    "tensorboardX",
    "torchattacks",
    "torchdeq",
    "torchmetrics",
    "torchvision",
}


def raised(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it was raised from or that it carries."""
    while error is not None:
        yield error
        if carried := getattr(error, "exc_info", None):  # of an example in a docstring
            yield from raised(carried[1])
        for one in getattr(error, "failures", ()):
            yield from raised(one)
        error = error.__cause__ or error.__context__


def missing(error: BaseException | None) -> str | None:
    """The optional library whose absence an exception comes from."""
    for one in raised(error):
        name = (getattr(one, "name", None) or "").partition(".")[0]
        if isinstance(one, ImportError) and name in OPTIONAL and not find_spec(name):
            return name
    return None


def half_run(error: BaseException) -> set[str]:
    """Files that were being run as modules, packages of the collected one among them."""
    frames = (f for one in raised(error) for f, _ in traceback.walk_tb(one.__traceback__))
    return {frame.f_code.co_filename for frame in frames if frame.f_code.co_name == "<module>"}


def _skip(report: Any, path: str, call: Any) -> None:
    name = missing(call.excinfo.value) if call.excinfo else None
    if name and report.outcome == "failed":
        files = half_run(call.excinfo.value)
        for module in [m for m, it in sys.modules.items() if getattr(it, "__file__", "") in files]:
            del sys.modules[module]  # half of it: who imports it next is to fail likewise
        report.outcome = "skipped"
        report.longrepr = (path, 0, f"Skipped: {name} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A module that imports what is not there is skipped."""
    report = yield
    call = getattr(report, "call", None)
    if call is not None:
        _skip(report, str(collector.path), call)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """So is a test that comes upon it."""
    report = yield
    _skip(report, str(item.path), call)
    return report


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
