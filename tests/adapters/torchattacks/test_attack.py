"""``jiio_torchattacks.JIIO`` against what torchattacks and its users expect of an attack."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchattacks.attack import Attack

from jiio_plugins import (
    Anderson,
    Equilibrium,
    Joint,
    Nested,
    Status,
    attack as engine_attack,
    attack_objective,
    count_evaluations,
)
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import load_pretrained
from jiio_torchattacks import JIIO
from tests.helpers import TanhCell, independent_output, linear, rand

CLASSES = 4
SHAPE = (3, 4, 4)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ORDER = {"L2": 2.0, "Linf": math.inf}


class Net(nn.Module):
    """Three channels of 4×4 pixels, BatchNorm and dropout around an equilibrium; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.encoder = linear(48, 12, seed=1)
        self.dropout = nn.Dropout(0.5)
        cell = TanhCell(12, 0.6, seed=2)
        self.equilibrium = Equilibrium(cell, solver=Anderson(max_iter=100, tol=1e-10))
        self.head = linear(12, CLASSES, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        u = 3 * self.encoder(self.norm(x).flatten(1))
        return 4 * self.head(self.dropout(self.equilibrium(u)))


class Normalize(nn.Module):
    """The normalisation as a layer of the model."""

    def __init__(self, mean: list[float], std: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        # float32 first: torchattacks keeps both in float32
        self.mean = torch.tensor(mean).to(dtype).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std).to(dtype).reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = Net().to(dtype).eval()
    if dtype == torch.float32:
        model.equilibrium.solver = Anderson(tol=1e-5)
    return model


def batch(
    rows: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0, saturated: bool = True
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], many pixels at 0 and 1 exactly, and what the net predicts for them."""
    spread = 1.0 if saturated else 0.1
    images = (0.5 + spread * rand(rows, *SHAPE, seed=seed)).clamp(0, 1)
    with torch.no_grad():
        labels = net()(images).argmax(1)
    return images.to(dtype), labels


def size(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), ord=ORDER[norm], dim=1)


def assert_inside(adversarial: Tensor, images: Tensor, norm: str, eps: float) -> None:
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    n = images[0].numel()
    rounding = 2**-23 * float(images.abs().max()) * n ** (1 / ORDER[norm])
    assert float(size(adversarial.double() - images.double(), norm).max()) <= (
        eps * (1 + 1e-6) + rounding
    )


def value(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy by an independent solve."""
    return -attack_objective("cross-entropy", labels)(independent_output(model, x, steps=300))


# Does it attack? --------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.6), ("Linf", 0.15)])
def test_breaks_a_trained_classifier_cheaper_than_pgd(norm: str, eps: float) -> None:
    model = load_pretrained("digits")
    images, labels = (t[:24] for t in load_digits("test"))
    torch.manual_seed(0)
    if norm == "L2":
        pgd: Attack = torchattacks.PGDL2(model, eps=eps, alpha=eps / 4, steps=10)
    else:
        pgd = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=10)
    with count_evaluations() as spent:
        by_pgd = pgd(images, labels)
    atk = JIIO(model, norm=norm, eps=eps, steps=20)
    adversarial = atk(images, labels)
    assert_inside(adversarial, images, norm, eps)
    accuracy = [
        float((independent_output(model, x, steps=100).argmax(1) == labels).double().mean())
        for x in (images, by_pgd, adversarial)
    ]
    assert accuracy[0] > 0.9
    assert accuracy[2] <= accuracy[1] + 0.05
    assert accuracy[2] < 0.5
    cost = atk.solution.stats.f_evals + atk.solution.stats.vjps
    assert 3 * float(cost.sum()) < spent.f_evals + spent.vjps


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_is_the_engines_attack(norm: str, loss: str) -> None:
    model, (images, labels) = net(), batch()
    adversarial = JIIO(model, norm=norm, eps=0.3, loss=loss, steps=7)(images, labels)
    direct = engine_attack(
        model,
        images,
        labels,
        norm=ORDER[norm],
        eps=0.3,
        lower=0.0,
        upper=1.0,
        loss="cross-entropy" if loss == "ce" else loss,
        method=Joint(max_iter=7),
    )
    assert torch.equal(adversarial, direct.x)
    assert not torch.equal(adversarial, images)


