"""``jiio sample``: new images of a trained generator, and how good they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins.data.images import Images, load_images, to_unit
from jiio_plugins.generative import metrics
from jiio_plugins.generative.config import CONFIG, TrainConfig
from jiio_plugins.generative.files import GENERATOR, LATENTS, about, load_generator, load_latents
from jiio_plugins.generative.latents import LatentPrior, Prior, decode, fit, fit_latents, fit_prior
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.models import load_pretrained
from jiio_plugins.models.pretrained import FEATURES, GENERATORS
from jiio_plugins.utils.checkpoint import fingerprint
from jiio_plugins.utils.factory import build_network

if TYPE_CHECKING:
    from jiio_plugins.models.decoder import MDEQDecoder

_SHIPPED = {name: "digits" if name.startswith("digits") else "fashion-mnist" for name in GENERATORS}
_COMPARED = 2000  # held-out images, of which neighbours are looked for


@dataclass(frozen=True)
class Source:
    """A generator, latents to draw from, and the images it was trained on (None: not asked for).

    Attributes:
        latent_penalty: λ that its latents were fitted with.
    """

    decoder: MDEQDecoder
    latents: Tensor
    data: str
    images: Images | None
    latent_penalty: float = 0.01


def open_source(run: str, folder: Path | None, with_images: bool, latents: int = 4096) -> Source:
    """The folder of a run, or a shipped generator by name.

    Args:
        run: folder that ``train-generator`` wrote, or one of the shipped generators, whose latents
            are fitted here.
        folder: where Fashion-MNIST lies, or the folder of images; None: as the run had it.
        with_images: load the run's images.
        latents: how many to fit for a shipped generator.

    Raises:
        FileNotFoundError, ValueError: no run, or no data; the message says what to do.
    """
    if run in _SHIPPED and not Path(run).exists():
        decoder: Any = load_pretrained(run)
        images = load_images(_SHIPPED[run], folder or Path("data"))
        fitted = fit_latents(decoder, images.train[:latents], desc="fitting latents")
        return Source(decoder, fitted, _SHIPPED[run], images)
    path = Path(run)
    decoder = load_generator(path)
    fitted = load_latents(path / LATENTS)
    of_run = about(path / LATENTS)
    step, trained = of_run.get("step"), about(path / GENERATOR).get("step")
    if step != trained:
        raise ValueError(
            f"the latents in {path} are of step {step}, its generator is of step {trained}: finish "
            "the run with --resume"
        )
    if not with_images:
        return Source(decoder, fitted, "", None)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"there is no {path / CONFIG}, which names the images to compare with: --no-metrics "
            "makes samples alone"
        )
    config = TrainConfig.from_json((path / CONFIG).read_text())
    named = config.data in ("digits", "fashion-mnist")
    data = config.data if named or folder is None else str(folder)
    images = load_images(data, folder or config.folder, config.resize, without=path)
    if images.shape != decoder.image_shape:
        raise ValueError(
            f"{data} holds images {images.shape}, the generator makes {decoder.image_shape}"
        )
    if of_run.get("images", fingerprint(images.train)) != fingerprint(images.train):
        raise ValueError(
            f"the images in {data} are not those that {path} was trained on: what is held out "
            "now was not then. --no-metrics makes samples alone"
        )
    return Source(decoder, fitted, config.data, images, config.latent_penalty)


def find_features(name: str | None, data: str) -> tuple[str | None, nn.Module | None]:
    """A shipped feature network, or ``module:function``; None: that of the data, if there is one.

    Raises:
        ValueError, ImportError: neither of the two.
    """
    if name is None:
        name = f"{data}-features"
        return (name, load_pretrained(name)) if name in FEATURES else (None, None)
    if name in FEATURES:
        return name, load_pretrained(name)
    if ":" not in name:
        raise ValueError(
            f"--features must be {', '.join(FEATURES)} or module:function, got {name!r}"
        )
    return name, build_network(name, "--features").eval()


def sample_run(
    run: str,
    out: Path | None = None,
    *,
    count: int = 64,
    prior: Prior = "gmm",
    columns: int = 8,
    seed: int = 0,
    measure: bool = True,
    measured: int = 2000,
    fits: int = 100,
    features: str | None = None,
    folder: Path | None = None,
    latents: int = 4096,
) -> dict[str, Any]:
    """Draw samples; write their sheet and, with ``measure``, figures and neighbours.

    Writes ``samples-PRIOR.png``, ``neighbours-PRIOR.png`` (rows of samples above the training
    images nearest to them) and ``metrics-PRIOR.json``.

    Args:
        run: see :func:`open_source`.
        out: folder for the files; None: the run's, or out/NAME for a shipped generator.
        count: images on the sheet.
        prior: see :func:`jiio_plugins.generative.fit_prior`.
        columns: of the sheets.
        seed: of everything random.
        measure: compute metrics.
        measured: samples that the metrics are computed from.
        fits: held-out images that are fitted for PSNR and SSIM.
        features: see :func:`find_features`.
        folder: see :func:`open_source`.
        latents: see :func:`open_source`.

    Returns:
        What the JSON holds; empty without ``measure``.
    """
    for what, value in (("count", count), ("columns", columns), ("measured", measured)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    source = open_source(run, folder, measure, latents)
    out = out or (Path(run) if Path(run).is_dir() else Path("out") / run)
    out.mkdir(parents=True, exist_ok=True)
    density = fit_prior(source.latents, prior=prior, seed=seed)
    total = max(count, measured if measure else 0)
    samples = decode(source.decoder, density.sample(total, seed).to(source.latents))
    sheet = out / f"samples-{prior}.png"
    write_sheet(sheet, samples[:count], columns)
    print(f"{count} samples from {density} on {len(source.latents)} latents: {sheet}")
    if not measure or source.images is None:
        return {}
    name, network = find_features(features, source.data)
    report: dict[str, Any] = {
        "generator": run,
        "data": source.data,
        "prior": describe(density),
        "held-out fits": fit_figures(source, fits),
        "samples": len(samples),
    }
    if network is not None:
        report["features"] = name
        report["distances"] = set_figures(samples, source.images, network, seed)
    report["nearest training images"] = neighbour_figures(
        samples, source.images, network, out / f"neighbours-{prior}.png", 2 * columns, columns
    )
    path = out / f"metrics-{prior}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    print(f"figures: {path}")
    return report


def describe(density: LatentPrior) -> dict[str, Any]:
    """Components and BIC, as plain values."""
    return {"components": density.components, "bic": {str(k): v for k, v in density.bic.items()}}


def fit_figures(source: Source, count: int) -> dict[str, float]:
    """PSNR and SSIM of latent fits of held-out images."""
    assert source.images is not None
    y = to_unit(source.images.held_out[:count])
    fitted = fit(source.decoder, y, latent_penalty=source.latent_penalty, progress=True)
    return {
        "images": len(y),
        "latent penalty": source.latent_penalty,
        "PSNR": float(fitted.psnr.mean()),
        "SSIM": float(metrics.ssim(fitted.images, y).mean()),
        "f evaluations": float(fitted.f_evals.mean()),
        "VJPs": float(fitted.vjps.mean()),
    }


def set_figures(
    samples: Tensor, images: Images, network: nn.Module, seed: int
) -> dict[str, dict[str, float]]:
    """Distances of samples to held-out images, and of as many training images for comparison."""
    held_out = to_unit(images.held_out)
    some = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    train = to_unit(images.train[some[: len(samples)]])
    return {
        what: metrics.distances(held_out, shown, network, seed=seed)._asdict()
        for what, shown in (("samples", samples), ("training images", train))
    }


def neighbour_figures(
    samples: Tensor,
    images: Images,
    network: nn.Module | None,
    sheet: Path,
    shown: int,
    columns: int,
) -> dict[str, Any]:
    """How near samples are to the training images; draw the first ones above their neighbours."""
    both = torch.cat([samples, to_unit(images.held_out[:_COMPARED])])
    found = metrics.nearest(both, images.train, network, progress=True)
    ours, theirs = found.split(len(samples))
    pairs = []
    for part in torch.arange(min(shown, len(samples))).split(columns):
        blank = samples.new_ones(columns - len(part), *samples.shape[1:])
        nearest = to_unit(images.train[ours.index[part]])
        pairs += [samples[part], blank, nearest, blank]
    write_sheet(sheet, torch.cat(pairs), columns)
    print(f"samples above their nearest training images: {sheet}")
    space = "pixels" if network is None else "features"
    return {"distance in": space, **metrics.nearness(ours, theirs)._asdict()}


def show(report: dict[str, Any]) -> None:
    """Print the figures, each under its own name."""
    fits = report["held-out fits"]
    print(f"{fits['images']} held-out fits: PSNR {fits['PSNR']:.2f} dB, SSIM {fits['SSIM']:.3f}")
    for what, found in report.get("distances", {}).items():
        print(
            f"{what} to held-out images, {report['features']}: Fréchet distance "
            f"{found['frechet']:.2f}, kernel distance {found['kernel']:.4f} "
            f"± {found['kernel_std']:.4f}"
        )
    near = report["nearest training images"]
    print(
        f"median distance to the nearest training image, in {near['distance in']}: "
        f"samples {near['samples']:.2f}, held-out images {near['held_out']:.2f}, "
        f"ratio {near['ratio']:.2f}; "
        f"{100 * near['copies']:.1f} % of the samples are nearer than 99 % of the held-out images"
    )
