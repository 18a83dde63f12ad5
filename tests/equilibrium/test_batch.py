"""Where the batch is in the states: in another dimension, nowhere, or not to be divided."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchdeq
from torch import Tensor, nn

from jiio_plugins import (
    Equilibrium,
    Joint,
    L2Ball,
    Nested,
    Status,
    adapt,
    attack,
    check,
    count_evaluations,
    envelope_loss,
    joint_solution,
    optimize_input,
    unadapt,
)
from jiio_plugins.verification import judge
from tests.equilibrium.specimens import Hooked, iterate, objective
from tests.helpers import TIGHT, TanhCell, linear, rand
from tests.test_whole_batches import Graph, Sequences

X = rand(6, 5, seed=4)
BALL: Any = {"constraint": L2Ball(0.5)}


class Turned(Sequences):
    """The same on (B, L, D)."""

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return super().forward(z.transpose(0, 1), u.transpose(0, 1)).transpose(0, 1)


class Pairs(Sequences):
    """The same with a state of two parts, and something that all rows share."""

    def initial_state(self, u: Tensor, scale: float, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(u), torch.zeros_like(u[:1])

    def forward(self, z: Any, u: Tensor, scale: float, bias: Tensor) -> Any:
        return super().forward(z[0], u) + 0.1 * z[1], scale * z[0].mean(0, keepdim=True) + bias


class TorchDEQs(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.deq = cell, torchdeq.get_deq(f_tol=1e-9, f_max_iter=80)

    def forward(self, u: Tensor) -> Tensor:
        z_out, _ = self.deq(lambda z: self.cell(z, u), torch.zeros_like(u))
        return z_out[-1]


class Net(nn.Module):
    def __init__(self, layer: nn.Module, turned: bool = False) -> None:
        super().__init__()
        self.encoder, self.head = linear(5, 6, seed=1), linear(6, 3, seed=3)
        self.deq, self.turned = layer, turned

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x).reshape(-1, 2, 3)
        if self.turned:
            return self.head(self.deq(u).flatten(1))
        return self.head(self.deq(u.transpose(0, 1)).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("rows", [6, 2])  # 2 is the length of a sequence
def test_sequences_are_as_if_they_were_batch_first(rows: int) -> None:
    ours = Net(Equilibrium(Sequences(), solver=TIGHT, batch_dim=1))
    same = Net(Equilibrium(Turned(), solver=TIGHT), turned=True)
    assert torch.equal(ours(X), same(X))
    for method in (Joint(max_iter=8), Nested(max_iter=4)):
        found, wanted = (
            optimize_input(m, X[:rows], objective, method=method, **BALL) for m in (ours, same)
        )
        assert torch.equal(found.x, wanted.x)
        assert torch.equal(found.z, wanted.z)
        assert torch.equal(found.stats.f_evals, wanted.stats.f_evals)
    assert "batch_dim=1" in repr(ours)


def test_states_of_parts_and_what_rows_share() -> None:
    class WithMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Equilibrium(Pairs(), solver=TIGHT, batch_dim=1)

        def forward(self, u: Tensor) -> Tensor:
            found: Tensor = self.layer(u, 0.5, u.new_ones(1, 1, 3))[0]
            return found

    model = Net(WithMore())
    found = optimize_input(model, X, objective, **BALL)
    assert bool((found.status == Status.CONVERGED).all())
    assert [t.shape for t in found.z] == [(6, 2, 3), (6, 1, 3)]
    assert torch.allclose(found.value, objective(model(found.x)), atol=1e-8)


@pytest.mark.parametrize("kind", ["own", "torchdeq"])
def test_layers_of_others(kind: str) -> None:
    def build() -> Net:
        cell = Sequences()
        return Net(Hooked(cell, iterate) if kind == "own" else TorchDEQs(cell)).eval()

    model, before = build(), build()(X)
    assert adapt(model, batch_dim=1) is model
    assert torch.equal(model(X), before)
    with count_evaluations() as counter:
        model(X)
    assert counter.f_evals % 6 == 0
    found = optimize_input(model, X, objective, **BALL)
    ours = Net(Equilibrium(Sequences(), solver=TIGHT, batch_dim=1))
    wanted = optimize_input(ours, X, objective, **BALL)
    assert torch.allclose(found.x, wanted.x, atol=1e-5)
    assert bool((found.status == Status.CONVERGED).all())
    assert copy.deepcopy(model).deq.__dict__.get("batch_dim", 1) == 1
    unadapt(model)
    assert not any("batch_dim" in m.__dict__ for m in model.modules())


# Nodes of one graph ------------------------------------------------------------------------------


class Flat(Graph):
    """The same on all nodes as one row."""

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return super().forward(z.reshape(-1, 6), u.reshape(-1, 6)).reshape(1, -1)


class Whole(nn.Module):
    """A graph (nodes, 5), or as one row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head, self.deq = linear(5, 6, seed=1), linear(6, 3, seed=3), layer

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.head(self.deq(self.encoder(x)))
        return self.head(self.deq(self.encoder(x[0]).reshape(1, -1)).reshape(-1, 6))


