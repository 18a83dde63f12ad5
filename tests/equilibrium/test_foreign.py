"""``jiio_plugins.adapt``: layers that others wrote, in the forms that circulate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchdeq
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Equilibrium,
    Joint,
    L2Ball,
    Nested,
    Status,
    adapt,
    count_evaluations,
    optimize_input,
    unadapt,
)
from jiio_plugins.evaluation import layers_as
from tests.equilibrium.specimens import ByFunction, Hooked, Model, Named, iterate, objective
from tests.helpers import TanhCell, linear, rand

FORMS = ("hook", "function", "scales", "dict", "list", "tuple")
forms = pytest.mark.parametrize("form", FORMS)


def reference() -> nn.Module:
    """The same network with a layer of ours."""

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = linear(5, 6, seed=1), linear(6, 3, seed=3)
            self.deq = Equilibrium(TanhCell(6, 0.7, seed=2), solver=Anderson(tol=1e-12))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.deq(self.encoder(x)))

    return Ours()


@forms
def test_the_model_stays_what_it_is_to_the_bit(form: str) -> None:
    model, x = Model(form).eval(), rand(4, 5, seed=4).requires_grad_()
    before, kind = model(x), type(model.deq)
    (gradient,) = torch.autograd.grad(before.sum(), x, allow_unused=True)
    keys, held = list(model.state_dict()), set(model.deq.__dict__)

    def same() -> None:
        after = model(x)
        assert torch.equal(after, before)
        (again,) = torch.autograd.grad(after.sum(), x, allow_unused=True)
        assert (again is gradient is None) or torch.equal(again, gradient)

    assert adapt(model) is model
    same()
    adapted = type(model.deq)
    assert adapted is not kind
    assert type(adapt(model).deq) is adapted
    optimize_input(model, x, objective, constraint=L2Ball(0.5), method=Joint(max_iter=2))
    same()
    assert list(model.state_dict()) == keys
    assert unadapt(model) is model
    assert type(model.deq) is kind
    assert set(model.deq.__dict__) - {"took"} == held - {"took"}
    same()


@forms
def test_an_attack_is_as_strong_as_the_nested_one(form: str) -> None:
    model, x = adapt(Model(form).eval()), rand(6, 5, seed=4)
    ball: Any = {"constraint": L2Ball(0.5)}
    found = optimize_input(model, x, objective, **ball)
    nested = optimize_input(model, x, objective, method=Nested(), **ball)
    assert bool((found.status == Status.CONVERGED).all())
    assert float(found.value.mean()) <= float(nested.value.mean()) + 0.03 * abs(
        float(nested.value.mean())
    )
    if form != "scales":  # whose head sees something else
        ours = optimize_input(reference(), x, objective, **ball)
        assert torch.allclose(found.x, ours.x, atol=1e-4)
    assert torch.allclose(found.value, objective(model(found.x)), atol=1e-5)


def test_the_models_own_solver_is_judged() -> None:
    model = Model("hook")
    model.deq.settings = {"most": 1}
    found = optimize_input(adapt(model), rand(6, 5, seed=4), objective, constraint=L2Ball(0.5))
    assert bool((found.status == Status.DISAGREEMENT).any())
    assert torch.allclose(found.stats.model_value, objective(model(found.x)), atol=1e-10)


def test_another_solver_and_the_count() -> None:
    model, x = adapt(Model("hook")), rand(4, 5, seed=4)
    with layers_as(solver=Anderson(tol=1e-10)):
        assert torch.allclose(model(x), reference()(x), atol=1e-7)
    with count_evaluations() as counter:
        out = model(x)
    assert counter.f_evals == 4 * model.deq.took
    assert torch.equal(model(x), out)


@forms
def test_products_of_a_backward_pass_are_no_evaluations(form: str) -> None:
    model, x = adapt(Model(form).eval()), rand(4, 5, seed=4).requires_grad_()
    with count_evaluations() as counter:
        out = model(x)
        forward = counter.f_evals
        out.sum().backward()
    assert counter.f_evals == forward > 0
    assert counter.vjps == 0


@forms
def test_copies_and_pickles_work(form: str) -> None:
    model, x = adapt(Model(form).eval()), rand(4, 5, seed=4)
    optimize_input(model, x, objective, constraint=L2Ball(0.5), method=Joint(max_iter=2))
    again = copy.deepcopy(model) if form == "scales" else pickle.loads(pickle.dumps(model))
    assert type(again.deq) is type(model.deq)
    assert torch.equal(again(x), model(x))


def test_layers_of_two_kinds_and_a_layer_used_twice() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Hooked(TanhCell(5, 0.6, seed=1), iterate)
            self.second = torchdeq.get_deq(f_tol=1e-8, f_max_iter=60)
            self.third = Equilibrium(TanhCell(5, 0.5, seed=3))
            self.head = linear(5, 3, seed=4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.first(x))
            z_out, _ = self.second(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros_like(x))
            return self.head(self.third(z_out[-1]))

    model, x = Both().eval(), rand(4, 5, seed=5)
    with torch.enable_grad():
        before = model(x.requires_grad_())
    assert torch.equal(adapt(model)(x), before)
    found = optimize_input(model, x, objective, constraint=L2Ball(0.5))
    nested = optimize_input(model, x, objective, constraint=L2Ball(0.5), method=Nested())
    assert bool((found.status == Status.CONVERGED).all())
    assert float(found.value.mean()) <= 0.97 * float(nested.value.mean())
    assert isinstance(unadapt(model).third, Equilibrium)
    assert type(model.first) is Hooked


class Within(nn.Module):
    """A cell that holds a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.cell, self.inner = TanhCell(6, 0.5, seed=2), inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * self.cell(z, x) + 0.2 * self.inner(x + 0.1 * z)


