"""What a model returns comes back as the type it was."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Equilibrium, Joint, L2Ball, optimize_input
from jiio_plugins.utils import leaves, map_leaves
from tests.helpers import Net, TanhCell, linear, rand


class Attributes(OrderedDict):  # type: ignore[type-arg]
    """A dict whose entries are attributes, too, as Hugging Face's models return."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits)
        self.logits = logits


class Pair(NamedTuple):
    logits: Tensor
    count: int = 3


@dataclass(frozen=True, slots=True)
class Record:
    logits: Tensor
    count: int = 3


class Listed(list[Tensor]):
    def __init__(self, logits: Tensor) -> None:
        super().__init__([logits])
        self.logits = logits


class Tupled(tuple[Tensor, int]):
    __slots__ = ()

    def __new__(cls, logits: Tensor) -> Tupled:
        return super().__new__(cls, (logits, 3))

    @property
    def logits(self) -> Tensor:
        return self[0]


MAKE = [Attributes, Pair, Record, Listed, Tupled]


@pytest.mark.parametrize("make", MAKE)
def test_a_container_stays_what_it_is(make: Any) -> None:
    value, kept = make(torch.zeros(2)), {"other": (1, "a", None)}
    mapped = map_leaves({"in": [value], **kept}, Tensor, lambda t: t + 1)
    (found,) = mapped["in"]
    assert type(found) is make
    assert all(bool((t == 1).all()) for t in leaves(mapped, Tensor))
    assert bool((found.logits == 1).all())
    assert mapped["other"] is kept["other"]
    assert bool((value.logits == 0).all())
    assert map_leaves(value, Tensor, lambda t: t) is value


def test_containers_of_the_standard_library() -> None:
    value = defaultdict(list, a=torch.zeros(2), b=torch.ones(2, 2).max(1))
    mapped = map_leaves(value, Tensor, torch.neg)
    assert mapped["new"] == []
    assert type(mapped["b"]) is type(value["b"])
    assert [t.tolist() for t in leaves(mapped, Tensor)] == [[0, 0], [-1, -1], [0, 0]]
    for opaque in (3, "ab", torch.Size([1]), Record, SimpleNamespace(a=torch.zeros(1))):
        assert map_leaves(opaque, Tensor, torch.neg) is opaque


class Wrapped(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.net, self.make = Net().float(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.net(x))


@pytest.mark.parametrize("make", MAKE)
def test_an_output_under_autocast(make: Any) -> None:
    seen: list[Any] = []

    def objective(output: Any) -> Tensor:
        seen.append(output)
        value: Tensor = output.logits.square().sum(1)
        return value

    method = Joint(max_iter=2, precision=torch.bfloat16)
    found = optimize_input(Wrapped(make), rand(2, 5, seed=1).float(), objective, method=method)
    assert {type(output) for output in (*seen, found.output)} == {make}
    assert {t.dtype for t in leaves(seen, Tensor)} == {torch.float32}


class Named(NamedTuple):
    first: Tensor
    second: Tensor


class NamedCell(nn.Module):
    """Reads its state and what is injected by name."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = TanhCell(6, 0.6, seed=1)
        self.injected: set[int] = set()

    def initial_state(self, u: Record) -> Named:
        return Named(torch.zeros_like(u.logits[:, :3]), torch.zeros_like(u.logits[:, 3:]))

    def forward(self, z: Named, u: Record) -> Named:
        self.injected.add(len(u.logits))
        flat = self.cell(torch.cat([z.first, z.second], dim=1), u.logits)
        return Named(flat[:, :3], flat[:, 3:])


def test_a_named_state_and_a_record_that_is_injected() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = linear(5, 6, seed=2)
            self.equilibrium = Equilibrium(NamedCell(), solver=Anderson(tol=1e-10))

        def forward(self, x: Tensor) -> Tensor:
            state = self.equilibrium(Record(self.encoder(x)))
            assert type(state) is Named
            return torch.cat([state.second, state.first], dim=1)

    x = rand(4, 5, seed=3)
    x[2:] = 1e3 * x[2:]  # saturated, and solved at once
    model = Model()
    with torch.no_grad():
        y = model(x)
        z = model.equilibrium.cell.cell.weight.new_zeros(4, 6)
        for _ in range(200):
            z = model.equilibrium.cell.cell(z, model.encoder(x))
    torch.testing.assert_close(y, z.roll(3, 1), rtol=1e-8, atol=1e-8)
    assert min(model.equilibrium.cell.injected) < 4  # rows that have converged are left out
    found = optimize_input(model, x, lambda y: y.sum(1), constraint=L2Ball(0.1))
    assert type(found.z) is Named
