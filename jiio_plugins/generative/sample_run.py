"""``jiio sample``: new images of a trained generator, and how good they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins.data.images import Images, load_images, to_unit
from jiio_plugins.data.labelled import is_named
from jiio_plugins.generative import metrics
from jiio_plugins.generative.config import CONFIG, SampleConfig, TrainConfig
from jiio_plugins.generative.files import (
    GENERATOR,
    LATENTS,
    about,
    is_shipped,
    load_generator,
    load_latents,
)
from jiio_plugins.generative.latents import decode, fit, fit_latents, fit_prior
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.models import load_pretrained
from jiio_plugins.models.pretrained import FEATURES, GENERATORS
from jiio_plugins.utils.checkpoint import fingerprint
from jiio_plugins.utils.device import check_device
from jiio_plugins.utils.factory import build_network
from jiio_plugins.utils.files import keep_results, owning, write_json

if TYPE_CHECKING:
    from jiio_plugins.models.decoder import MDEQDecoder

_SHIPPED = {name: "digits" if name.startswith("digits") else "fashion-mnist" for name in GENERATORS}
Features = tuple[str | None, nn.Module | None]
_COMPARED = 2000  # held-out images, of which neighbours are looked for


@dataclass(frozen=True)
class Source:
    """A generator, latents to draw from, and the images it was trained on (None: not asked for).

    Generator and latents are on one device, where everything is computed.

    Attributes:
        latent_penalty: λ that its latents were fitted with.
    """

    decoder: MDEQDecoder
    latents: Tensor
    data: str
    images: Images | None
    latent_penalty: float = 0.01

    def held_out(self, count: int | None = None) -> Tensor:
        """Held-out images ``(rows, c, h, w)`` in [0, 1], on the device."""
        assert self.images is not None
        return to_unit(self.images.held_out[:count]).to(self.latents.device)

    def train(self, index: Tensor) -> Tensor:
        """Some of the training images, likewise."""
        assert self.images is not None
        return to_unit(self.images.train[index.cpu()]).to(self.latents.device)


def open_source(config: SampleConfig, device: torch.device) -> Source:
    """The folder of a run, or a shipped generator by name, whose latents are fitted here.

    Raises:
        FileNotFoundError, ValueError: no run, or no data. The message says what to do.
    """
    path = Path(config.run)
    if is_shipped(config.run):
        data = _SHIPPED[config.run]
        shipped = load_generator(config.run).to(device)
        images = load_images(data, config.folder or Path("data"))
        fitted = fit_latents(shipped, images.train[: config.latents], desc="fitting latents")
        return Source(shipped, fitted, data, images)
    decoder = load_generator(path).to(device)
    fitted = load_latents(path / LATENTS).to(device)
    step, trained = about(path / LATENTS).get("step"), about(path / GENERATOR).get("step")
    if step != trained:
        raise ValueError(
            f"the latents in {path} are of step {step}, its generator is of step {trained}: finish "
            "the run with --resume"
        )
    if not config.metrics:
        return Source(decoder, fitted, "", None)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"there is no {path / CONFIG}, which names the images to compare with: --no-metrics "
            "makes samples alone"
        )
    of_run = TrainConfig.read(path / CONFIG)
    images = _images(path, of_run, config.folder, decoder.image_shape)
    return Source(decoder, fitted, of_run.data, images, of_run.latent_penalty)


def _images(run: Path, of_run: TrainConfig, folder: Path | None, shape: tuple[int, ...]) -> Images:
    """The images that the run was trained on, wherever they lie now."""
    named = is_named(of_run.data)
    data = of_run.data if named or folder is None else str(folder)
    images = load_images(data, folder or of_run.folder, of_run.resize, without=run)
    if images.shape != shape:
        raise ValueError(f"{data} holds images {images.shape}, the generator makes {shape}")
    known = about(run / LATENTS).get("images")
    if known is not None and known != fingerprint(images.train):
        raise ValueError(
            f"the images in {data} are not those that {run} was trained on: what is held out "
            "now was not then. --no-metrics makes samples alone"
        )
    return images


def find_features(name: str | None, data: str) -> Features:
    """A shipped feature network, or ``module:function``. None: that of the data, if there is one.

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


