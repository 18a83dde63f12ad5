"""``jiio train-generator``, ``jiio sample`` and ``jiio fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jiio_plugins.generative.config import TrainConfig


@dataclass(frozen=True)
class TrainGenerator(TrainConfig):
    """Train a generator by fitting each image's latent inside the training step.

    On several GPUs: torchrun --nproc-per-node N -m jiio_plugins train-generator ...
    """

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.generative import train

        train(self)


@dataclass
class Sample:
    """New images from a trained generator: draw latents from a density of the fitted ones."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """the --out folder of train-generator"""
    count: int = 64
    """images to make"""
    prior: Literal["gaussian", "gmm"] = "gmm"
    """one Gaussian, or a mixture whose number of components is chosen by BIC"""
    out: Path | None = None
    """PNG sheet; default: RUN/samples-PRIOR.png"""
    columns: int = 8
    seed: int = 0

    def run(self) -> None:
        """Do it."""
        from jiio_plugins.generative import decode, load_generator, load_latents, sample_latents
        from jiio_plugins.generative.files import LATENTS
        from jiio_plugins.generative.pictures import write_sheet

        decoder = load_generator(self.run_folder)
        latents = load_latents(self.run_folder / LATENTS)
        drawn = sample_latents(latents, self.count, prior=self.prior, seed=self.seed)
        out = self.out or self.run_folder / f"samples-{self.prior}.png"
        write_sheet(out, decode(decoder, drawn), self.columns)
        print(f"{self.count} samples: {out}")


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
            self.run_folder, self.images, self.out, self.iterations, self.latent_penalty,
            self.resize,
        )  # fmt: skip
