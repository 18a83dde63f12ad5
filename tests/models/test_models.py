"""The shipped models and data."""

from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from jiio_plugins import Anderson, Equilibrium, JacobianFree, count_evaluations
from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.models import (
    ConvDEQClassifier,
    MDEQCell,
    MDEQClassifier,
    MDEQDecoder,
    MDEQRefiner,
    available_weights,
    load_pretrained,
)

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "conv": lambda **kw: ConvDEQClassifier(channels=8, classes=7, **kw),
    "two scales": lambda **kw: MDEQClassifier(channels=(8, 12), classes=7, **kw),
    "three scales": lambda **kw: MDEQClassifier(channels=(8, 8, 4), classes=7, **kw),
    "one scale": lambda **kw: MDEQClassifier(channels=(8,), classes=7, stride=2, **kw),
}


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = SMALL[name](in_channels=3, adjoint=JacobianFree())
    logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert bool(torch.isfinite(p.grad).all()), parameter_name


def test_states_of_the_multiscale_cell() -> None:
    torch.manual_seed(0)
    cell = MDEQCell((8, 12, 4))
    u = torch.rand(2, 8, 16, 16)
    z = cell.initial_state(u)
    assert [tuple(t.shape) for t in z] == [(2, 8, 16, 16), (2, 12, 8, 8), (2, 4, 4, 4)]
    assert [t.shape for t in cell(z, u)] == [t.shape for t in z]
    with torch.no_grad():
        out = Equilibrium(cell)(u)
    assert [t.shape for t in out] == [t.shape for t in z]
    with pytest.raises(ValueError, match=r"3 scales need .* divisible by 4, got 6×8"):
        cell.initial_state(torch.rand(1, 8, 6, 8))
    with pytest.raises(ValueError, match="channels 6 must be divisible by groups 4"):
        MDEQCell((6,))


def test_every_scale_acts_on_every_other() -> None:
    torch.manual_seed(0)
    cell = MDEQCell((4, 4, 4)).double()
    u = torch.rand(1, 4, 8, 8).double()
    z = tuple(torch.rand_like(t).requires_grad_() for t in cell.initial_state(u))
    for target in cell(z, u):
        grads = torch.autograd.grad(target.square().sum(), z, retain_graph=True)
        assert all(float(g.abs().max()) > 0 for g in grads)


def test_solver_and_gradient_are_settings() -> None:
    model = SMALL["conv"](solver=Anderson(tol=1e-2), adjoint=JacobianFree())
    assert model.equilibrium.solver == Anderson(tol=1e-2)
    assert model.equilibrium.adjoint == JacobianFree()


# Decoder ----------------------------------------------------------------------------------------

