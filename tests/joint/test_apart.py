"""Rows with a graph of their own: the same products, at the cost of these rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Equilibrium, Joint, L2Ball
from jiio_plugins.joint import ParameterVariable, Problem, Variable
from jiio_plugins.joint.modes import RecordMode
from jiio_plugins.methods import solve
from tests.cases import NETWORKS, squared
from tests.helpers import TIGHT, Context, CountedCell, Net, PairNet, Series, linear, rand

OTHERS, SOME = torch.tensor([0, 2, 3, 5]), torch.tensor([4, 1])


def rows_apart() -> tuple[Tensor, Tensor]:
    return OTHERS, SOME


class Shared(nn.Module):
    """A cell that is given one row for all beside its own, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = linear(5, 8, 2), linear(8, 3, 3)
        self.equilibrium = Equilibrium(_Shared(), solver=TIGHT)

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        return self.head(self.equilibrium(u, u[:1], u[:1], torch.ones(len(u), 1)))


class _Shared(nn.Module):
    def forward(self, z: Tensor, u: Tensor, one: Tensor, two: Tensor, still: Tensor) -> Tensor:
        return torch.tanh(0.5 * z.roll(1, 1) + u * still + one * two)


@pytest.mark.parametrize("build", [Net, PairNet, NETWORKS["skip"], Shared])
def test_the_products_are_the_same(build: Any) -> None:
    x, model = rand(6, 5, seed=1), build()
    problem = Problem(Variable(model, x), squared)
    z = problem.warm_up(x, 2).z
    mu = rand(*z.shape, seed=2)
    whole, apart = problem.linearize(x, z), problem.linearize(x, z, apart=rows_apart)
    torch.testing.assert_close(apart.fz, whole.fz)
    torch.testing.assert_close(apart.output, whole.output)
    torch.testing.assert_close(apart.jz_mu(mu), whole.jz_mu(mu))
    for seed in range(3):  # the last of them counts
        mu = mu.index_copy(0, SOME, rand(2, z.shape[1], seed=seed))
        wanted = whole.jz_mu(mu)[SOME]
        torch.testing.assert_close(apart.jz_mu_apart(mu[SOME]), wanted)
    torch.testing.assert_close(*(at.gradient(problem.loss(at.output)) for at in (apart, whole)))
    products = apart.vjp(mu), whole.vjp(mu)
    torch.testing.assert_close(*products)
    torch.testing.assert_close(apart.by_v(products[0][1]), whole.by_v(products[1][1]))
    unasked = problem.linearize(x, z, apart=rows_apart), problem.linearize(x, z)
    torch.testing.assert_close(*(at.vjp(mu) for at in unasked))


def test_only_where_v_is_the_input_of_one_layer() -> None:
    x = rand(6, 4, seed=1)
    problem = Problem(ParameterVariable(Context(), x, ["context"], None), squared)
    z = problem.warm_up(problem.v_start, 2).z
    assert problem.linearize(problem.v_start, z, apart=rows_apart).apart is None
    x = rand(6, 5, seed=1)
    problem = Problem(Variable(Series(), x), squared)
    z = problem.warm_up(x, 2).z
    assert problem.linearize(x, z, apart=rows_apart).apart is None


class Mixed(nn.Module):
    """A cell that some rows damp, which makes them slow. It counts the rows of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = linear(5, 8, 2), linear(8, 3, 3)
        self.cell = _Mixed(8, 1.2, seed=1)
        self.equilibrium = Equilibrium(self.cell, solver=TIGHT)

    def forward(self, x: Tensor, rate: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.encoder(x), rate))


class _Mixed(CountedCell):
    def forward(self, z: Tensor, u: Tensor, rate: Tensor) -> Tensor:  # type: ignore[override]
        return z + rate * (super().forward(z, u) - z)


class Refusing(_Mixed):
    """Wants its whole batch where there is a graph."""

    refused = 0

    def forward(self, z: Tensor, u: Tensor, rate: Tensor) -> Tensor:  # type: ignore[override]
        if torch.is_grad_enabled() and len(z) < 12:
            self.refused += 1
            raise RuntimeError("all rows, please")
        return super().forward(z, u, rate)


STEPS = 12


def run(kind: type[_Mixed] = _Mixed) -> tuple[Any, Problem, Any]:
    """A search in which some rows are slow, with the cell, which has counted products."""
    model, x = Mixed(), rand(12, 5, seed=4)
    cell = model.cell = model.equilibrium.cell = kind(8, 1.2, seed=1)
    rate = torch.where(torch.arange(12) % 3 == 0, 0.05, 1.0).double()[:, None]
    problem = Problem(Variable(model, x, [rate]), lambda y: -squared(y), L2Ball(0.5))
    found = solve(problem, Joint(max_iter=STEPS, gap_tol=0.0, adjoint_warmup=0))
    assert 0 < int((problem.vjps > 1.5 * STEPS).sum()) < 6
    return found, problem, cell


def in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = property(lambda _: None, lambda *_: None)
    monkeypatch.setattr(RecordMode, "apart", nothing, raising=False)


def test_a_row_takes_part_in_the_products_that_it_pays_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart, problem, cell = run()
    in_one_graph(monkeypatch)
    whole, same, other = run()
    assert torch.equal(problem.vjps, same.vjps)
    torch.testing.assert_close(apart.v, whole.v, rtol=0, atol=1e-9)
    paid = float(problem.vjps.sum())
    assert sum(cell.products) < 1.1 * paid  # a slow row that has settled waits for the others
    assert sum(other.products) > 1.7 * paid


def test_a_cell_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, cell = run(Refusing)
    assert cell.refused == 1
    in_one_graph(monkeypatch)
    whole, _, _ = run()
    torch.testing.assert_close(found.v, whole.v, rtol=0, atol=1e-9)
