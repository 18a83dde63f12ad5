"""What is optimised: named parameters, alone and for groups of rows, and inputs beside others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Joint, L2Ball, LinfBall, Nested, Solution, optimize_input
from jiio_plugins.joint.variables import Groups
from tests.cases import SOME, every_method, squared
from tests.helpers import Context, Net, independent_output, rand

# Named parameters -------------------------------------------------------------------------------


def test_several_named_parameters_at_once() -> None:
    model, x = Context(), rand(4, 4, seed=1)
    target = rand(4, 3, seed=2)
    solution = optimize_input(
        model,
        x,
        lambda y: (y[:, :3] - target).square().sum(1),
        method=Joint(max_iter=200, step_size=0.05),
        variables=["context", "head.bias"],
    )
    assert solution.x["context"].shape == (1, 6)
    assert solution.x["head.bias"].shape == (3,)
    before = (model(x)[:, :3] - target).square().sum().item()
    assert solution.value.item() < 0.65 * before
    with torch.no_grad():
        model.context.copy_(solution.x["context"])
        model.head.bias.copy_(solution.x["head.bias"])
    after = (model(x)[:, :3] - target).square().sum()
    torch.testing.assert_close(after, solution.value[0], rtol=1e-6, atol=1e-8)
    for slope in torch.autograd.grad(after, [model.context, model.head.bias]):
        assert float(slope.norm()) < 0.02  # it is an optimum of both


def test_unknown_variables() -> None:
    x = rand(4, 4, seed=1)
    with pytest.raises(ValueError, match=r"\['contxt'\] given, there are context, encoder"):
        optimize_input(Context(), x, squared, variables=["contxt"])
    with pytest.raises(ValueError, match="an empty list given"):
        optimize_input(Context(), x, squared, variables=[])


# Groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraint", [None, L2Ball(0.7), LinfBall(0.3)], ids=["free", "l2", "linf"]
)
@every_method
def test_five_rows_that_share_a_variable(method: Any, constraint: Any) -> None:
    """64 problems of five rows, interleaved: each as if it were alone."""
    model, x = Context(seed=1), rand(320, 4, seed=1)
    targets = rand(320, 3, seed=2)
    groups = torch.arange(64).repeat(5)

    def run(rows: Tensor, index: Tensor | None) -> Solution:
        def objective(y: Tensor) -> Tensor:
            fit = (y[:, :3] - targets[rows]).square().sum(1)
            return fit + 0.1 * y[:, 3:].square().sum(1)

        return optimize_input(
            model,
            x[rows],
            objective,
            method=method,
            constraint=constraint,
            variables=["context"],
            groups=index,
        )

    together = run(torch.arange(320), groups)
    assert together.x["context"].shape == (64, 6)
    for p in SOME:
        alone = run((groups == p).nonzero().squeeze(1), None)
        assert alone.x["context"].shape == (1, 6)
        torch.testing.assert_close(
            alone.x["context"][0], together.x["context"][p], rtol=0, atol=1e-8
        )
        torch.testing.assert_close(alone.value, together.value[[p]], rtol=1e-7, atol=1e-8)
        assert alone.status.tolist() == together.status[[p]].tolist()


def test_groups_of_one_row_are_rows() -> None:
    """With every row a problem of its own, a context per row is an input per row."""
    model, x = Context(seed=1), rand(6, 4, seed=1)

    def objective(y: Tensor) -> Tensor:
        return y[:, :3].square().sum(1)

    class AsInput(nn.Module):
        def forward(self, both: Tensor) -> Tensor:
            rows, context = both[:, :4], both[:, 4:]
            z = model.equilibrium(model.encoder(rows) + context)
            return torch.cat([model.head(z), context], dim=1)

        def modules(self) -> Any:
            return iter([self, *model.modules()])

    by_name = optimize_input(
        model, x, objective, variables=["context"], groups=torch.arange(6), constraint=L2Ball(0.5)
    )
    by_input = optimize_input(
        AsInput(),
        torch.cat([x, torch.zeros(6, 6).double()], dim=1),
        objective,
        constraint=L2Ball(0.5, mask=torch.arange(10) >= 4),
    )
    torch.testing.assert_close(by_name.x["context"], by_input.x[:, 4:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(by_name.value, by_input.value)


@pytest.mark.parametrize("index", [None, [0] * 5, [2, 0, 1, 0, 0]])
def test_states_of_a_problem_lie_together(index: list[int] | None) -> None:
    groups = Groups(5, None if index is None else torch.tensor(index))
    z, jz_mu = rand(5, 4, seed=1), rand(5, 4, seed=2)
    joined = groups.join(z, jz_mu)
    assert len(joined) == groups.problems
    for part, block in zip(groups.part(joined), (z, jz_mu), strict=True):
        assert torch.equal(part, block)
    norms = joined.square().sum(2)
    expected = torch.stack([groups.sum(t.square().sum(1)) for t in (z, jz_mu)], dim=1)
    torch.testing.assert_close(norms, expected)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (torch.tensor([0, 0, 1]), r"shape \(4,\), got torch.int64 \(3,\)"),
        (torch.tensor([0.0, 0.0, 1.0, 1.0]), r"got torch.float32 \(4,\)"),
        (torch.tensor([[0, 0, 1, 1]]), r"shape \(4,\)"),
        (torch.tensor([0, 0, 2, 2]), r"without gaps, got \[0, 2\]"),
        (torch.tensor([-1, 0, 0, 1]), r"without gaps, got \[-1, 0, 1\]"),
        (torch.tensor([1, 1, 1, 1]), r"without gaps, got \[1\]"),
    ],
)
def test_bad_groups(groups: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optimize_input(Context(), rand(4, 4, seed=1), squared, variables=["context"], groups=groups)


def test_groups_need_variables_and_room_for_them() -> None:
    x, groups = rand(4, 4, seed=1), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="it needs variables="):
        optimize_input(Context(), x, squared, groups=groups)
    with pytest.raises(ValueError, match=r"leading dimension of 1.*head\.weight does not"):
        optimize_input(Context(), x, squared, groups=groups, variables=["context", "head.weight"])


# What else the model is given -------------------------------------------------------------------


class Conditional(nn.Module):
    """``(h(z*), x)`` of a network whose input is ``shift + scale · x``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([self.net(shift + scale * x), x], dim=1)


