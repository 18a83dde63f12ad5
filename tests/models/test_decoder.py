"""The generator of images from latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jiio_plugins.models import MDEQDecoder

DECODERS: dict[str, dict[str, Any]] = {
    "digits": {"latent_shape": 16, "image_shape": (1, 8, 8), "channels": (8, 8), "stride": 1},
    "garments": {"latent_shape": 32, "image_shape": (1, 28, 28), "channels": (8, 12)},
    "spatial": {"latent_shape": (3, 7, 7), "image_shape": (3, 28, 28), "channels": (8, 8)},
    "wide": {"latent_shape": 5, "image_shape": (3, 16, 32), "channels": (8, 8, 4)},
    "odd": {
        "latent_shape": (3, 4, 4),
        "image_shape": (3, 29, 21),
        "channels": (8, 8),
        "padding": "replicate",
        "upsampling": "bilinear",
    },
}


@pytest.mark.filterwarnings("ignore:the adjoint of an equilibrium layer has not settled")
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_shapes_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = MDEQDecoder(**DECODERS[name])
    w = torch.randn(2, *model.latent_shape, requires_grad=True)
    images = model(w)
    assert images.shape == (2, *DECODERS[name]["image_shape"])
    assert float(images.detach().min()) >= 0
    assert float(images.detach().max()) <= 1
    images.square().sum().backward()
    for parameter_name, p in [*model.named_parameters(), ("latents", w)]:
        assert p.grad is not None, parameter_name
        assert float(p.grad.abs().max()) > 0, parameter_name
    assert torch.equal(model.zeros(3), torch.zeros(3, *model.latent_shape))


def test_every_scale_sees_the_latent() -> None:
    torch.manual_seed(0)
    model = MDEQDecoder(**DECODERS["wide"]).double()
    w = torch.randn(1, 5).double().requires_grad_()
    parts = model.injection(w)
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


def test_sizes_that_no_scale_divides_are_cut_out_of_larger_ones() -> None:
    torch.manual_seed(0)
    small, large = (
        MDEQDecoder(latent_shape=4, image_shape=(1, side, side), channels=(4, 4)).eval()
        for side in (25, 28)
    )
    small.load_state_dict(large.state_dict())
    w = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(small(w), large(w)[:, :, 1:26, 1:26])


def test_a_constant_state_makes_a_flat_picture_but_for_a_grid_and_a_frame() -> None:
    """Which replicating and bilinear upsampling leave out."""
    torch.manual_seed(0)
    flat = (torch.ones(1, 8, 8, 8), torch.ones(1, 8, 4, 4))
    shape: dict[str, Any] = {"image_shape": (1, 32, 32), "channels": (8, 8), "stride": 4}
    for padding, upsampling, spread in (
        ("replicate", "bilinear", 0.0),
        ("zeros", "bilinear", 1e-3),
        ("replicate", "shuffle", 1e-3),
    ):
        model = MDEQDecoder(**shape, padding=padding, upsampling=upsampling)
        f = model.equilibrium.cell
        with torch.no_grad():
            states = f(flat, *flat)
            image = model.decode(states)
        parts = [*states, image]
        uneven = max(float((p - p[..., :1, :1]).abs().max()) for p in parts)
        assert uneven < 1e-5 if spread == 0 else uneven > spread


def test_a_decoder_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"latent_shape must be d or \(c, h, w\).*got \(2, 3\)"):
        MDEQDecoder(latent_shape=(2, 3))


def test_latents_of_another_shape() -> None:
    model = MDEQDecoder(**DECODERS["digits"])
    with pytest.raises(ValueError, match=r"shape \(rows, 16\), got \(2, 3\)"):
        model(torch.zeros(2, 3))
