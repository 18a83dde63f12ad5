"""What a call leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Status
from jiio_torchattacks import JIIO
from tests.adapters.torchattacks.helpers import CLASSES, MEAN, STD, Net, batch, net, value


class Fails(nn.Module):
    """The net, which raises at its k-th pass from now; 0: never."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.left = 0

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of luck")
        return self.net(x)


def snapshot(model: nn.Module, atk: JIIO) -> dict[str, Any]:
    return {
        "training": {name: m.training for name, m in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {n: (id(p.grad), _copy(p.grad)) for n, p in model.named_parameters()},
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "normalization": atk._normalization_applied,
        "targeted": (atk.targeted, atk.attack_mode),
    }


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


@pytest.mark.parametrize("fail_at", [0, 1, 2, 5])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("mode", ["default", "random", "least likely"])
def test_everything_is_restored(fail_at: int, train: bool, normalised: bool, mode: str) -> None:
    model = Fails().train(train)
    model.net.norm.eval()  # frozen, within a model in train mode
    model.net.head.weight.requires_grad_(False)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, k) if k % 2 and p.requires_grad else None
    images, labels = batch(3)
    images.requires_grad_()
    atk = JIIO(model, eps=0.5, steps=3, random_starts=1)
    if mode == "random":
        atk.set_mode_targeted_random(quiet=True)
    elif mode == "least likely":
        atk.set_mode_targeted_least_likely(quiet=True)
    if normalised:
        atk.set_normalization_used(MEAN, STD)
    given = atk.normalize(images.detach()).requires_grad_() if normalised else images
    inputs = [given, given.clone(), labels, labels.clone()]
    before = snapshot(model, atk)
    model.left = fail_at
    if fail_at:
        with pytest.raises(RuntimeError, match="out of luck"):
            atk(given, labels)
        assert atk.solution is None
    else:
        adversarial = atk(given, labels)
        assert not adversarial.requires_grad
        assert adversarial.data_ptr() != given.data_ptr()
    assert_same(before, snapshot(model, atk))
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[2], inputs[3])
    assert images.grad is None


def test_train_mode_does_not_change_the_result() -> None:
    images, labels = batch()
    expected = JIIO(net(), eps=0.5, steps=3)(images, labels)
    assert torch.equal(JIIO(net().train(), eps=0.5, steps=3)(images, labels), expected)


def test_a_failed_call_does_not_spoil_the_next() -> None:
    model, (images, labels) = net(), batch()
    atk = JIIO(model, eps=0.5, steps=3)
    atk.set_normalization_used(MEAN, STD)
    normalized = atk.normalize(images)
    expected = atk(normalized, labels)
    with pytest.raises(ValueError, match="labels must be in 0"):
        atk(normalized, labels + CLASSES)
    assert atk.solution is None
    assert torch.equal(atk(normalized, labels), expected)


def test_solution() -> None:
    model, (images, labels) = net(), batch(5)
    atk = JIIO(model, eps=0.5)
    assert atk.solution is None
    adversarial = atk(images, labels)
    solution = atk.solution
    assert torch.equal(solution.x, adversarial)
    for per_image in (solution.stats.f_evals, solution.stats.vjps, solution.stats.z_residual):
        assert per_image.shape == (5,)
        assert bool((per_image > 0).all())
    assert float(solution.stats.z_residual.max()) < 1e-8
    assert solution.status.tolist() == [Status.CONVERGED] * 5
    assert "5 × CONVERGED" in solution.report()
    torch.testing.assert_close(
        -solution.value, value(model, adversarial, labels), rtol=1e-6, atol=0
    )
    atk(images[:2], labels[:2])
    assert len(atk.solution.status) == 2
    assert len(solution.status) == 5
    with pytest.raises(AttributeError):
        atk.solution = None


def test_a_copy_works_by_itself() -> None:
    model, (images, labels) = net(), batch(2)
    atk = JIIO(model, eps=0.5, steps=2)
    atk.set_mode_targeted_random(quiet=True)
    twin = copy.deepcopy(atk)
    assert twin.model is not model
    assert torch.equal(twin(images, labels), atk(images, labels))


def test_train_mode_is_kept_where_it_is_asked_for() -> None:
    seen: list[bool] = []
    model, (images, labels) = net(), batch(2)
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    atk = JIIO(model, eps=0.5, steps=2)
    atk(images, labels)
    assert not any(seen)
    seen.clear()
    atk.set_model_training_mode(model_training=True)
    adversarial = atk(images, labels)
    assert all(seen)
    assert not model.training
    assert not torch.equal(adversarial, images)
