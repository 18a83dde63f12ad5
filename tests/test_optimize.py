"""``optimize_input``: what it takes, what it gives back, and what it says of bad input."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Box, Equilibrium, Joint, L2Ball, Solution, Stats, Status, optimize_input
from jiio_plugins.envelope import joint_solution
from tests.cases import squared
from tests.helpers import Elementwise, Net, linear, rand


class NoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(5, 3, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_x_that_is_not_finite(bad: float) -> None:
    x = rand(4, 5, seed=1)
    x[2, 3] = bad
    with pytest.raises(ValueError, match=r"x holds NaN or Inf \(first in sample 2\)"):
        optimize_input(Net(), x, squared)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_x_that_is_not_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"floating point, got {dtype}.*x\.float\(\)"):
        optimize_input(Net(), torch.ones(2, 5, dtype=dtype), squared)


def test_a_complex_x_loses_nothing() -> None:
    x = torch.complex(rand(2, 5, seed=1), rand(2, 5, seed=2))
    with pytest.raises(TypeError, match=r"got torch.complex128: give .*view_as_real\(x\)"):
        optimize_input(Net(), x, squared)


class Convolved(nn.Module):
    """The error of a convolution has other words than that of a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.net = nn.Conv1d(1, 1, 1), Net().float()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.conv(x[:, None]).squeeze(1))


@pytest.mark.parametrize("make", [lambda: Net().float(), Convolved])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_x_of_another_precision_than_the_model(make: Any, dtype: torch.dtype) -> None:
    x = rand(2, 5, seed=1).to(dtype)
    for call in (optimize_input, joint_solution):
        with pytest.raises(
            TypeError, match=rf"input is {dtype} .* are torch.float32: .*model.to\({dtype}\)"
        ):
            call(make(), x, squared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_by_what_it_can_hold(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    found = optimize_input(
        model,
        rand(4, 5, seed=1).to(dtype),
        squared,
        constraint=L2Ball(0.5),
        method=Joint(max_iter=5),
    )
    assert found.x.dtype == dtype
    assert set(found.status.tolist()) <= {Status.CONVERGED, Status.GRADIENT_UNSETTLED}
    exact = squared(model.double()(found.x.double()))
    torch.testing.assert_close(found.value.double(), exact, rtol=0.1, atol=0.02)


def test_inputs_of_another_precision_beside_what_is_optimised() -> None:
    """x where parameters are optimised, and what is given."""
    with pytest.raises(TypeError, match=r"the input is torch.float32 .* x.to\(torch.float64\)"):
        optimize_input(Net(), rand(2, 5, seed=1).float(), squared, variables=["encoder.bias"])

    class Conditioned(Net):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return super().forward(x) + self.head(condition)

    given = [rand(2, 8, seed=2).float()]
    with pytest.raises(TypeError, match=r"given\[0\] is torch.float32 .*given\[0\].to\(.*64\)$"):
        optimize_input(Conditioned(), rand(2, 5, seed=1), squared, given=given)


def test_a_model_may_convert_its_input() -> None:
    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().float()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float()).double()

    found = optimize_input(Converting(), rand(2, 5, seed=1), squared, constraint=L2Ball(0.1))
    assert found.x.dtype == torch.float64


def test_x_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match="x must be one tensor, got list"):
        optimize_input(Net(), [[1.0] * 5], squared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch first, \(batch, \.\.\.\), got shape \(5,\)"):
        optimize_input(Net(), rand(5, seed=1), squared)


def test_an_objective_or_radius_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match="objective must be a function of the model's output"):
        optimize_input(Net(), rand(2, 5, seed=1), 3)  # type: ignore[arg-type]
    for radius in ("big", None):
        with pytest.raises(TypeError, match=f"radius must be a number or a tensor, got {radius!r}"):
            optimize_input(Net(), rand(2, 5, seed=1), squared, constraint=L2Ball(radius))


def test_a_printed_solution_is_a_few_lines() -> None:
    solution = optimize_input(Net(), rand(2, 5, seed=1), squared, constraint=L2Ball(0.5))
    first, *reports, values, costs = str(solution).splitlines()
    assert first == "2 problems, x (2, 5)"
    assert "\n".join(reports) == solution.report()
    stats = solution.stats
    cost, call = (stats.f_evals + stats.vjps).mean(), stats.model_f_evals.mean()
    assert bool((stats.model_f_evals < stats.verification_f_evals).all())
    assert f"as much as {float(cost / call):.2g} calls of the model" in reports[-1]
    assert f"price per row: {float(cost):.3g} evaluations" in reports[-1]
    assert values.startswith(f"mean value {float(solution.value.mean()):.4g}, by the model's own")
    assert costs.startswith("mean per row: f_evals ")


