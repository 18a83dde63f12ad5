"""Fits, samples and the commands, on the shipped digits generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from jiio_plugins import Status
from jiio_plugins.cli.main import main
from jiio_plugins.data.classification import load_digits
from jiio_plugins.generative import (
    Architecture,
    decode,
    fit,
    fit_latents,
    load_generator,
    sample_latents,
)
from jiio_plugins.generative.files import GENERATOR, LATENTS, save_generator, save_latents
from jiio_plugins.models import MDEQDecoder, load_pretrained
from tests.data.helpers import save_picture

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_pretrained("digits-generator")


@pytest.fixture
def folder(tmp_path: Path, digits: Any) -> Path:
    """A run as ``train-generator`` leaves it."""
    model = Architecture().for_images((1, 8, 8))
    save_generator(tmp_path / GENERATOR, digits, model)
    images = (load_digits("train")[0][:64] * 255).to(torch.uint8)
    save_latents(tmp_path / LATENTS, fit_latents(digits, images, iterations=10))
    return tmp_path


# Fits and samples -------------------------------------------------------------------------------


def test_fits_of_held_out_digits_are_close(digits: Any) -> None:
    x, _ = load_digits("test")
    found = fit(digits, x[:24])
    assert found.latents.shape == (24, 16)
    assert float(found.psnr.mean()) > 18
    with torch.no_grad():
        direct = digits(found.latents)
    torch.testing.assert_close(direct, found.images, rtol=0, atol=2e-3)
    mse = (found.images - x[:24]).square().flatten(1).mean(1)
    torch.testing.assert_close(found.psnr, -10 * mse.log10())
    assert not bool((found.status == Status.NONFINITE).any())
    assert float((found.f_evals + found.vjps).mean()) < 160
    # from its own result a fit has nothing to gain
    again = fit(digits, x[:24], start=found.latents)
    assert float((again.psnr - found.psnr).min()) > -0.1


def test_images_that_do_not_fit(digits: Any) -> None:
    with pytest.raises(ValueError, match=r"makes images \(1, 8, 8\), got \(1, 9, 8\)"):
        fit(digits, torch.rand(2, 1, 9, 8))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from 1\.5 to 1\.5"):
        fit(digits, torch.full((2, 1, 8, 8), 1.5))
    with pytest.raises(ValueError, match="no images to fit"):
        fit(digits, torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match=r"makes images \(1, 8, 8\), got \(\)"):
        fit(digits, torch.tensor(0.5))
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        fit(digits, torch.rand(2, 1, 8, 8).numpy())


def test_pixels_out_of_range_say_so(digits: Any) -> None:
    images = torch.rand(2, 1, 8, 8)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from nan to nan"):
        fit(digits, images)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from 255 to 255"):
        fit(digits, torch.full((2, 1, 8, 8), 255.0))


def test_samples_follow_the_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    two = torch.randn(400, 3, generator=generator) + 8 * torch.randint(
        0, 2, (400, 1), generator=generator
    )
    drawn = sample_latents(two, 200, prior="gmm", components=(1, 2, 4))
    assert drawn.shape == (200, 3)
    assert drawn.dtype == two.dtype
    between = (drawn.mean(1) - 4).abs() < 1  # a single Gaussian would fill the gap
    assert int(between.sum()) == 0
    one = sample_latents(two, 200, prior="gaussian")
    assert int(((one.mean(1) - 4).abs() < 1).sum()) > 5
    assert torch.equal(drawn, sample_latents(two, 200, prior="gmm", components=(1, 2, 4)))
    spatial = sample_latents(torch.randn(50, 2, 3, 3, generator=generator), 5)
    assert spatial.shape == (5, 2, 3, 3)
    with pytest.raises(ValueError, match="prior must be 'gaussian' or 'gmm', got 'vae'"):
        sample_latents(two, 2, prior="vae")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two latents at least, got 1"):
        sample_latents(two[:1], 2)


# Files and commands -----------------------------------------------------------------------------


def test_a_generator_says_how_to_build_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = Architecture(latent=(2, 4, 4), channels=(4, 8), stride=2)
    decoder = sizes.build((3, 16, 16))
    save_generator(tmp_path / "g.safetensors", decoder, sizes)
    again = load_generator(tmp_path / "g.safetensors")
    assert isinstance(again, MDEQDecoder)
    w = torch.randn(2, 2, 4, 4)
    assert torch.equal(decode(again, w), decode(decoder.eval(), w))
    content = (tmp_path / "g.safetensors").read_bytes()
    (tmp_path / "g.safetensors").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_generator(tmp_path / "g.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no generator"):
        load_generator(tmp_path)


def test_sample_and_fit_from_the_shell(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["sample", str(folder), "--count", "6", "--prior", "gaussian", "--no-metrics"])
    with Image.open(folder / "samples-gaussian.png") as sheet:
        assert len(set(sheet.get_flattened_data())) > 10  # not blank
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    x, _ = load_digits("test")
    for k in range(3):
        pixels = (x[k, 0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(pictures / f"{k}.png")
    (pictures / "bad.png").write_bytes(b"bad")
    main(["fit", str(folder), str(pictures), "--out", str(tmp_path / "fits")])
    printed = capsys.readouterr()
    assert "skipped, not readable" in printed.err
    assert printed.out.count(" dB  ") == 3
    names = {p.name for p in (tmp_path / "fits").iterdir()}
    assert names == {"latents.safetensors", "fits.png", "0000-0.png", "0001-1.png", "0002-2.png"}
    save_picture(pictures / "0.png", (9, 9))
    with pytest.raises(SystemExit, match="one size"):
        main(["fit", str(folder), str(pictures), "--out", str(tmp_path / "fits")])
    with pytest.raises(SystemExit, match=r"makes 8×8 pixels, the images have 9×9: --resize"):
        main(["fit", str(folder), str(pictures / "0.png"), "--out", str(tmp_path / "fits")])
    with pytest.raises(SystemExit, match="there is no generator"):
        main(["sample", str(tmp_path / "surely_none")])


@pytest.mark.parametrize(
    ("name", "latent", "shape"),
    [("digits-generator", (16,), (1, 8, 8)), ("fashion-mnist-generator", (64,), (1, 28, 28))],
)
def test_shipped_generators(name: str, latent: tuple[int, ...], shape: tuple[int, ...]) -> None:
    model: Any = load_pretrained(name)
    assert (model.latent_shape, model.image_shape) == (latent, shape)
    images = decode(model, 0.5 * torch.randn(4, *latent))
    assert images.shape == (4, *shape)
    assert float(images.std(0).mean()) > 0.01  # the latent matters


@pytest.mark.parametrize("command", ["sample", "fit"])
def test_what_a_killed_command_left_is_cleared_away(
    command: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    save_picture(tmp_path / "0.png", (8, 8))
    what = ["--no-metrics"] if command == "sample" else [str(tmp_path / "0.png"), "--iterations=2"]
    main([command, str(folder), *what, "--out", str(out), "--quiet"])
    names = {path.name for path in out.iterdir()}
    for name in names:
        (out / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")  # of a killed writer
    main([command, str(folder), *what, "--out", str(out), "--quiet", "--overwrite"])
    assert {path.name for path in out.iterdir()} == names
