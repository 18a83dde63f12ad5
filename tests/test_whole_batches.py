"""Models that can only be called on their whole batch, or whose own solver fails: x is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Equilibrium, Joint, L2Ball, Nested, Status, adapt, attack, optimize_input
from jiio_plugins.evaluation import quick_suite, robust_accuracy
from tests.equilibrium.specimens import Hooked, Model, iterate, objective
from tests.helpers import TIGHT, TanhCell, contraction, linear, rand


class Graph(nn.Module):
    """Nodes of one graph as rows, which see their neighbours."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.register_buffer("a", contraction(nodes, 1.0, symmetric=True, seed=9))
        self.weight = nn.Parameter(contraction(6, 0.7, symmetric=False, seed=2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.a @ z @ self.weight.T + u)


class Sequences(nn.Module):
    """States (L, B, D), of inputs (B, L · D)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(contraction(3, 0.7, symmetric=False, seed=2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + 0.2 * z.roll(1, 0) + u)


class Net(nn.Module):
    def __init__(self, kind: str, rows: int) -> None:
        super().__init__()
        self.kind, self.shape = kind, None
        self.encoder, self.head = linear(5, 6, seed=1), linear(6, 3, seed=3)
        cells = {"graph": lambda: Graph(rows), "sequences": Sequences}
        cell = cells.get(kind, lambda: TanhCell(6, 0.7, seed=2))()
        # only a layer of another library keeps all rows together while it solves
        self.deq = Hooked(cell, iterate) if kind == "graph" else Equilibrium(cell, solver=TIGHT)

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        if self.kind == "cached":
            self.shape = self.shape or u.shape
            u = u.reshape(self.shape)
        if self.kind != "sequences":
            return self.head(self.deq(u))
        z = self.deq(u.reshape(len(u), 2, 3).transpose(0, 1))
        return self.head(z.transpose(0, 1).flatten(1))


def found_by(kind: str, rows: int = 6) -> tuple[Any, Tensor, Tensor]:
    """The solution, its values by another model, and those of the start.

    Half of the rows have their optimum at the start, so that some rows are judged again.
    """
    model, fresh, x = Net(kind, rows), Net(kind, rows), rand(rows, 5, seed=4)
    at_start, half = fresh(x).detach(), rows // 2

    def mixed(out: Tensor) -> Tensor:
        stay = (out - at_start)[:half].square().sum(1)
        return torch.cat([stay, objective(out)[half:]])

    model = adapt(model) if kind == "graph" else model
    found = optimize_input(
        model, x, mixed, constraint=L2Ball(0.5), method=Joint(max_iter=3, warmup=1)
    )
    return found, mixed(fresh(found.x)).detach(), mixed(at_start)


@pytest.mark.parametrize("kind", ["graph", "cached", "sequences"])
def test_all_rows_are_judged_together(kind: str) -> None:
    with pytest.warns(UserWarning, match="cannot be called on some of the rows"):
        found, value, start = found_by(kind, rows=2 if kind == "sequences" else 6)
    assert set(found.status.tolist()) <= {
        Status.CONVERGED,
        Status.NO_IMPROVEMENT,
        Status.NOT_VERIFIED,
        Status.GRADIENT_UNSETTLED,  # three iterations are few
    }
    if kind != "graph":  # where a row's value is not its own
        assert bool((found.value <= start + 1e-9).all())
    assert torch.allclose(found.value, value, atol=1e-6)


class Held(TanhCell):
    """A cell that was made for so many rows, or for more than one."""

    def __init__(self, rows: int | None) -> None:
        super().__init__(6, 0.7, seed=2)
        self.rows = rows

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        if self.rows is not None:
            z = z.reshape(self.rows, 6)
        elif len(z) == 1:
            raise IndexError("one row is no batch")
        return super().forward(z, u)


@pytest.mark.filterwarnings("ignore:the (cell|model) cannot be called on some")
@pytest.mark.parametrize("rows", [6, None])
@pytest.mark.parametrize(
    "method",
    [Joint(max_iter=30), Nested(max_iter=5), Nested(max_iter=5, gap_tol=0.1, warm_start=True)],
)
def test_a_cell_that_wants_its_batch_gets_it(rows: int | None, method: Any) -> None:
    def found(cell: nn.Module, verify: bool = True) -> Any:
        model = nn.Sequential(linear(5, 6, seed=1), Equilibrium(cell, solver=TIGHT))
        x, ball = rand(6, 5, seed=4), L2Ball(0.5)
        return optimize_input(model, x, objective, constraint=ball, method=method, verify=verify)

    held, free = found(Held(rows)), found(TanhCell(6, 0.7, seed=2))
    assert torch.allclose(held.x, free.x, rtol=0, atol=1e-12)
    assert torch.allclose(held.value, free.value, rtol=0, atol=1e-12)
    assert torch.equal(held.status, free.status)
    if isinstance(method, Joint):  # where one start is in doubt, a batch is judged as a whole
        searches = found(Held(rows), False), found(TanhCell(6, 0.7, seed=2), False)
        assert torch.equal(*(search.stats.f_evals for search in searches))
        assert (held.stats.f_evals >= free.stats.f_evals).all()


@pytest.mark.filterwarnings("ignore:the (cell|model) cannot be called on some")
@pytest.mark.parametrize("kind", ["cached", "declared", "graph"])
def test_a_second_attempt_does_not_lose_the_first(kind: str) -> None:
    def attacked(model: nn.Module, **settings: Any) -> Any:
        x, y = rand(6, 5, seed=4), torch.arange(6) % 3
        return attack(
            model, x, y, norm=2, eps=0.6, method=Joint(max_iter=3), random_starts=1, **settings
        )

    if kind == "graph":
        model: nn.Module = Net("graph", 6)
        model.deq = Equilibrium(Graph(6), solver=TIGHT, whole_batch=True)
    else:
        model = Net("cached" if kind == "cached" else "plain", 6)
        model.deq.whole_batch = kind == "declared"
    found = attacked(model, retry=Joint(max_iter=5))
    assert torch.allclose(found.stats.model_output, model(found.x), atol=1e-9)
    assert torch.allclose(found.output, model(found.x), atol=1e-6)
    if kind != "graph":
        free = attacked(Net("plain", 6), retry=Joint(max_iter=5))
        assert torch.allclose(found.x, free.x, atol=1e-9)
        assert torch.allclose(found.value, free.value, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the (cell|model) cannot be called on some")
@pytest.mark.parametrize("kind", ["cached", "declared"])
def test_a_suite_gives_a_model_the_batches_that_it_wants(kind: str) -> None:
    def evaluated(kind: str) -> Any:
        model = Net(kind, 6).eval()
        model.deq.whole_batch = kind == "declared"
        if kind == "declared":  # which nothing tells but the declaration
            model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        x = rand(12, 5, seed=4)
        y = Net("plain", 6)(x).argmax(1)
        y[:2] = (y[:2] + 1) % 3  # misclassified, so that there are fewer to attack
        ball: dict[str, Any] = {"norm": 2, "eps": 0.6, "lower": None, "upper": None}
        suite, settings = quick_suite(**ball), {"batch_size": 6, "audit": 4, "progress": False}
        return robust_accuracy(model, x, y, suite, **ball, **settings)

    sizes: list[int] = []
    held, free = evaluated(kind), evaluated("plain")
    assert set(sizes) <= {6}
    assert 0 < held.accuracy.value < held.clean.value < 1
    assert (held.clean, held.accuracy) == (free.clean, free.accuracy)
    assert held.robust == free.robust
    assert held.attacks[0].alone == free.attacks[0].alone
    assert {a.attacked for a in held.attacks} == {12}


def test_outside_an_optimisation_as_well() -> None:
    u = (rand(6, 6, seed=3) * torch.arange(6)[:, None]).requires_grad_()
    held, free = (Equilibrium(cell) for cell in (Held(6), TanhCell(6, 0.7, seed=2)))
    with pytest.warns(UserWarning, match="the cell cannot .* rows .* size …") as seen:
        z = held(u)
    assert len({str(w.message) for w in seen}) == 1
    with pytest.warns(UserWarning, match="the cell cannot be called on some of the rows"):
        (gradient,) = torch.autograd.grad(z.square().sum(), u)
    assert torch.allclose(z, free(u), rtol=0, atol=1e-12)
    (wanted,) = torch.autograd.grad(free(u).square().sum(), u)
    assert torch.allclose(gradient, wanted, rtol=0, atol=1e-12)


def test_states_that_are_not_batch_first_are_named() -> None:
    with pytest.raises(ValueError, match=r"called on 6 rows, the states .* have \[2\]"):
        found_by("sequences")


def test_an_own_solver_that_fails_at_the_end() -> None:
    model, x = adapt(Model("hook").eval()), rand(6, 5, seed=4)
    own = model.deq.solver

    def fails(f: Any, z0: Tensor) -> Any:
        if not torch.is_grad_enabled() and fails.late:
            raise torch.linalg.LinAlgError("singular")
        return own(f, z0)

    fails.late = False
    model.deq.solver = fails

    def late(_: object) -> None:
        fails.late = True

    with pytest.warns(UserWarning, match=r"own solver failed .*singular"):
        found = optimize_input(model, x, objective, constraint=L2Ball(0.5), callback=late)
    assert bool((found.status == Status.DISAGREEMENT).all())
    assert bool(found.stats.model_value.isnan().all())
    fails.late = False
    assert torch.allclose(found.value, objective(model(found.x)), atol=1e-5)