@pytest.mark.parametrize("shape", [(0, 5), (0, 1, 8, 8)])
def test_an_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    solution = optimize_input(Net(), x, squared, constraint=L2Ball(0.5))
    assert solution.x.shape == shape
    assert solution.x is not x
    assert solution.value.shape == solution.status.shape == (0,)
    assert solution.stats.f_evals.shape == solution.stats.vjps.shape == (0,)
    assert solution.report() == ""
    assert solution.stats.summary() == {}


def test_a_solution_is_shown_in_one_line() -> None:
    zeros = torch.zeros(3, 100)
    status = torch.tensor([0, 0, 1], dtype=torch.int8)
    stats = Stats(zeros[:, 0], zeros[:, 0], zeros[:, 0], torch.tensor([1e-5, 2e-3, 3e-4]))
    shown = repr(Solution(zeros, zeros, None, None, status, stats))
    assert shown == (
        "Solution(2 CONVERGED, 1 MAX_ITER; residual of z up to 2.0e-03; "
        "tensors in .x, .z, .status, .stats; print() says more)"
    )
    empty = Stats(*[zeros[:0, 0]] * 4)
    assert "no problems" in repr(Solution(None, zeros[:0], None, None, status[:0], empty))


def test_a_batch_of_one_and_images() -> None:
    x = rand(1, 5, seed=1).reshape(1, 1, 5, 1)
    solution = optimize_input(Net(), x, squared, constraint=L2Ball(0.5))
    assert solution.x.shape == (1, 1, 5, 1)
    flat = optimize_input(Net(), x.flatten(1), squared, constraint=L2Ball(0.5))
    assert torch.equal(solution.x.flatten(1), flat.x)


def test_a_model_without_a_layer() -> None:
    with pytest.raises(ValueError, match=r"no equilibrium layer.*Put jiio_plugins\.Equilibrium"):
        optimize_input(NoLayer(), rand(2, 5, seed=1), squared)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        optimize_input(lambda x: x, rand(2, 5, seed=1), squared)  # type: ignore[arg-type]


def test_a_cell_of_another_output_shape() -> None:
    model = Net()
    model.equilibrium = Equilibrium(Elementwise(lambda z, u: z[:, :4]))
    with pytest.raises(ValueError, match=r"shape \(2, 4\).* shape \(2, 8\)"):
        optimize_input(model, rand(2, 5, seed=1), squared)


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda y: y.square().sum(), r"\(\)"),
        (lambda y: y.square(), r"\(4, 3\)"),
        (lambda y: y.square().sum(1)[:2], r"\(2,\)"),
        (lambda y: y.square().sum(1, keepdim=True), r"\(4, 1\)"),
        (lambda y: 3.0, "float"),
        (lambda y: None, "NoneType"),
    ],
)
def test_an_objective_of_another_shape(objective: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"shape \(4,\), got {got}; use reduction='none'"):
        optimize_input(Net(), rand(4, 5, seed=1), objective)