def test_defaults_are_those_of_the_hosts_attacks() -> None:
    model, (images, labels) = net(), batch(2)
    assert JIIO(model).eps == torchattacks.PGDL2(model).eps
    assert JIIO(model, norm="Linf").eps == torchattacks.PGD(model).eps
    atk = JIIO(model)
    atk(images, labels)
    assert atk.solution.stats.iterations.tolist() == [Joint().max_iter] * 2


def test_a_larger_ball_gives_a_larger_loss() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    losses = [
        float(value(model, JIIO(model, eps=eps)(images, labels), labels).mean())
        for eps in (0.0, 0.1, 0.4, 1.6)
    ]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 1


def test_no_radius_returns_the_images() -> None:
    # torchattacks' PGDL2 gives NaN here
    model, (images, labels) = net(), batch()
    for norm in ORDER:
        adversarial = JIIO(model, norm=norm, eps=0)(images, labels)
        torch.testing.assert_close(adversarial, images, rtol=0, atol=0)


def test_method_steps_and_early_stop() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    atk = JIIO(model, eps=2.0, method=Nested(max_iter=3))
    assert_inside(atk(images, labels), images, "L2", 2.0)
    assert atk.solution.stats.iterations.tolist() == [3] * 6
    atk.steps = 5
    atk(images, labels)
    assert atk.solution.stats.iterations.tolist() == [5] * 6
    atk = JIIO(model, eps=2.0, steps=40)
    atk(images, labels)
    full = atk.solution.stats.f_evals.sum()
    atk.early_stop = True
    adversarial = atk(images, labels)
    assert atk.solution.stats.f_evals.sum() < full / 2
    assert bool((independent_output(model, adversarial).argmax(1) != labels).all())


def test_random_starts() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    atk = JIIO(model, eps=0.2, random_starts=2, steps=3)
    first = atk(images, labels)
    assert_inside(first, images, "L2", 0.2)
    assert torch.equal(first, atk(images, labels))
    other = JIIO(model, eps=0.2, random_starts=2, steps=3, seed=1)(images, labels)
    assert not torch.equal(first, other)
    assert not torch.equal(first, JIIO(model, eps=0.2, steps=3)(images, labels))


def test_retry() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    short = JIIO(model, eps=0.05, steps=2)
    missed = independent_output(model, short(images, labels)).argmax(1) == labels
    assert bool(missed.any())
    both = JIIO(model, eps=0.05, steps=2, retry=Joint(max_iter=10))
    both(images, labels)
    assert bool((both.solution.stats.iterations == 2 + 10 * missed).all())