DECODERS: dict[str, dict[str, Any]] = {
    "digits": {"latent_shape": 16, "image_shape": (1, 8, 8), "channels": (8, 8), "stride": 1},
    "garments": {"latent_shape": 32, "image_shape": (1, 28, 28), "channels": (8, 12)},
    "spatial": {"latent_shape": (3, 7, 7), "image_shape": (3, 28, 28), "channels": (8, 8)},
    "wide": {"latent_shape": 5, "image_shape": (3, 16, 32), "channels": (8, 8, 4)},
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_shapes_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = MDEQDecoder(**DECODERS[name])
    u = torch.randn(2, *model.latent_shape, requires_grad=True)
    images = model(u)
    assert images.shape == (2, *DECODERS[name]["image_shape"])
    assert float(images.detach().min()) >= 0
    assert float(images.detach().max()) <= 1
    images.square().sum().backward()
    for parameter_name, p in [*model.named_parameters(), ("u", u)]:
        assert p.grad is not None, parameter_name
        assert float(p.grad.abs().max()) > 0, parameter_name
    assert torch.equal(model.zeros(3), torch.zeros(3, *model.latent_shape))


def test_every_scale_sees_the_latent() -> None:
    torch.manual_seed(0)
    model = MDEQDecoder(**DECODERS["wide"]).double()
    u = torch.randn(1, 5).double().requires_grad_()
    parts = model.injection(u)
    assert [tuple(p.shape) for p in parts] == [(1, 8, 8, 16), (1, 8, 4, 8), (1, 4, 2, 4)]
    z = model.equilibrium.initial_state(*parts)
    for s, part in enumerate(parts):
        only = [p if i == s else p.detach() for i, p in enumerate(parts)]
        out = model.equilibrium.cell(z, *only)
        grad = torch.autograd.grad(out[s].square().sum(), part, retain_graph=True)[0]
        assert float(grad.abs().max()) > 0


def test_spatial_latents_draw_within_their_sites() -> None:
    """The same latent at every site must not mean the same at every place of a site."""
    torch.manual_seed(0)
    model = MDEQDecoder(**DECODERS["spatial"])  # 7×7 sites, 14×14 places at the finest scale
    fine, coarse = (p.detach() for p in model.injection(torch.ones(1, 3, 7, 7)))
    inside = fine[0, :, 4:10, 4:10]
    assert float((inside[:, 0::2, 0::2] - inside[:, 1::2, 1::2]).abs().max()) > 0.01
    torch.testing.assert_close(inside[:, 0::2], inside[:, :1].expand(-1, 3, -1))
    assert coarse.shape == (1, 8, 7, 7)
    for shape in ((2, 14, 14), (2, 5, 5), (2, 28, 28), (2, 3, 14)):  # also what does not divide
        other = MDEQDecoder(latent_shape=shape, image_shape=(1, 28, 28), channels=(8, 8))
        assert [tuple(p.shape[2:]) for p in other.injection(other.zeros(1))] == [(14, 14), (7, 7)]


def test_the_papers_generator() -> None:
    model = MDEQDecoder(
        latent_shape=128, image_shape=(3, 64, 64), channels=(32, 64, 128, 256), stride=1
    )
    parts = model.injection(model.zeros(1))
    shapes = [tuple(t.shape[1:]) for t in model.equilibrium.initial_state(*parts)]
    assert shapes == [(32, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8)]


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        ({"image_shape": (1, 30, 28)}, "divisible by 4, got 30×28"),
        ({"latent_shape": (2, 3)}, r"latent_shape must be d or \(c, h, w\).*got \(2, 3\)"),
    ],
)
def test_decoders_that_do_not_fit(kw: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MDEQDecoder(**kw)


def test_latents_of_another_shape() -> None:
    model = MDEQDecoder(**DECODERS["digits"])
    with pytest.raises(ValueError, match=r"shape \(rows, 16\), got \(2, 3\)"):
        model(torch.zeros(2, 3))


def test_a_new_refiner_is_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    model = MDEQRefiner((3, 16, 24), channels=(8, 12))
    u = torch.randn(2, 3, 16, 24)
    assert torch.equal(model(u), u)
    parts = model.injection(u)
    assert [tuple(p.shape) for p in parts] == [(2, 8, 8, 12), (2, 12, 4, 6)]
    nn.init.normal_(model.head[-1].weight)
    u.requires_grad_()
    model(u).square().sum().backward()
    for name, p in [*model.named_parameters(), ("u", u)]:
        assert float(p.grad.abs().max()) > 0, name
    with pytest.raises(ValueError, match="divisible by 4, got 16×22"):
        MDEQRefiner((1, 16, 22), channels=(8, 8))


@pytest.mark.parametrize("channels", [(16,), (8, 8)])
@pytest.mark.parametrize("brightness", [0.2, 1.0])
def test_a_new_refiner_contracts(channels: tuple[int, ...], brightness: float) -> None:
    images = brightness * load_digits("test")[0][:16]
    for seed in range(3):
        torch.manual_seed(seed)
        model = MDEQRefiner((1, 8, 8), channels=channels)
        with torch.no_grad(), count_evaluations() as counter:
            model(images)
        assert counter.f_evals / len(images) < 30, seed


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("fashion-mnist", 28)])
def test_weights_load(name: str, size: int) -> None:
    assert name in available_weights()
    model = load_pretrained(name)
    assert not model.training
    with torch.no_grad():
        x = torch.full((2, 1, size, size), 0.3)
        first, second = (load_pretrained(name)(x) for _ in range(2))
    assert first.shape == (2, 10)
    assert torch.equal(first, second)


def test_unknown_weights() -> None:
    with pytest.raises(ValueError, match=r"no weights called 'cifar'; there are digits, fashion"):
        load_pretrained("cifar")


def test_digits_classifier_is_accurate_and_converges() -> None:
    x, y = load_digits("test")
    model: nn.Module = load_pretrained("digits")
    with torch.no_grad(), count_evaluations() as counter:
        predicted = model(x).argmax(1)
    assert float((predicted == y).double().mean()) >= 0.97
    assert counter.worst_residual <= model.equilibrium.solver.tol
    # and the tolerance is tight enough: a far tighter one sees the same
    model.equilibrium.solver = Anderson(tol=1e-6, max_iter=300)
    with torch.no_grad():
        again = model(x).argmax(1)
    assert int((again != predicted).sum()) <= 1


# Data -------------------------------------------------------------------------------------------


def test_digits_are_split_once() -> None:
    x, y = load_digits("test")
    x_train, y_train = load_digits("train")
    assert x.shape == (500, 1, 8, 8)
    assert x_train.shape == (1297, 1, 8, 8)
    assert y.dtype == y_train.dtype == torch.int64
    assert float(x.min()) == float(x_train.min()) == 0
    assert float(x.max()) == float(x_train.max()) == 1
    both = torch.cat([x, x_train]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797  # nobody is in both
    assert torch.equal(load_digits("test")[0], x)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        load_digits("val")


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "t10k-images-idx3-ubyte" in text
    assert "torchvision" in text
    assert "apt install dataset-fashion-mnist" in text
    with pytest.raises(ValueError, match="split must be"):
        load_fashion_mnist(tmp_path, "val")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_wherever_it_lies(tmp_path: Path, folder: str, packed: bool) -> None:
    pixels = bytes(range(256)) * 7  # 1792 bytes: enough for two images
    images = struct.pack(">IIII", 2051, 2, 28, 28) + pixels[: 2 * 784]
    labels = struct.pack(">II", 2049, 2) + bytes([3, 9])
    base = tmp_path / folder
    base.mkdir(parents=True, exist_ok=True)
    for stem, content in (("images-idx3", images), ("labels-idx1", labels)):
        name = f"t10k-{stem}-ubyte"
        if packed:
            (base / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (base / name).write_bytes(content)
    x, y = load_fashion_mnist(tmp_path)
    assert x.shape == (2, 1, 28, 28)
    assert x.dtype == torch.float32
    assert x.flatten()[:3].tolist() == pytest.approx([0, 1 / 255, 2 / 255])
    assert float(x.max()) == 1
    assert y.tolist() == [3, 9]