@pytest.mark.parametrize(
    ("objective", "error", "words"),
    [
        (lambda y: y.argmax(1), TypeError, "real floating-point values, got torch.int64"),
        (lambda y: torch.view_as_complex(y[:, :2].contiguous()), TypeError, "take .abs"),
        (lambda y: squared(y.detach()), ValueError, "the objective has no gradient"),
        (lambda y: torch.zeros(4), ValueError, "does not use the model's output"),
    ],
)
def test_an_objective_without_a_gradient(
    objective: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        optimize_input(Net(), rand(4, 5, seed=1), objective)


def test_a_model_without_a_gradient() -> None:
    class Shut(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    x = rand(4, 5, seed=1)
    with pytest.raises(ValueError, match="the objective has no gradient"):
        optimize_input(Shut(), x, squared)
    found = optimize_input(Detached(), x, squared)
    assert "whether the model detaches x" in found.report()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        optimize_input(Net(), x, squared)


def test_what_is_no_tensor() -> None:
    x = rand(4, 5, seed=1)
    with pytest.raises(TypeError, match="Several inputs go in as one"):
        optimize_input(Net(), (x, x), squared)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor of booleans, one per row, got bool"):
        optimize_input(Net(), x, squared, stop=lambda _: True)  # type: ignore[arg-type, return-value]
    listed: Any = [0, 0, 1, 1]
    with pytest.raises(TypeError, match="tensor of integers, got list"):
        optimize_input(Net(), x, squared, variables=["head.bias"], groups=listed)
    flags = torch.tensor([False, False, True, True])
    with pytest.raises(ValueError, match=r"one integer per row, shape \(4,\), got torch.bool"):
        optimize_input(Net(), x, squared, variables=["head.bias"], groups=flags)
    with pytest.raises(TypeError, match="a list of names, got the string 'head'"):
        optimize_input(Net(), x, squared, variables="head")
    with pytest.raises(TypeError, match=r"max_iter must be an integer, got 2\.5"):
        Joint(max_iter=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tol must not be negative"):
        Joint(tol=-1.0)


def test_settings_of_a_wrong_kind() -> None:
    x = rand(2, 5, seed=1)
    with pytest.raises(TypeError, match=r"method must be Joint\(\.\.\.\) or Nested"):
        optimize_input(Net(), x, squared, method="joint")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verify must be Anderson"):
        optimize_input(Net(), x, squared, verify=1e-5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"constraint must be an L2Ball.*got float"):
        optimize_input(Net(), x, squared, constraint=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword"):
        optimize_input(Net(), x, squared, iterations=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="radius must be finite and not negative"):
        optimize_input(Net(), x, squared, constraint=L2Ball(-0.1))
    with pytest.raises(ValueError, match="mask has shape"):
        optimize_input(Net(), x, squared, constraint=L2Ball(0.1, mask=torch.ones(4)))


def test_any_output_the_objective_understands() -> None:
    """A dict with nested tuples, not a tensor."""

    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.net(x)
            return {"y": y, "parts": (y[:, :1], [y[:, 1:]])}

    x = rand(4, 5, seed=1)
    plain = optimize_input(Net(), x, squared, constraint=L2Ball(0.5))
    rich = optimize_input(Rich(), x, lambda out: squared(out["y"]), constraint=L2Ball(0.5))
    torch.testing.assert_close(rich.x, plain.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rich.output["parts"][1][0], plain.output[:, 1:])


class Ordered(OrderedDict[str, Any]):
    """A dict of a class of its own."""


@dataclass
class Record:
    """One tensor under a name."""

    y: Tensor


class Pair(NamedTuple):
    """Two of them."""

    y: Tensor
    total: Tensor


@pytest.mark.parametrize(
    ("pack", "get"),
    [
        (lambda y: y, lambda out: out),
        (lambda y: Record(y), lambda out: out.y),
        (lambda y: Pair(y, y.sum()), lambda out: out.y),
        (lambda y: Ordered(y=y, mean=y.mean(), table=y.new_zeros(3, 2)), lambda out: out["y"]),
    ],
)
def test_an_output_of_any_kind_is_that_of_the_returned_x(pack: Any, get: Any) -> None:
    """Also where some rows fall back to their start, and what is no tensor by rows."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Any:
            return pack(self.net(x))

    def objective(out: Any) -> Tensor:
        return squared(get(out))

    x = rand(8, 5, seed=1)
    wild = Joint(max_iter=1, step_size=20.0)
    found = optimize_input(Packed(), x, objective, method=wild, constraint=L2Ball(5.0))
    fallen = (found.x == x).flatten(1).all(1)
    assert bool(fallen.any())
    assert not bool(fallen.all())
    with torch.no_grad():
        expected = Packed()(found.x)
    for output in (found.output, found.stats.model_output):
        assert type(output) is type(expected)
        torch.testing.assert_close(get(output), get(expected), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(objective(output), found.value, rtol=1e-6, atol=1e-7)
    if isinstance(expected, (Pair, Ordered)):
        names = ("total",) if isinstance(expected, Pair) else ("mean", "table")
        for name in names:
            own, other = (
                getattr(out, name) if isinstance(out, Pair) else out[name]
                for out in (found.output, expected)
            )
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


def test_a_starting_point_outside_the_set_is_brought_in() -> None:
    model, x = Net(), 3 * rand(4, 5, seed=1)
    solution = optimize_input(model, x, squared, constraint=Box(-0.5, 0.5))
    assert float(solution.x.abs().max()) <= 0.5
    center = torch.zeros(4, 5).double()
    solution = optimize_input(model, x, squared, constraint=L2Ball(0.5, center))
    assert float(solution.x.norm(dim=1).max()) <= 0.5 * (1 + 1e-6)
