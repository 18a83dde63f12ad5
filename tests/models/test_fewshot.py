"""Few-shot models: a context for each task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from jiio_plugins import Anderson, Joint, count_evaluations, optimize_input
from jiio_plugins.models import MDEQFewShot, SinusoidDEQ
from jiio_plugins.models.fewshot import FiLM, TaskLinear


@pytest.mark.parametrize("size", [14, 28])
@pytest.mark.parametrize(
    "settings",
    [{}, {"channels": (8, 16)}, {"channels": (8,), "stride": 2}, {"channels": (8, 8, 8)}],
    ids=str,
)
def test_model_shapes_and_gradients(settings: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(ways=3, **settings)
    torch.nn.init.normal_(model.head.weight)
    logits = model(torch.rand(2, 1, size, size))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        # at v = 0 the maps of the modulation have no gradient, as v itself multiplies them
        if not name.startswith("film"):
            assert p.grad is not None, name
            assert float(p.grad.abs().max()) > 0, name


def test_paper_size_splits_its_context_over_the_scales() -> None:
    model = MDEQFewShot.paper(ways=20)
    assert model.context.shape == (1, 400)
    assert model.film.sizes == [200, 200]
    assert FiLM((8, 24), 10).sizes == [2, 8]
    with torch.no_grad():
        assert model(torch.rand(1, 1, 28, 28)).shape == (1, 20)
    with pytest.raises(ValueError, match="context 1 is too small to be split over 2 scales"):
        FiLM((8, 8), 1)
    with pytest.raises(ValueError, match="stride must be 1, 2 or 4, got 3"):
        MDEQFewShot(stride=3)


def test_every_part_of_the_context_acts_on_the_answer() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(context=12).double()
    torch.nn.init.normal_(model.head.weight)
    model.equilibrium.solver = Anderson(tol=1e-10, max_iter=200)
    x = torch.rand(2, 1, 28, 28).double()
    (grad,) = torch.autograd.grad(model(x).square().sum(), model.context)
    assert float(grad.abs().min()) > 0


def test_each_row_can_have_its_own_task() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(context=12, solver=Anderson(tol=1e-10, max_iter=200)).double()
    x = torch.rand(3, 1, 28, 28).double()
    own = {
        "context": torch.randn(3, 12).double(),
        "head.weight": torch.randn(3, *model.head.weight.shape[1:]).double(),
        "head.bias": torch.randn(3, 5).double(),
    }
    with torch.no_grad():
        together = functional_call(model, own, (x,))
        for k in range(3):
            one = functional_call(model, {n: t[k : k + 1] for n, t in own.items()}, (x[k : k + 1],))
            assert torch.allclose(together[k : k + 1], one, atol=1e-8)


def test_any_context_leaves_the_cell_easy_to_solve() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(solver=Anderson(tol=1e-5, max_iter=60))
    x = torch.rand(16, 1, 28, 28)
    with torch.no_grad(), count_evaluations() as counter:
        functional_call(model, {"context": 10 * torch.randn(16, 64)}, (x,))
    assert counter.worst_residual <= 1e-5


def test_task_linear_is_a_linear_map() -> None:
    torch.manual_seed(0)
    head = TaskLinear(4, 3)
    weight, bias = torch.randn(1, 3, 4), torch.randn(1, 3)
    x = torch.randn(5, 4)
    shared = functional_call(head, {"weight": weight, "bias": bias}, (x,))
    rows = {"weight": weight.expand(5, -1, -1), "bias": bias.expand(5, -1)}
    assert torch.allclose(shared, x @ weight[0].T + bias)
    assert torch.allclose(shared, functional_call(head, rows, (x,)), atol=1e-6)


def test_joint_adaptation_fits_two_tasks_at_once() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(ways=2, context=12, solver=Anderson(tol=1e-6, max_iter=100))
    x = torch.rand(4, 1, 28, 28)
    y = torch.tensor([0, 1, 1, 0])
    found = optimize_input(
        model,
        x,
        lambda logits: cross_entropy(logits, y, reduction="none"),
        variables=("context", "head.weight"),
        groups=torch.tensor([0, 0, 1, 1]),
        method=Joint(max_iter=40, step_size=0.2),
    )
    assert isinstance(found.x, dict)
    assert found.x["context"].shape == (2, 12)
    assert bool((found.value < math.log(2)).all())  # from 2 log 2 at v = 0
    assert bool((found.output.argmax(1) == y).all())


def test_sinusoid_model_has_a_contraction() -> None:
    torch.manual_seed(0)
    model = SinusoidDEQ(width=10, context=3, solver=Anderson(tol=1e-6, max_iter=100))
    torch.nn.init.normal_(model.equilibrium.cell.weight, std=5.0)
    with torch.no_grad(), count_evaluations() as counter:
        y = functional_call(model, {"context": 5 * torch.randn(7, 3)}, (torch.randn(7, 1),))
    assert y.shape == (7, 1)
    assert counter.worst_residual <= 1e-6
