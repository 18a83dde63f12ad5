"""A problem alone and in a batch: the same answer, at the same cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jiio_plugins import Anderson, Joint, L2Ball, Solution, optimize_input
from tests.cases import (
    CONSTRAINTS,
    METHODS,
    NETWORKS,
    SOME,
    Ridge,
    every_combination,
    every_constraint,
    every_method,
    mixed_batch,
)
from tests.helpers import Net, rand


@every_combination
def test_a_row_alone_and_in_a_batch_of_64(name: str, method: str, constraint: str) -> None:
    model, x, targets = NETWORKS[name](seed=1), mixed_batch(), rand(64, 3, seed=2)

    def run(rows: Any) -> Solution:
        return optimize_input(
            model,
            x[rows],
            lambda y: (y - targets[rows]).square().sum(1),
            method=METHODS[method],
            constraint=CONSTRAINTS[constraint],
        )

    together = run(slice(None))
    for i in SOME:
        alone = run([i])
        torch.testing.assert_close(alone.x, together.x[[i]], rtol=0, atol=1e-8)
        torch.testing.assert_close(alone.value, together.value[[i]], rtol=1e-7, atol=1e-8)
        assert alone.status.tolist() == together.status[[i]].tolist()
        assert alone.stats.vjps.tolist() == together.stats.vjps[[i]].tolist()
        if isinstance(METHODS[method], Joint):  # a nested batch pays for being compacted
            assert alone.stats.f_evals.tolist() == together.stats.f_evals[[i]].tolist()


def test_settling_does_not_depend_on_the_batch() -> None:
    """Problems that reach the tolerance of the loop sooner and later."""
    model = Ridge()
    x = rand(16, 6, seed=4) * torch.logspace(-3, 2, 16, dtype=torch.float64)[:, None]
    method = Joint(max_iter=100, step_size=1 / model.curvature(), tol=1e-4)
    together = optimize_input(model, x, model.objective(seed=3), method=method)
    for i in (0, 7, 15):
        alone = optimize_input(model, x[[i]], model.objective(seed=3), method=method)
        assert int(alone.stats.iterations) < 100
        torch.testing.assert_close(alone.x, together.x[[i]], rtol=0, atol=1e-8)
        assert alone.stats.iterations.tolist() == together.stats.iterations[[i]].tolist()
        assert alone.stats.f_evals.tolist() == together.stats.f_evals[[i]].tolist()


@every_method
def test_stopping_early_does_not_depend_on_the_batch(method: Any) -> None:
    model, x, targets = Net(seed=1), mixed_batch(), rand(64, 3, seed=2)
    level = 0.9

    def run(rows: Any) -> Solution:
        def distance(y: Tensor) -> Tensor:
            return (y - targets[rows]).square().sum(1)

        return optimize_input(
            model,
            x[rows],
            distance,
            method=method,
            constraint=L2Ball(0.5),
            stop=lambda y: distance(y) < level,
        )

    together = run(slice(None))
    assert {bool(together.value[i] < level) for i in SOME} == {True, False}
    for i in SOME:
        alone = run([i])
        torch.testing.assert_close(alone.x, together.x[[i]], rtol=0, atol=1e-8)
        torch.testing.assert_close(alone.value, together.value[[i]], rtol=1e-7, atol=1e-8)
        assert alone.stats.iterations.tolist() == together.stats.iterations[[i]].tolist()


@every_constraint
def test_values_agree_in_float32(constraint: Any) -> None:
    model = Net(seed=1, solver=Anderson(tol=1e-6, max_iter=100)).float()
    x, targets = mixed_batch().float(), rand(64, 3, seed=2).float()
    method = Joint(max_iter=100)  # settled: on the way a rounding may decide what is taken back

    def run(rows: Any) -> Tensor:
        return optimize_input(
            model,
            x[rows],
            lambda y: (y - targets[rows]).square().sum(1),
            constraint=constraint,
            method=method,
        ).value

    together = run(slice(None))
    for i in SOME:
        torch.testing.assert_close(run([i]), together[[i]], rtol=1e-3, atol=1e-3)
