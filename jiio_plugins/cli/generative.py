"""``jiio train-generator``, ``jiio sample`` and ``jiio fit``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jiio_plugins.generative.config import CONFIG, TrainConfig


@dataclass(frozen=True)
class TrainGenerator(TrainConfig):
    """Train a generator by fitting each image's latent inside the training step.

    On several GPUs: torchrun --nproc-per-node N -m jiio_plugins train-generator ...
    """

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.generative import train

        train(self)

    def read_again(self, words: list[str]) -> TrainGenerator:
        """With --resume: the words on top of the run's settings, not on top of the defaults."""
        path = self.out / CONFIG
        if not self.resume or not path.is_file():
            return self
        saved = Resumed.from_json(path.read_text())
        return tyro.cli(Resumed, args=words, default=saved, prog="jiio train-generator")


class Resumed(TrainGenerator):
    """All of its settings are as the run has them, or were given."""

    def given(self) -> dict[str, Any]:
        """All settings."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class Sample:
    """New images from a trained generator: draw latents from a density of the fitted ones.

    Writes samples-PRIOR.png; and metrics-PRIOR.json with PSNR and SSIM of held-out fits, Fréchet
    and kernel distances, and how near samples are to training images, which neighbours-PRIOR.png
    shows below them.
    """

    run_folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """the --out folder of train-generator, or a shipped generator: digits-generator,
    fashion-mnist-generator"""
    count: int = 64
    """images on the sheet"""
    prior: Literal["gaussian", "gmm"] = "gmm"
    """one Gaussian, or a mixture whose number of components is chosen by BIC"""
    out: Path | None = None
    """folder for the files; default: RUN, or out/NAME for a shipped generator"""
    columns: int = 8
    """of the sheets"""
    metrics: bool = True
    """compare with the images of the run"""
    measured: int = 2000
    """samples that are compared"""
    fits: int = 100
    """held-out images that are fitted"""
    features: str | None = None
    """network that distances are measured in: fashion-mnist-features, or your own module:function;
    default: that of the data, or none: then neighbours are sought by pixels"""
    folder: Path | None = None
    """where the images lie now; default: where they were"""
    latents: int = 4096
    """for a shipped generator: training images whose latents are fitted to draw from"""
    seed: int = 0

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.generative.sample_run import sample_run

        sample_run(
            self.run_folder,
            self.out,
            count=self.count,
            prior=self.prior,
            columns=self.columns,
            seed=self.seed,
            measure=self.metrics,
            measured=self.measured,
            fits=self.fits,
            features=self.features,
            folder=self.folder,
            latents=self.latents,
        )


@dataclass
class FitImages:
    """Latents and reconstructions of new images."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """the --out folder of train-generator, or a generator.safetensors"""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """image files, or folders of them"""
    out: Path = Path("out/fit")
    """where latents.safetensors, a PNG for each image and a sheet go"""
    iterations: int = 60
    """joint iterations"""
    latent_penalty: float = 0.01
    """weight λ of the latent's prior: squared error + λ ‖u‖² is minimised"""
    resize: bool = False
    """crop the images to their central square and scale it to the generator's size"""

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.generative.fit_files import fit_files

        fit_files(
            self.run_folder,
            self.images,
            self.out,
            self.iterations,
            self.latent_penalty,
            self.resize,
        )
