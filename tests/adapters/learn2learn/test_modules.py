"""Modules that draw or keep statistics: dropout, batch norm, normalised weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from jiio_plugins import Equilibrium
from tests.adapters.learn2learn.toys import HEAD, Toy, learner, task
from tests.helpers import TIGHT, TanhCell


def test_normalised_weights_are_computed_once_unless_they_are_adapted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    compute = parametrizations._WeightNorm.forward
    monkeypatch.setattr(
        parametrizations._WeightNorm, "forward", lambda *a: calls.append(1) or compute(*a)
    )
    plain, model = Toy(), Toy()
    weight_norm(model.encoder)
    x, y, query, query_y = task(30)
    ends = []
    for maml in (learner(model=plain), learner(model=model)):
        clone = maml.clone()
        loss = cross_entropy(clone(x), y)
        calls.clear()
        clone.adapt(loss)
        ends.append(clone.context.detach())
        assert len(calls) < 5
        clone(x)
        assert maml.module is plain or len(calls) > 2  # nothing is left behind
        cross_entropy(clone(query), query_y).backward()
    torch.testing.assert_close(*ends)
    inner = [name for name, _ in model.named_parameters() if name.endswith("original0")]
    assert model.get_parameter(inner[0]).grad is not None
    clone = learner(model=model, adapt=inner).clone()
    loss = cross_entropy(clone(x), y)
    clone.adapt(loss)
    assert cross_entropy(clone(x), y).item() < loss.item()
    assert len(calls) > 10


def test_a_random_parametrisation_keeps_one_mask_too() -> None:
    model = Toy().train()
    register_parametrization(model.encoder, "weight", nn.Dropout(0.4))
    model.head = nn.Sequential(nn.Dropout(0.4), model.head)
    x, y, _, _ = task(30)
    clone = learner(model=model).clone()
    clone.adapt(lambda: cross_entropy(clone(x), y))
    assert float(clone.residuals.joint.max()) < 1e-6


class Noisy(TanhCell):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(6, 0.5, 4)
        self.part = part

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.part(z) + u)


def test_dropout_and_batch_norm_in_the_cell() -> None:
    x, y, _, _ = task(30)
    model = Toy()
    model.equilibrium = Equilibrium(Noisy(nn.Dropout(0.5)), solver=TIGHT)
    clone = learner(model=model).clone()
    with pytest.raises(ValueError, match=r"active dropout \(part\)"):
        clone.adapt(cross_entropy(clone(x), y))
    model.eval()
    clone = learner(model=model).clone()
    clone.adapt(cross_entropy(clone(x), y))
    model.equilibrium = Equilibrium(
        Noisy(nn.BatchNorm1d(6, affine=False, dtype=torch.float64)), solver=TIGHT
    )
    clone = learner(model=model, tol=1e-6).clone()
    clone.train()
    loss = cross_entropy(clone(x), y)
    before = model.equilibrium.cell.part.running_mean.clone()
    with pytest.warns(UserWarning, match=r"BatchNorm in train mode \(part\)"):
        clone.adapt(loss, first_order=True)
    assert torch.equal(before, model.equilibrium.cell.part.running_mean)


@pytest.mark.parametrize("adapt", [("context",), HEAD])
def test_batch_norm_before_the_layer_has_its_meta_gradient(adapt: tuple[str, ...]) -> None:
    """And its running statistics move with the calls that the user makes, no others."""
    model, (x, y, query, query_y) = Toy(), task(30)
    norm = nn.BatchNorm1d(6, dtype=torch.float64)
    model.encoder = nn.Sequential(model.encoder, norm)
    maml = learner(model=model, adapt=adapt, tol=1e-11)

    def meta_loss() -> Tensor:
        clone = maml.clone()
        clone.adapt(cross_entropy(clone(x), y))
        return cross_entropy(clone(query), query_y)

    meta_loss().backward()
    assert int(norm.num_batches_tracked) == 2
    gradient, step = norm.weight.grad.clone(), 1e-5
    for k in (0, 3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                norm.weight[k] += sign * step
            values.append(float(meta_loss().detach()))
            with torch.no_grad():
                norm.weight[k] -= sign * step
        assert float(gradient[k]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_dropout_outside_the_cell_keeps_one_mask() -> None:
    model, (x, y, _, _) = Toy(), task(30)
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    clone = learner(model=model).clone()
    torch.manual_seed(0)
    loss = cross_entropy(clone(x), y)
    state = torch.get_rng_state()
    clone.adapt(loss)
    assert torch.equal(state, torch.get_rng_state())
    assert float(clone.residuals.joint) < 1e-6
