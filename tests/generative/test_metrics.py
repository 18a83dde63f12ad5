"""Metrics: against closed forms and by what they must tell apart."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import nn

from jiio_plugins.cli.main import main
from jiio_plugins.data.classification import load_digits
from jiio_plugins.generative import (
    Architecture,
    TrainConfig,
    decode,
    fit_latents,
    fit_prior,
    metrics,
    sample_run,
)
from jiio_plugins.generative.config import CONFIG
from jiio_plugins.generative.files import GENERATOR, LATENTS, save_generator, save_latents
from jiio_plugins.models import ConvFeatures, load_pretrained

if TYPE_CHECKING:
    from pathlib import Path


class Flat(nn.Module):
    """Pixels as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ssim_and_psnr_of_known_pairs() -> None:
    x, _ = load_digits("test")
    for images in (x[:20], torch.nn.functional.interpolate(x[:20], scale_factor=4)):
        torch.testing.assert_close(metrics.ssim(images, images), torch.ones(20))
        noisy = (images + 0.2 * noise(*images.shape)).clamp(0, 1)
        blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
        assert float(metrics.ssim(noisy, images).max()) < 0.95
        assert float(metrics.ssim(blurred, images).max()) < 1
    torch.testing.assert_close(metrics.psnr(x[:3] * 0 + 0.1, x[:3] * 0), torch.full((3,), 20.0))


def test_frechet_distance_of_gaussians() -> None:
    """Against ``‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)`` of diagonal covariances."""
    a, b = noise(20_000, 1, 1, 3, seed=1), noise(20_000, 1, 1, 3, seed=2)
    b = 2 * b + torch.tensor([1.0, 0, 0])
    found = metrics.distances(a, b, Flat())
    assert found.frechet == pytest.approx(1 + 3 * (1 - 2) ** 2, rel=0.05)
    same = metrics.distances(a, noise(20_000, 1, 1, 3, seed=3), Flat())
    assert abs(same.frechet) < 0.01
    assert abs(same.kernel) < 0.05 < found.kernel


def test_distances_change_nothing_of_the_callers() -> None:
    network = ConvFeatures().train()
    x, _ = load_digits("test")
    before = {name: t.clone() for name, t in network.state_dict().items()}
    state = torch.get_rng_state()
    first = metrics.distances(x[:50], x[50:100], network)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert metrics.distances(x[:50], x[50:100], network) == first
    assert all(math.isfinite(value) for value in metrics.distances(x[:2], x[2:4], network))
    with pytest.raises(ValueError, match="two images at least on each side, got 50 and 1"):
        metrics.distances(x[:50], x[:1], network)
    with pytest.raises(ValueError, match=r"must return \(rows, d\), got \(4, 1, 8, 8\)"):
        metrics.distances(x[:4], x[:4], nn.Identity())


def test_copies_of_training_images_are_found() -> None:
    train, _ = load_digits("train")
    held_out, _ = load_digits("test")
    found = metrics.nearest(train[[5, 900]], (train * 255).round().to(torch.uint8))
    assert found.index.tolist() == [5, 900]
    assert float(found.distance.max()) < 0.02
    reference = metrics.nearest(held_out, train)
    copied = metrics.nearness(metrics.nearest(train[:100], train), reference)
    assert (copied.copies, copied.samples) == (1.0, 0.0)
    fresh = metrics.nearness(metrics.nearest(held_out[:250], train), reference)
    assert fresh.ratio == pytest.approx(1, abs=0.1)
    assert fresh.copies < 0.05
    few = metrics.nearest(held_out[:99], train)
    assert math.isnan(metrics.nearness(few, few).copies)  # no hundredth part of these


def test_the_shipped_features_know_garments() -> None:
    network: Any = load_pretrained("fashion-mnist-features")
    made = decode(load_pretrained("fashion-mnist-generator"), 0.5 * noise(300, 64))  # type: ignore[arg-type]
    assert metrics.extract(network, made).shape == (300, network.num_features)
    alike = metrics.distances(made[:150], made[150:], network)
    mirrored = metrics.distances(made[:150], made[150:].flip(-2), network)
    noisy = metrics.distances(made[:150], torch.rand(150, 1, 28, 28), network)
    assert 2 * alike.frechet < mirrored.frechet < noisy.frechet
    assert alike.kernel < mirrored.kernel < noisy.kernel


def test_number_of_components_by_bic() -> None:
    shift = 8 * torch.randint(0, 2, (400, 1), generator=torch.Generator().manual_seed(0))
    two = fit_prior(noise(400, 3) + shift, components=(1, 2, 4))
    assert (two.components, set(two.bic)) == (2, {1, 2, 4})
    assert min(two.bic, key=lambda k: two.bic[k]) == 2
    assert str(two) == "a mixture of 2 Gaussians (of 1, 2, 4 by BIC)"
    assert str(fit_prior(noise(40, 3), prior="gaussian")) == "a Gaussian"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run as ``train-generator`` leaves it."""
    digits: Any = load_pretrained("digits-generator")
    run = tmp_path / "run"
    run.mkdir()
    save_generator(run / GENERATOR, digits, Architecture().for_images((1, 8, 8)))
    images = (load_digits("train")[0][:200] * 255).to(torch.uint8)
    save_latents(run / LATENTS, fit_latents(digits, images, iterations=10))
    (run / CONFIG).write_text(TrainConfig(data="digits", out=run).to_json())
    return run


def test_metrics_from_the_shell(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--measured", "64", "--fits", "8"]
    main(["sample", str(folder), *options])
    printed = capsys.readouterr().out
    assert "Gaussians (of 1, 2, 4, 8 by BIC)" in printed
    report = json.loads((folder / "metrics-gmm.json").read_text())
    assert report["prior"]["components"] in (1, 2, 4, 8)
    assert report["held-out fits"]["PSNR"] > 18
    assert 0.5 < report["held-out fits"]["SSIM"] < 1
    assert report["nearest training images"]["distance in"] == "pixels"
    assert "distances" not in report
    assert "held-out fits: PSNR" in printed
    with (
        Image.open(folder / "neighbours-gmm.png") as sheet,
        Image.open(folder / "samples-gmm.png") as samples,
    ):
        assert sheet.width == samples.width
    monkeypatch.syspath_prepend(str(folder))
    (folder / "mine.py").write_text(
        "from jiio_plugins.models import ConvFeatures\n"
        "def features():\n    return ConvFeatures(num_features=4)\n"
    )
    main(["sample", str(folder), *options, "--features", "mine:features", "--prior", "gaussian"])
    printed = capsys.readouterr().out
    assert "samples to held-out images, mine:features: Fréchet distance" in printed
    assert "FID" not in printed
    report = json.loads((folder / "metrics-gaussian.json").read_text())
    assert set(report["distances"]) == {"samples", "training images"}


def test_a_share_that_is_not_known_is_null(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_run, "_COMPARED", 50)  # held-out images, no hundredth part of which
    main(["sample", str(folder), "--measured", "4", "--fits", "2"])
    report = json.loads((folder / "metrics-gmm.json").read_text())
    assert report["nearest training images"]["copies"] is None


def test_metrics_that_cannot_be_had(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--features must be fashion-mnist-features or module:fu"):
        main(["sample", str(folder), "--measured", "4", "--features", "inception"])
    (folder / CONFIG).unlink()
    with pytest.raises(SystemExit, match="names the images to compare with: --no-metrics"):
        main(["sample", str(folder)])
    main(["sample", str(folder), "--no-metrics", "--count", "4", "--out", str(tmp_path / "new")])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["samples-gmm.png"]