@pytest.mark.parametrize(
    ("outer", "inner"), [("ours", "ours"), ("ours", "theirs"), ("theirs", "ours")]
)
def test_layers_within_layers(outer: str, inner: str) -> None:
    def layer(kind: str, cell: nn.Module) -> nn.Module:
        ours = kind == "ours"
        return Equilibrium(cell, solver=Anderson(tol=1e-6)) if ours else ByFunction(cell, iterate)

    model = Model("hook")
    model.deq = layer(outer, Within(layer(inner, TanhCell(6, 0.5, seed=4))))
    x = rand(6, 5, seed=4)
    before = model(x)
    assert torch.equal(adapt(model)(x), before)
    found, nested = (
        optimize_input(model, x, objective, constraint=L2Ball(0.5), method=method)
        for method in (Joint(max_iter=6), Nested(max_iter=1))
    )
    assert bool((found.status == Status.CONVERGED).all())
    assert torch.allclose(found.value, objective(model(found.x)), atol=1e-5)
    assert float(found.value.mean()) <= 0.99 * float(nested.value.mean())


def test_a_layer_whose_calls_change() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deq, self.calls = Equilibrium(TanhCell(5, 0.5, seed=2)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.deq(x)
            return self.deq(x) if self.calls % 2 else x

    with pytest.raises(RuntimeError, match="layers where its first pass called 2"):
        optimize_input(Changes(), rand(4, 5, seed=4), objective, constraint=L2Ball(0.5))


def test_a_solver_that_ignores_its_start() -> None:
    model = Model("hook")
    model.deq.solver = lambda f, z0: iterate(f, torch.ones_like(z0))
    x = rand(6, 5, seed=4)
    for method in (Joint(), Nested(warm_start=True)):
        found = optimize_input(adapt(model), x, objective, constraint=L2Ball(0.5), method=method)
        assert bool((found.status == Status.CONVERGED).all())


# What is not served -----------------------------------------------------------------------------


def test_nothing_is_recognised() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        adapt(3)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"Looked at Sequential .*: 0 \(Linear\), 1 \(ReLU\)"):
        adapt(model)
    with pytest.raises(ValueError, match=r"no equilibrium layer.*Put jiio_plugins.Equilibrium"):
        optimize_input(model, torch.ones(2, 2), objective)


def test_a_model_that_is_not_adapted_yet() -> None:
    with pytest.raises(ValueError, match=r"served as they are: deq \(Hooked\)\. Write .*adapt"):
        optimize_input(Model("hook"), rand(4, 5, seed=4), objective)


def attacked(model: nn.Module) -> Any:
    return optimize_input(adapt(model), rand(4, 5, seed=4), objective, constraint=L2Ball(0.5))


def test_solvers_of_other_forms() -> None:
    model = Model("hook").train()
    model.deq.solver = lambda f, z0: ("nothing", z0)
    with pytest.raises(ValueError, match="must return a state like the one it starts from"):
        attacked(model)

    class NoStart(Named):
        def forward(self, *, x: Tensor) -> Tensor:
            return self.solver(self.cell, "zero")

    model.deq, model.named = NoStart(nn.Identity()), True
    with pytest.raises(ValueError, match=r"NoStart must call its solver as solver\(f, z0, ...\)"):
        attacked(model)

    class Never(Named):
        def forward(self, *, x: Tensor) -> Tensor:
            return x

    model.deq = Never(nn.Identity())
    with pytest.raises(ValueError, match="Never did not call its solver"):
        attacked(model)

    class Twice(Named):
        def forward(self, *, x: Tensor) -> Any:
            return super().forward(x=super().forward(x=x)["low"].repeat(1, 3))["high"]

    model.deq = Twice(TanhCell(6, 0.5, seed=1))
    with pytest.raises(ValueError, match="Twice calls its solver more than once"):
        attacked(model)


def test_a_backward_solve_behind_something_else() -> None:
    with pytest.raises(ValueError, match=r"Scales returns something else .* in eval mode"):
        optimize_input(
            adapt(Model("scales").train()), rand(4, 5, seed=4), objective, training_mode=True
        )