def of_all(out: Tensor) -> Tensor:
    return objective(out).sum().reshape(1)


def test_nodes_as_one_problem() -> None:
    model = Whole(Equilibrium(Graph(6), solver=TIGHT, batch_dim=None))
    same = Whole(Equilibrium(Flat(6), solver=TIGHT))
    for method in (Joint(), Nested(max_iter=4)):
        found = optimize_input(model, X, of_all, method=method, **BALL)
        wanted = optimize_input(same, X[None], of_all, method=method, **BALL)
        assert torch.equal(found.x, wanted.x[0])
        assert found.z.shape == (1, 6, 6)
        assert found.status.tolist() == [Status.CONVERGED]
        assert float((found.x - X).norm()) == pytest.approx(0.5)
    free = optimize_input(
        model, X, lambda out: out.square().sum().reshape(1), given=[rand(2, seed=1)]
    )
    assert free.status.tolist() == [Status.CONVERGED]
    found = optimize_input(model, X, of_all, variables=["head.bias"], method=Joint(max_iter=3))
    assert found.x["head.bias"].shape == (3,)
    joint = joint_solution(model, X, of_all, start=X, **BALL)
    assert envelope_loss(model, joint, of_all).requires_grad
    assert "x is optimised as a whole" in str(check(model, X))


# Rows that belong together -----------------------------------------------------------------------


class Masked(TanhCell):
    """A mask is drawn once for so many rows. Fewer rows would draw another."""

    def __init__(self) -> None:
        super().__init__(6, 0.7, seed=2)
        self.mask = torch.zeros(0, 6)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        if len(self.mask) != len(z):
            self.mask = (torch.rand(len(z), 6) > 0.3).to(z)
        return super().forward(z, u) * self.mask


@pytest.mark.parametrize("method", [Joint(max_iter=40), Nested(max_iter=3)])
def test_a_mask_of_the_batch_is_kept(method: Any) -> None:
    cell = Masked()
    layer = Equilibrium(cell, solver=TIGHT, whole_batch=True)
    model = nn.Sequential(linear(5, 6, seed=1), layer, linear(6, 3, seed=3))
    model(X)
    mask = cell.mask
    found = optimize_input(model, X, objective, method=method, **BALL)
    assert cell.mask is mask
    assert torch.allclose(found.value, objective(model(found.x)), atol=1e-8)
    assert bool((found.status == Status.CONVERGED).all())
    assert "whole_batch=True" in repr(layer)


def test_bad_declarations() -> None:
    for bad in (-1, 1.0, "L", True):
        with pytest.raises(ValueError, match=r"batch_dim must be the dimension .* got"):
            Equilibrium(Sequences(), batch_dim=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_dim must be"):
        adapt(Net(Hooked(Sequences(), iterate)), batch_dim=-1)
    for wrong, message in (
        (Equilibrium(Sequences(), batch_dim=3), "needs states of 4 dimensions or more"),
        (adapt(Hooked(Sequences(), iterate), batch_dim=3), "needs states of 4 dimensions or more"),
        (Equilibrium(Sequences()), r"have \[2\]\. Say which dimension .*batch_dim=1"),
    ):
        with pytest.raises(ValueError, match=message):
            optimize_input(Net(wrong), X, objective)
    graph = Whole(Equilibrium(Graph(6), batch_dim=None))
    with pytest.raises(ValueError, match=r"of one problem, .* one value, shape \(1,\), got \(6,\)"):
        optimize_input(graph, X, objective)
    with pytest.raises(ValueError, match="one problem, where an attack has one for each label"):
        attack(graph, X, torch.arange(6) % 3, norm=2, eps=0.1)
    with pytest.raises(ValueError, match="not to be judged sample by sample: use optimize_input"):
        judge(graph, X, torch.arange(6) % 3, TIGHT)
    several = nn.Sequential(Equilibrium(TanhCell(5, 0.5, seed=1)), graph)
    with pytest.raises(ValueError, match="None for all layers where x is one problem"):
        optimize_input(several, X, of_all)
