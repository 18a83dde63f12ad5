"""One pass of the network: its products, and the estimate of the objective that they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from tests.cases import NETWORKS, every_network, squared
from tests.helpers import TIGHT, Net, PairNet, Series, rand


@every_network
@pytest.mark.parametrize("answer_fz", [False, True])
def test_the_adjoint_alone(name: str, answer_fz: bool) -> None:
    model, x = NETWORKS[name](), rand(4, 5, seed=1)
    problem = Problem(Variable(model, x), squared)
    z = problem.warm_up(x, 2).z
    mu = rand(*z.shape, seed=2)
    lin = problem.linearize(x, z, answer_fz=answer_fz)
    alone = lin.jz_mu(mu)
    assert torch.equal(alone, lin.vjp(mu)[0])
    assert float(alone.abs().max()) > 0


@pytest.mark.parametrize("network", [Net, PairNet, Series])
def test_the_estimate_of_the_objective_is_exact_to_second_order(network: Any) -> None:
    """``ℓ(f) + μᵀ J_z (f − z)`` at a state and adjoint that are off by ε: the error falls as ε²."""
    x = rand(4, 5, seed=1)
    problem = Problem(Variable(network(), x), lambda y: y.square().sum(1))
    exact = problem.solve(x, TIGHT)
    z, value = exact.z, problem.loss(exact.output)
    jz_mu = torch.zeros_like(z)
    for _ in range(200):
        at = problem.linearize(x, z)
        dl_dz = at.gradient(problem.loss(at.output))
        jz_mu, _ = at.vjp(jz_mu + dl_dz)
    errors = []
    for eps in (1e-2, 1e-3):
        away, off = z + eps * rand(*z.shape, seed=2), jz_mu + eps * rand(*z.shape, seed=3)
        at = problem.linearize(x, away)
        loss = problem.loss(at.output)
        dl_dz = at.gradient(loss)
        at.vjp(off + dl_dz)
        estimate = loss.detach() + (at.own_jz_mu * (at.fz - away)).sum(1)
        errors.append(float((estimate - value).abs().max()))
    assert errors[1] < 2e-2 * errors[0]