# Ball and box -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_inside_ball_and_box(data: st.DataObject) -> None:
    norm = data.draw(st.sampled_from(["L2", "Linf"]))
    eps = data.draw(st.one_of(st.just(0.0), st.floats(1e-4, 0.2), st.floats(0.2, 8.0)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    rows = data.draw(st.integers(1, 4))
    images, labels = batch(rows, dtype, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    atk = JIIO(
        net(dtype),
        norm=norm,
        eps=eps,
        steps=data.draw(st.integers(1, 6)),
        loss=data.draw(st.sampled_from(["ce", "dlr", "margin"])),
        random_starts=data.draw(st.integers(0, 2)),
        early_stop=data.draw(st.booleans()),
    )
    mode = data.draw(st.sampled_from(["default", "label", "random", "least likely"]))
    if mode == "label":
        atk.set_mode_targeted_by_label(quiet=True)
    elif mode == "random":
        atk.set_mode_targeted_random(quiet=True)
    elif mode == "least likely":
        atk.set_mode_targeted_least_likely(data.draw(st.integers(1, CLASSES - 1)), quiet=True)
    assert_inside(atk(images, labels), images, norm, eps)


@settings(deadline=None, max_examples=10)
@given(
    norm=st.sampled_from(["L2", "Linf"]),
    eps=st.floats(0, 4),
    seed=st.integers(0, 99),
    random_starts=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_inside_ball_and_box_when_normalised(
    norm: str, eps: float, seed: int, random_starts: int, dtype: torch.dtype
) -> None:
    images, labels = batch(3, dtype, seed)
    atk = JIIO(net(dtype), norm=norm, eps=eps, steps=4, random_starts=random_starts)
    atk.set_normalization_used(MEAN, STD)
    result = atk(atk.normalize(images), labels)
    assert_inside(atk.solution.x, images, norm, eps + 1e-6)  # the images went there and back
    assert torch.equal(result, atk.normalize(atk.solution.x))


# Targeted modes ---------------------------------------------------------------------------------


def test_targeted_modes_reach_their_targets() -> None:
    model = net()
    images, labels = batch(8, saturated=False)
    wanted = (labels + 1) % CLASSES
    atk = JIIO(model, eps=4.0)
    atk.set_mode_targeted_by_function(lambda _, y: (y + 1) % CLASSES, quiet=True)
    by_function = atk(images, labels)
    atk.set_mode_targeted_by_label(quiet=True)
    by_label = atk(images, wanted)
    assert torch.equal(by_function, by_label)
    reached = independent_output(model, by_label).argmax(1) == wanted
    assert int(reached.sum()) >= 6
    assert bool((value(model, by_label, wanted) < value(model, images, wanted)).all())
    atk.set_mode_default()
    assert not torch.equal(atk(images, wanted), by_label)


@pytest.mark.parametrize("kth_min", [1, 2, CLASSES - 1])
def test_least_likely_is_the_hosts(kth_min: int) -> None:
    model, (images, labels) = net(), batch(8)
    atk = JIIO(model, eps=1.0, steps=3)
    atk.set_mode_targeted_least_likely(kth_min, quiet=True)
    expected = Attack.get_least_likely_label(atk, images, labels)
    assert torch.equal(atk.get_target_label(images, labels), expected)
    adversarial = atk(images, labels)
    atk.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(adversarial, atk(images, expected))


def test_random_targets() -> None:
    model, (images, labels) = net(), batch(40)

    def targets(seed: int) -> tuple[Tensor, Tensor]:
        atk = JIIO(model, seed=seed)
        atk.set_mode_targeted_random(quiet=True)
        return atk.get_target_label(images, labels), atk.get_target_label(images, labels)

    first, second = targets(0)
    assert bool((first != labels).all())
    assert set((first - labels).remainder(CLASSES).tolist()) == set(range(1, CLASSES))
    assert not torch.equal(first, second)  # the next batch is not given the same offsets
    assert torch.equal(first, targets(0)[0])
    assert not torch.equal(first, targets(1)[0])


def test_labels_may_be_left_out() -> None:
    model, (images, labels) = net(), batch()  # labels are the predictions
    atk = JIIO(model, eps=0.5, steps=3)
    assert torch.equal(atk(images), atk(images, labels))
    atk.set_mode_targeted_least_likely(quiet=True)
    assert torch.equal(atk(images), atk(images, labels))
    atk.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="needs the target labels"):
        atk(images)


# Normalisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("targeted", [False, True])
def test_normalisation_is_the_models(norm: str, targeted: bool) -> None:
    model = net()
    inside = nn.Sequential(Normalize(MEAN, STD, torch.float64), model).eval()
    images, _ = batch()
    with torch.no_grad():
        labels = inside(images).argmax(1)
    atk = JIIO(model, norm=norm, eps=0.2, steps=8)
    atk.set_normalization_used(MEAN, STD)
    reference = JIIO(inside, norm=norm, eps=0.2, steps=8)
    if targeted:
        atk.set_mode_targeted_least_likely(quiet=True)
        reference.set_mode_targeted_least_likely(quiet=True)
    expected = reference(images, labels)
    result = atk(atk.normalize(images), labels)
    torch.testing.assert_close(atk.solution.x, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(atk.inverse_normalize(result), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(atk.solution.value, reference.solution.value, rtol=0, atol=1e-6)
    # and it matters: the same call without it attacks another function
    other = JIIO(model, norm=norm, eps=0.2, steps=8)(images, labels)
    assert float((other - expected).abs().max()) > 1e-3


def test_normalisation_keeps_the_dtype() -> None:
    model, (images, labels) = net(torch.float32), batch(dtype=torch.float32)
    atk = JIIO(model, steps=2)
    atk.set_normalization_used(np.array(MEAN), np.array(STD))  # float64
    normalized = atk.normalize(images)
    assert normalized.dtype == torch.float32
    assert atk(normalized, labels).dtype == torch.float32


def test_normalised_images_may_be_outside_by_rounding_only() -> None:
    model, (images, labels) = net(torch.float32), batch(dtype=torch.float32)
    atk = JIIO(model, eps=0.1, steps=2)
    atk.set_normalization_used([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])  # CIFAR-10's
    normalized = atk.normalize(images)
    assert float(atk.inverse_normalize(normalized).min()) < 0
    atk(normalized, labels)
    assert_inside(atk.solution.x, images, "L2", 0.1 + 1e-6)
    with pytest.raises(ValueError, match="within the box"):
        atk(atk.normalize(images + 1e-3), labels)


# Inside torchattacks ----------------------------------------------------------------------------


@pytest.mark.parametrize(("normalised", "eps"), [(False, 0.6), (True, 0.06)])
def test_multi_attack(normalised: bool, eps: float) -> None:
    model, (images, labels) = net(torch.float32), batch(12, torch.float32, saturated=False)
    if normalised:
        inside = nn.Sequential(Normalize(MEAN, STD, torch.float32), model).eval()
        with torch.no_grad():
            labels = inside(images).argmax(1)
    weak = torchattacks.PGDL2(model, eps=eps, alpha=eps / 3, steps=4, random_start=False)
    strong = JIIO(model, eps=1.5)
    multi = torchattacks.MultiAttack([weak, strong])
    given = images
    if normalised:
        multi.set_normalization_used(MEAN, STD)
        given = multi.normalize(images)
    left = int((model(weak(given, labels)).argmax(1) == labels).sum())
    assert 0 < left < 12  # both attacks have something to do
    result = multi(given, labels)
    assert strong.solution.x.shape == (left, *SHAPE)
    with torch.no_grad():
        assert bool((model(result).argmax(1) != labels).all())
    pixels = multi.inverse_normalize(result) if normalised else result
    assert float(size(pixels.double() - images.double(), "L2").max()) <= 1.5 + 1e-5
    assert multi._normalization_applied is strong._normalization_applied


def test_multi_attack_of_two_and_first_place() -> None:
    model, (images, labels) = net(), batch(4)
    first, second = JIIO(model, eps=0.0), JIIO(model, norm="Linf", eps=0.5)
    torchattacks.MultiAttack([first, second])(images, labels)
    assert first.solution.x.shape == second.solution.x.shape == images.shape


def test_save(tmp_path: Any) -> None:
    model, (images, labels) = net(), batch(6, saturated=False)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    atk = JIIO(model, eps=1.5)
    accuracy, l2, _ = atk.save(loader, tmp_path / "x.pt", verbose=False, return_verbose=True)
    assert accuracy == 0
    assert 0 < l2 <= 1.5 + 1e-6
    saved = torch.load(tmp_path / "x.pt")
    torch.testing.assert_close(saved["adv_inputs"][:4], atk(images[:4], labels[:4]))


def test_repr_is_one_line_of_settings() -> None:
    model, (images, labels) = net(), batch(2)
    atk = JIIO(model, norm="Linf", eps=0.25, steps=2, method=Joint(step_size=torch.ones(2)))
    before = repr(atk)
    atk(images, labels)
    assert repr(atk) == before
    assert before.startswith("JIIO(")
    assert "norm=Linf, eps=0.25, steps=2" in before


# What a call leaves behind ----------------------------------------------------------------------


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


# Bad input and small input ----------------------------------------------------------------------


def _changed(images: Tensor, number: float) -> Tensor:
    images = images.clone()
    images[1, 0, 0, 0] = number
    return images


BAD_CALLS = {
    "nan": (lambda x, y: (_changed(x, math.nan), y), ValueError, "NaN or Inf.*image 1"),
    "inf": (lambda x, y: (_changed(x, -math.inf), y), ValueError, "NaN or Inf.*image 1"),
    "above one": (lambda x, y: (_changed(x, 1.01), y), ValueError, r"box.*1\.01"),
    "below zero": (lambda x, y: (_changed(x, -0.01), y), ValueError, r"box.*-0\.01"),
    "0 to 255": (lambda x, y: (x * 255, y), ValueError, r"box.*255"),
    "integers": (lambda x, y: ((x * 255).byte(), y), TypeError, r"uint8.*images.float\(\) / 255"),
    "other dtype": (lambda x, y: (x.float(), y), TypeError, "float32.*parameters torch.float64"),
    "array": (lambda x, y: (x.numpy(), y), TypeError, "tensor, got ndarray"),
    "class 4 of 4": (lambda x, y: (x, y.clamp(max=0) + 4), ValueError, r"0 … 3.*got 4"),
    "class -1": (lambda x, y: (x, y.clamp(max=0) - 1), ValueError, r"0 … 3.*got -1"),
    "float labels": (lambda x, y: (x, y.double()), TypeError, "integers.*float64"),
    "bool labels": (lambda x, y: (x, y > 0), TypeError, "integers.*bool"),
    "one hot": (lambda x, y: (x, torch.eye(4).long()[y]), ValueError, r"\(6,\), got.*\(6, 4\)"),
    "few labels": (lambda x, y: (x, y[:5]), ValueError, r"\(6,\), got.*\(5,\)"),
    "one label": (lambda x, y: (x, y[0]), ValueError, r"\(6,\), got.*\(\)"),
    "list": (lambda x, y: (x, y.tolist()), TypeError, "tensor of classes, got list"),
    "no batch": (lambda x, y: (x[0], y[:1]), ValueError, r"\(3,\), got.*\(1,\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("random_starts", [0, 1])
def test_bad_calls(case: str, random_starts: int) -> None:
    spoil, error, message = BAD_CALLS[case]
    images, labels = batch()
    atk = JIIO(net(), steps=1, random_starts=random_starts)
    with pytest.raises(error, match=message):
        atk(*spoil(images, labels))


@pytest.mark.parametrize("labels", [[0, 4, 1], [0, -1, 1]])
@pytest.mark.parametrize("mode", ["random", "least_likely"])
def test_bad_labels_in_a_targeted_mode(labels: list[int], mode: str) -> None:
    atk = JIIO(net(), steps=1)
    getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
    with pytest.raises(ValueError, match="labels must be in 0 … 3"):
        atk(batch(3)[0], torch.tensor(labels))


def test_bad_targets() -> None:
    atk, (images, labels) = JIIO(net(), steps=1), batch()
    for function, error in (
        (lambda _, y: y[:3], ValueError),
        (lambda _, y: y.double(), TypeError),
        (lambda _, y: y.tolist(), TypeError),
    ):
        atk.set_mode_targeted_by_function(function, quiet=True)
        with pytest.raises(error, match="target labels must be"):
            atk(images, labels)
    atk.set_mode_targeted_by_function(lambda _, y: y + CLASSES, quiet=True)
    with pytest.raises(ValueError, match="labels must be in 0 … 3"):
        atk(images, labels)
    atk.set_mode_targeted_least_likely(CLASSES, quiet=True)
    with pytest.raises(ValueError, match="kth_min must be in 1 … 3"):
        atk(images, labels)


BAD_SETTINGS = [
    ({"eps": -0.1}, ValueError, "eps must be.*-0.1"),
    ({"eps": math.nan}, ValueError, "eps must be.*nan"),
    ({"eps": math.inf}, ValueError, "eps must be.*inf"),
    ({"eps": "large"}, TypeError, "eps must be a number"),
    ({"norm": "L7"}, ValueError, "norm must be one of L2, Linf, got 'L7'"),
    ({"norm": 2}, ValueError, "norm must be one of"),
    ({"loss": "hinge"}, ValueError, "loss must be one of ce, .*got 'hinge'"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"random_starts": -1}, ValueError, "random_starts must be an integer, not negative, got -1"),
    ({"random_starts": 1.5}, ValueError, "random_starts must be an integer"),
    ({"method": "joint"}, TypeError, r"method must be Joint\(...\).*'joint'"),
]


@pytest.mark.parametrize(("setting", "error", "message"), BAD_SETTINGS)
def test_bad_settings(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        JIIO(net(), **setting)
    images, labels = batch(2)
    atk = JIIO(net())
    for name, setting_value in setting.items():
        setattr(atk, name, setting_value)
    with pytest.raises(error, match=message):
        atk(images, labels)
    with pytest.raises(error, match=message):
        atk(images[:0], labels[:0])


def test_bad_normalisation() -> None:
    images, labels = batch()
    atk = JIIO(net(), steps=1)
    atk(images, labels)
    atk.set_normalization_used(MEAN[:2], STD[:2])
    with pytest.raises(ValueError, match=r"mean of 2 channels.*\(6, 3, 4, 4\)"):
        atk(images, labels)
    assert atk._normalization_applied is True
    assert atk.solution is None


def test_a_model_without_equilibrium_layer() -> None:
    images, labels = batch(dtype=torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    with pytest.raises(ValueError, match=r"no equilibrium layer.*jiio_plugins.Equilibrium\(cell\)"):
        JIIO(model)(images, labels)


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


@pytest.mark.parametrize("mode", ["default", "by_label", "random", "least_likely"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("random_starts", [0, 2])
def test_empty_batch(mode: str, normalised: bool, random_starts: int) -> None:
    images, labels = batch(2)
    atk = JIIO(net(), random_starts=random_starts)
    if mode != "default":
        getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
    if normalised:
        atk.set_normalization_used(MEAN, STD)
    adversarial = atk(images[:0], labels[:0])
    assert adversarial.shape == (0, *SHAPE)
    assert adversarial.dtype == images.dtype
    assert atk.solution.status.shape == (0,)


def test_batch_of_one_is_a_row_of_the_batch() -> None:
    model, (images, labels) = net(), batch(7)
    for norm in ORDER:
        atk = JIIO(model, norm=norm, eps=0.3)
        together = atk(images, labels)
        alone = torch.cat([atk(images[k : k + 1], labels[k : k + 1]) for k in range(7)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


def test_float64_and_float32() -> None:
    images, labels = batch(saturated=False)
    for norm, order in ORDER.items():
        double = JIIO(net(), norm=norm, eps=0.1)(images, labels)
        single = JIIO(net(torch.float32), norm=norm, eps=0.1)(images.float(), labels)
        assert double.dtype == torch.float64
        assert single.dtype == torch.float32
        delta = torch.linalg.vector_norm((double - images).flatten(1), ord=order, dim=1)
        assert float(delta.max()) <= 0.1 * (1 + 1e-14)
        by_double, by_single = (value(net(), x.double(), labels) for x in (double, single))
        torch.testing.assert_close(by_single, by_double, rtol=1e-3, atol=1e-4)


# On an accelerator ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("mode", ["default", "by_label", "random", "least_likely"])
@pytest.mark.parametrize("normalised", [False, True])
def test_cuda_agrees_with_the_cpu(norm: str, mode: str, normalised: bool) -> None:
    images, labels = batch(8)
    results = []
    for device in ("cpu", "cuda"):
        atk = JIIO(net().to(device), norm=norm, eps=0.3)
        if mode != "default":
            getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
        if normalised:
            atk.set_normalization_used(MEAN, STD)
        given = atk.normalize(images) if normalised else images
        state = torch.cuda.get_rng_state()
        assert atk(given, labels).device.type == device  # the images came from the CPU
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert_inside(atk.solution.x.cpu(), images, norm, 0.3 + 1e-12)
        results.append(atk.solution)
    on_cpu, on_cuda = results
    torch.testing.assert_close(on_cuda.x.cpu(), on_cpu.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(on_cuda.value.cpu(), on_cpu.value, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_random_starts_and_multi_attack() -> None:
    model, (images, labels) = net(torch.float32).cuda(), batch(8, torch.float32)
    state = torch.cuda.get_rng_state()
    atk = JIIO(model, eps=0.5, random_starts=2, steps=5)
    adversarial = atk(images, labels)
    assert torch.equal(adversarial, atk(images.cuda(), labels.cuda()))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_inside(adversarial.cpu(), images, "L2", 0.5)
    weak = torchattacks.PGDL2(model, eps=0.05, alpha=0.02, steps=2)
    result = torchattacks.MultiAttack([weak, atk])(images, labels)
    assert_inside(result.cpu(), images, "L2", 0.5)
