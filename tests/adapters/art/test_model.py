"""The classifier as it is attacked: preprocessing, precision, and what is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothingPyTorch
from art.preprocessing.expectation_over_transformation.pytorch import EoTPyTorch
from art.preprocessing.preprocessing import PreprocessorPyTorch
from torch import Tensor, nn

from jiio_plugins import Status
from jiio_plugins.models import ConvDEQClassifier, load_pretrained
from tests.adapters.art.helpers import EPS, Digits, assert_inside, attack_on, sizes
from tests.adapters.outputs import FORMS, Returning

if TYPE_CHECKING:
    from collections.abc import Callable

    from art.estimators.classification import PyTorchClassifier


# Preprocessing ----------------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self, model: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


def one(logits: Tensor) -> Tensor:
    return logits[:, 0]


@pytest.mark.parametrize("name", ["object", "key"])
def test_where_the_logits_are(
    name: str, make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    (form, output), x = FORMS[name], digits[0][:3]
    wrapped = make_classifier(Returning(load_pretrained("digits"), form))
    plain = attack_on(make_classifier(load_pretrained("digits")), max_iter=2)
    found = attack_on(wrapped, max_iter=2, output=output)
    np.testing.assert_array_equal(found.generate(x), plain.generate(x))
    with pytest.raises(ValueError, match=r"got \(3,\), one value per sample: of one logit a"):
        attack_on(make_classifier(Returning(load_pretrained("digits"), one))).generate(x)
    with pytest.raises(TypeError, match="output must be a key"):
        attack_on(wrapped, output=1.5)


def test_eps_is_in_the_units_of_the_image(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    model = Normalised(load_pretrained("digits"), -1.0, 2.0)  # undoes what ART does before it
    outside = make_classifier(model, preprocessing=(0.5, 0.5))
    inside = make_classifier(Normalised(model, 0.5, 0.5))
    result = attack_on(outside, eps=0.7).generate(x, y)
    assert_inside(result, x, 2, 0.7)
    np.testing.assert_allclose(sizes(result, x, 2), 0.7, rtol=1e-3)
    np.testing.assert_allclose(result, attack_on(inside, eps=0.7).generate(x, y), atol=1e-3)


class Blur(PreprocessorPyTorch):
    """A 3×3 mean, or with ``repeat`` the batch several times over."""

    def __init__(self, repeat: int = 1) -> None:
        super().__init__(device_type="cpu", apply_fit=True, apply_predict=True)
        self.repeat = repeat

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return nn.functional.avg_pool2d(x, 3, stride=1, padding=1).repeat(self.repeat, 1, 1, 1), y


class Shifts(EoTPyTorch):
    """Expectation over transformation, as ART's own: ``nb_samples`` images for each."""

    def _transform(self, x: Tensor, y: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return x.roll(int(torch.randint(3, ())), dims=3), y


def test_differentiates_through_a_defence(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    model = load_pretrained("digits")
    blurred = make_classifier(model, preprocessing_defences=[Blur()])
    attack = attack_on(blurred, eps=1.5)
    adversarial = attack.generate(x, y)
    assert_inside(adversarial, x, 2, 1.5)
    fooled = blurred.predict(adversarial).argmax(1) != y
    np.testing.assert_array_equal(attack.solution.success, fooled)
    # the attack that does not know of the blur is worse against it
    unaware = attack_on(make_classifier(model), eps=1.5).generate(x, y)
    labels = np.eye(10, dtype=np.float32)[y]
    assert (
        blurred.compute_loss(adversarial, labels).mean()
        > 1.2 * blurred.compute_loss(unaware, labels).mean()
    )


def test_arts_own_defence_in_pytorch(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    pytest.importorskip("kornia")  # ART's smoothing needs it
    x, y = digits
    smooth = SpatialSmoothingPyTorch(channels_first=True, device_type="cpu")
    classifier = make_classifier(load_pretrained("digits"), preprocessing_defences=smooth)
    attack = attack_on(classifier, max_iter=10)
    assert_inside(attack.generate(x, y), x, 2, 1.0)
    assert attack.solution.success.any()


def test_unsupported_preprocessing(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    model = load_pretrained("digits")
    in_numpy = make_classifier(
        model, preprocessing_defences=FeatureSqueezing(clip_values=(0, 1), bit_depth=4)
    )
    with pytest.raises(NotImplementedError, match="must be written in PyTorch"):
        attack_on(in_numpy)
    for defence in (Blur(repeat=3), Shifts(nb_samples=2, clip_values=(0.0, 1.0))):
        several = make_classifier(model, preprocessing_defences=defence)
        with pytest.raises(NotImplementedError, match="one state per image"):
            attack_on(several).generate(x, y)


# What it leaves alone ---------------------------------------------------------------------------


class Stateful(nn.Module):
    """A classifier with every kind of state a call could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.5)
        self.deq = ConvDEQClassifier(channels=4, groups=2)
        self.fail_at: int | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
            raise RuntimeError("on purpose")
        logits: Tensor = self.deq(self.dropout(self.norm(x)))
        return logits


def _state_of(classifier: PyTorchClassifier) -> list[Any]:
    model = classifier.model
    return [
        [m.training for m in classifier._model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        torch.get_rng_state(),
        np.random.get_state()[1:3],  # noqa: NPY002
    ]


@pytest.mark.parametrize("fail_at", [None, 1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"num_random_init": 2, "autocast": torch.bfloat16}])
def test_nothing_of_the_callers_is_changed(
    make_classifier: Callable[..., PyTorchClassifier],
    digits: Digits,
    fail_at: int | None,
    options: dict[str, Any],
) -> None:
    x, y = (array.copy() for array in digits)
    torch.manual_seed(0)
    model = Stateful().train()
    model.norm.eval()  # frozen by the user
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 3 != 0)
        p.grad = torch.full_like(p, float(k)) if k % 2 else None
    classifier = make_classifier(model)
    before = _state_of(classifier)
    model.fail_at = fail_at
    attack = attack_on(classifier, max_iter=2, batch_size=4, **options)
    if fail_at is None:
        attack.generate(x)
        attack.generate(x, y)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            attack.generate(x)
        assert attack.solution is None
    torch.testing.assert_close(before, _state_of(classifier), rtol=0, atol=0)
    np.testing.assert_array_equal(x, digits[0])
    np.testing.assert_array_equal(y, digits[1])


def test_the_result_is_not_a_view(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = (array.copy() for array in digits)
    result = attack_on(shared_small, eps=0.0, max_iter=2).generate(x, y)
    np.testing.assert_array_equal(result, x)
    assert not np.shares_memory(result, x)
    empty = x[:0]
    assert attack_on(shared_small).generate(empty) is not empty


# Precision and device ---------------------------------------------------------------------------


def test_autocast(make_classifier: Callable[..., PyTorchClassifier], digits: Digits) -> None:
    x, y = digits
    model = load_pretrained("digits")
    seen: list[torch.dtype] = []
    model.equilibrium.cell.register_forward_hook(lambda m, args, out: seen.append(args[1].dtype))
    classifier = make_classifier(model)
    attack = attack_on(classifier, eps=0.4, autocast=torch.bfloat16)
    adversarial = attack.generate(x, y)
    assert torch.bfloat16 in seen  # the loop
    assert seen[-1] == torch.float32  # the verification
    assert_inside(adversarial, x, 2, 0.4)
    assert (attack.solution.status == Status.CONVERGED).all()
    full = attack_on(classifier, eps=0.4)
    full.generate(x, y)
    assert attack.solution.success.mean() >= full.solution.success.mean() - 0.13
    np.testing.assert_allclose(attack.solution.value.mean(), full.solution.value.mean(), rtol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_cuda_agrees_with_the_cpu(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits, norm: float
) -> None:
    x, y = digits
    on_cpu = attack_on(make_classifier(load_pretrained("digits")), norm=norm, eps=EPS[norm])
    classifier = make_classifier(load_pretrained("digits"), device_type="gpu")
    on_gpu = attack_on(classifier, norm=norm, eps=EPS[norm])
    states = torch.cuda.get_rng_state()
    assert_inside(on_gpu.generate(x, y), x, norm, EPS[norm])
    on_cpu.generate(x, y)
    np.testing.assert_allclose(
        on_gpu.solution.value.mean(), on_cpu.solution.value.mean(), rtol=0.05, atol=0.05
    )
    torch.testing.assert_close(states, torch.cuda.get_rng_state())
    varied = attack_on(
        classifier, norm=norm, eps=EPS[norm], autocast=torch.bfloat16, num_random_init=2
    )
    mask = np.arange(8) < 6
    result = varied.generate(x, mask=mask)
    assert_inside(result, x, norm, EPS[norm])
    np.testing.assert_array_equal(result[..., 6:], x[..., 6:])
