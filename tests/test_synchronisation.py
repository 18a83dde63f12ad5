"""No host synchronisation inside the loops, seen without an accelerator.

On the meta device tensors have shapes and no values: whatever the host reads (``item``, ``bool``,
``nonzero``) raises there, and the loops take the branch they take on an accelerator. Copies of host
numbers to the device, which make the host wait as well, are watched for. ``test_gpu.py`` does the
same on CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import jiio_plugins.equilibrium.solvers.loop
import jiio_plugins.methods.best
import jiio_plugins.methods.joint
from jiio_plugins import (
    Anderson,
    Box,
    Broyden,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Picard,
)
from jiio_plugins.constraints import FeasibleSet
from jiio_plugins.equilibrium.solvers import iterate
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import ParameterVariable, Variable
from jiio_plugins.models import load_pretrained
from tests.cases import NETWORKS, PLAIN_NETWORKS, squared
from tests.helpers import Context, Net, contraction

if TYPE_CHECKING:
    from collections.abc import Callable

CONSTRAINTS = {
    "free": None,
    "box": Box(-0.8, 0.8),
    "l2": L2Ball(0.5),
    "l1 in a box": Intersection(L1Ball(1.0), Box(-0.9, 0.9)),
    "l2 in a box": Intersection(L2Ball(1.0), Box(-0.9, 0.9)),
    "linf in a box": Intersection(LinfBall(0.2), Box(-0.9, 0.9)),
}


class NoHostCopies(TorchFunctionMode):
    """Raises where a number of the host is copied to a device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type != "cpu":
                raise AssertionError(f"{func.__name__}({args[0]}) copies from the host")
        if func is Tensor.copy_ and not (isinstance(args[1], Tensor) and args[1].is_meta):
            raise AssertionError("copy_ from the host")
        return func(*args, **kwargs)


class Unread:
    """Stands for the flag that an accelerator answers later: never yet."""

    def __init__(self, device: torch.device, known: bool = False) -> None:
        self.known = known

    def __call__(self, answer: Tensor) -> bool:
        assert answer.is_meta
        return self.known


@pytest.fixture(autouse=True)
def unread_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (
        jiio_plugins.methods.best,
        jiio_plugins.methods.relaxed,
        jiio_plugins.equilibrium.solvers.loop,
    )
    for module in modules:
        monkeypatch.setattr(module, "HostFlag", Unread)


def on_meta(feasible: FeasibleSet) -> FeasibleSet:
    for name, value in vars(feasible).items():
        if isinstance(value, Tensor):
            setattr(feasible, name, value.to("meta"))
    return feasible


def test_the_watch_sees_what_it_should() -> None:
    x = torch.zeros(3, device="meta")
    for read in (
        lambda: bool(x.sum()),
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with NoHostCopies():
        torch.full((2,), 3.0, device="meta")
        with pytest.raises(AssertionError, match="copies from the host"):
            torch.as_tensor(2.0, device="meta")


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_the_joint_loop(name: str, constraint: Any) -> None:
    x = torch.zeros(16, 5, dtype=torch.float64)
    feasible = on_meta(FeasibleSet(x) if constraint is None else constraint.bind(x))
    model, x = NETWORKS[name]().to("meta").eval().requires_grad_(False), x.to("meta")
    problem = Problem(Variable(model, x), squared, feasible)
    with NoHostCopies():
        result = Joint(max_iter=8).run(problem, stop=lambda y: y[:, 0] > 1)
    assert result.v.is_meta


@pytest.mark.parametrize("constraint", [None, L2Ball(0.5)], ids=["free", "l2"])
def test_the_joint_loop_over_groups(constraint: Any) -> None:
    model = Context().eval().requires_grad_(False)
    variable = ParameterVariable(
        model, torch.zeros(20, 4).double(), ["context"], torch.arange(4).repeat(5)
    )
    v = variable.start
    feasible = on_meta(FeasibleSet(v) if constraint is None else constraint.bind(v))
    variable.model, variable.x = model.to("meta"), variable.x.to("meta")
    variable.start, variable.groups.index = v.to("meta"), variable.groups.index.to("meta")
    problem = Problem(variable, squared, feasible)
    with NoHostCopies():
        result = Joint(max_iter=8).run(problem)
    assert result.v.is_meta


def test_the_joint_loop_on_a_multiscale_classifier() -> None:
    x = torch.zeros(4, 1, 8, 8)
    feasible = on_meta(Intersection(L2Ball(1.0), Box(0.0, 1.0)).bind(x))
    model, x = load_pretrained("digits").to("meta").requires_grad_(False), x.to("meta")
    problem = Problem(Variable(model, x), lambda y: -y.logsumexp(1), feasible)
    with NoHostCopies():
        Joint(max_iter=4).run(problem)


@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden])
def test_solvers_and_gradients(kind: Any) -> None:
    a = contraction(6, 0.9, symmetric=False, seed=1).to("meta")
    u = torch.zeros(5, 6, dtype=torch.float64, device="meta")
    model = Net(solver=kind(max_iter=12)).to("meta")
    x = torch.zeros(5, 5, dtype=torch.float64, device="meta", requires_grad=True)

    class Map:
        def __call__(self, z: Tensor) -> Tensor:
            return z @ a.T + u

        restrict: Callable[[Tensor], None]

    with NoHostCopies():
        iterate(Map(), torch.zeros_like(u), kind(max_iter=12))
        model(x).sum().backward()
    assert x.grad.is_meta
