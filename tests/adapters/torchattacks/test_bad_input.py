"""Bad input and small input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_torchattacks import JIIO
from tests.adapters.outputs import FORMS, Returning
from tests.adapters.torchattacks.helpers import CLASSES, MEAN, SHAPE, STD, batch, net


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
    "a number": (lambda x, y: (x[0, 0, 0, 0], y), ValueError, r"batch first.*got shape \(\)"),
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


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: y[:, :1], r"logits of 2 classes or more, got 1: of one logit a, .*torch\.cat"),
        (lambda y: y[:, 0], r"2 classes or more, got \(3,\), one value .*torch\.stack"),
        (lambda y: {"out": y}, "got dict with 'out': wrap it .* alone, .*LogitsOf"),
        (lambda y: (), "got tuple of 0: wrap it"),
    ],
)
def test_what_a_model_returns_must_be_logits(form: Any, message: str) -> None:
    images, labels = batch(3)
    atk = JIIO(Returning(net(), form), steps=1)
    for given in (None, labels.clamp(max=0)):
        with pytest.raises(ValueError, match=message):
            atk(images, given)
    for mode in ("random", "least_likely"):
        getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
        with pytest.raises(ValueError, match=message):
            atk(images)


@pytest.mark.parametrize(("form", "output"), FORMS.values(), ids=FORMS)
def test_where_the_logits_are(form: Any, output: Any) -> None:
    images, _ = batch(3)
    plain, wrapped = JIIO(net(), steps=2), JIIO(Returning(net(), form), steps=2, output=output)
    for atk in (plain, wrapped):
        atk.set_mode_targeted_random(quiet=True)
    assert torch.equal(wrapped(images), plain(images))
    for atk in (plain, wrapped):
        atk.set_normalization_used(MEAN, STD)
        atk.set_mode_default()
    normalised = wrapped.normalize(images)
    assert torch.equal(wrapped(normalised), plain(normalised))


def test_logits_that_are_not_there() -> None:
    images, labels = batch(3)
    for form, output, message in (
        (FORMS["dict"][0], "out", r"output='out' is not in .* dict with 'loss', 'logits'"),
        (FORMS["tuple"][0], 2, "output=2 is not in what the model returned, tuple of 2"),
        (FORMS["nested"][0], 1, "output=1 must be the logits, a tensor, got int of list of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            JIIO(Returning(net(), form), steps=1, output=output)(images, labels)
    with pytest.raises(TypeError, match=r"output must be a key, .* got 1\.5"):
        JIIO(net(), output=1.5)  # type: ignore[arg-type]


def test_a_function_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module .*, got <function"):
        JIIO(lambda x: x)
    assert not capsys.readouterr().out
    with pytest.raises(TypeError, match=r"model must be an nn\.Module .*, got <built-in"):
        JIIO(net()).set_model(len)


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
    ({"norm": ["L2"]}, ValueError, r"norm must be one of L2, Linf, got \['L2'\]"),
    ({"loss": ["ce"]}, ValueError, r"loss must be one of .*, got \['ce'\]"),
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