def conditions(rows: int) -> list[Tensor]:
    return [rand(rows, 5, seed=21), rand(rows, 1, seed=22).exp()]


@pytest.mark.parametrize(
    "method", [Joint(max_iter=100, tol=1e-10), Nested(max_iter=20, step_size=0.05)]
)
def test_what_else_the_model_is_given_stands_still(method: Any) -> None:
    model, x, more = Conditional(), torch.zeros(4, 5).double(), conditions(4)
    kept = [t.clone() for t in more]
    together = optimize_input(model, x, squared, given=more, method=method)
    torch.testing.assert_close(more, kept, rtol=0, atol=0)
    output = independent_output(model.net, more[0] + more[1] * together.x)
    value = squared(output) + squared(together.x)
    torch.testing.assert_close(together.value, value, rtol=1e-6, atol=1e-9)
    assert (value < squared(independent_output(model.net, more[0]))).all()
    for i in range(4):
        row = [t[i : i + 1] for t in more]
        alone = optimize_input(model, x[i : i + 1], squared, given=row, method=method)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-7, atol=1e-9)


def test_gradients_reach_what_the_model_is_given() -> None:
    model, x, target = Conditional(), torch.zeros(2, 5).double(), rand(2, 5, seed=23)

    def found(more: list[Tensor]) -> Tensor:
        solution = optimize_input(
            model,
            x,
            squared,
            given=more,
            differentiable=True,
            method=Joint(max_iter=200, tol=1e-11),
        )
        return (solution.x * target).sum()

    more = conditions(2)
    gradients = torch.autograd.grad(found([t.requires_grad_() for t in more]), more)
    for k, index in enumerate([(1, 0), (0, 0)]):
        values = []
        for step in (1e-4, -1e-4):
            moved = conditions(2)
            moved[k][index] += step
            values.append(found(moved).item())
        expected = (values[0] - values[1]) / 2e-4
        assert gradients[k][index].item() == pytest.approx(expected, rel=1e-4)


def test_parameters_of_a_model_that_is_given_more() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Context()

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            out: Tensor = self.inner(x + shift)
            return out

    model, x, shift = Shifted(), rand(4, 4, seed=1), rand(4, 4, seed=2)
    groups, options = torch.tensor([0, 1, 1, 0]), {"method": Joint(max_iter=20)}
    found = optimize_input(
        model, x, squared, given=(shift,), variables=["inner.context"], groups=groups, **options
    )
    expected = optimize_input(
        model.inner, x + shift, squared, variables=["context"], groups=groups, **options
    )
    torch.testing.assert_close(found.x["inner.context"], expected.x["context"])
    torch.testing.assert_close(found.value, expected.value)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        (torch.zeros(2, 1), TypeError, "a tuple or list of tensors, .* got a tensor"),
        ([1.0], TypeError, r"got \[1.0\]"),
        (iter([torch.zeros(2, 1)]), TypeError, "a tuple or list of tensors"),
        (None, TypeError, "got None"),
        ([torch.zeros(3, 1)], ValueError, r"a row per sample, \(2, ...\), got \(3, 1\)"),
        ([torch.zeros(())], ValueError, "a row per sample"),
    ],
)
def test_bad_given(more: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        optimize_input(Conditional(), torch.zeros(2, 5).double(), squared, given=more)