def sample_run(config: SampleConfig) -> dict[str, Any]:
    """Draw samples. Write their sheet and, with ``metrics``, figures and neighbours.

    Writes ``samples-PRIOR.png``, ``neighbours-PRIOR.png`` (rows of samples above the training
    images nearest to them) and ``metrics-PRIOR.json``.

    Returns:
        What the JSON holds, and the paths of the files.

    Raises:
        FileExistsError: there are such files, and ``overwrite`` is not set.
        ImportError: see :func:`jiio_plugins.generative.metrics.need_torchmetrics`.
        ValueError: a count below 1, or no such device.
        BlockingIOError: another process writes them.
    """
    for what in ("count", "columns", "measured"):
        if getattr(config, what) < 1:
            raise ValueError(f"{what} must be at least 1, got {getattr(config, what)}")
    run = Path(config.run)
    out = config.out or (run if run.is_dir() else Path("out") / run)
    names = ("samples.png", "metrics.json", "neighbours.png")
    files = [out / name.replace(".", f"-{config.prior}.") for name in names]
    keep_results(out, [file.name for file in files], config.overwrite)
    if config.metrics:
        metrics.need_torchmetrics()
    device = check_device(config.device)
    source = open_source(config, device)
    name, network = find_features(config.features, source.data)
    features = (name, None if network is None else network.to(device))
    with owning(*files):
        return _sample(config, source, features, files)


def _sample(
    config: SampleConfig, source: Source, features: Features, files: list[Path]
) -> dict[str, Any]:
    density = fit_prior(source.latents, prior=config.prior, seed=config.seed)
    total = max(config.count, config.measured if config.metrics else 0)
    samples = decode(source.decoder, density.sample(total, config.seed).to(source.latents))
    for old in files[1:]:  # figures of other samples
        old.unlink(missing_ok=True)
    write_sheet(files[0], samples[: config.count], config.columns)
    print(f"{config.count} samples from {density} on {len(source.latents)} latents: {files[0]}")
    prior = {"components": density.components, "bic": {str(k): v for k, v in density.bic.items()}}
    report: dict[str, Any] = {"prior": prior}
    if config.metrics:
        report |= _measure(config, source, samples, features, files[2])
        write_json(files[1], report)
        show(report)
        print(f"figures: {files[1]}")
    return {**report, "files": files if config.metrics else files[:1]}


def _measure(
    config: SampleConfig, source: Source, samples: Tensor, features: Features, sheet: Path
) -> dict[str, Any]:
    """Figures of the samples beside the images of the run. Draws the neighbours."""
    name, network = features
    report: dict[str, Any] = {
        "generator": config.run,
        "data": source.data,
        "held-out fits": fit_figures(source, config.fits),
        "samples": len(samples),
    }
    if network is not None:
        report["features"] = name
        report["distances"] = set_figures(samples, source, network, config.seed)
    report["nearest training images"] = neighbour_figures(
        samples, source, network, sheet, config.columns
    )
    return report


def fit_figures(source: Source, count: int) -> dict[str, float]:
    """PSNR and SSIM of latent fits of held-out images."""
    y = source.held_out(count)
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
    samples: Tensor, source: Source, network: nn.Module, seed: int
) -> dict[str, dict[str, float]]:
    """Distances of samples to held-out images, and of as many training images for comparison."""
    assert source.images is not None
    held_out = source.held_out()
    some = torch.randperm(len(source.images.train), generator=torch.Generator().manual_seed(seed))
    train = source.train(some[: len(samples)])
    return {
        what: metrics.distances(held_out, shown, network, seed=seed)._asdict()
        for what, shown in (("samples", samples), ("training images", train))
    }


def neighbour_figures(
    samples: Tensor, source: Source, network: nn.Module | None, sheet: Path, columns: int
) -> dict[str, Any]:
    """How near samples are to the training images. Draw two rows of them above their neighbours."""
    assert source.images is not None
    both = torch.cat([samples, source.held_out(_COMPARED)])
    found = metrics.nearest(both, source.images.train, network, progress=True)
    ours, theirs = found.split(len(samples))
    pairs = []
    for part in torch.arange(min(2 * columns, len(samples))).split(columns):
        blank = samples.new_ones(columns - len(part), *samples.shape[1:])
        nearest = source.train(ours.index[part])
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
        f"ratio {near['ratio']:.2f}"
    )
    if math.isfinite(near["copies"]):
        share = f"{100 * near['copies']:.1f} % of the samples"
        print(f"{share} are nearer than 99 % of the held-out images")
