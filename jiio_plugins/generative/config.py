"""Settings as frozen dataclasses, which are the command line too.

Those of a training are the run's record. The command line takes its help from what is said of each
field.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tyro

from jiio_plugins.utils.files import (
    EMPTY_SEAL,
    as_json,
    has_seal,
    read_regular,
    sealed,
    understood,
    unsealed,
)

if TYPE_CHECKING:
    from jiio_plugins.models.decoder import MDEQDecoder

CONFIG = "config.json"  # its file, in the folder of a run

Latents = Literal["zero", "table", "encoder"]
LoggerName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the decoder. A field left out is chosen by the images' size.

    Attributes:
        size: default, for which a step on 64 colour images of 64 pixels a side takes about a second
            on two cores, or paper, the four scales of the paper at full resolution, for a GPU
        latent: shape of one latent: D for a vector, or C H W for a spatial one
        channels: channels of each scale, the finest first
        stride: the finest scale has image size / stride pixels
        expansion: widening inside a residual block
        groups: groups of the GroupNorms
        padding: of the convolutions: replicate, or zeros, which leaves a frame in the pictures
        upsampling: of the last layers: bilinear, or shuffle, which leaves a grid in the pictures
    """

    size: Literal["default", "paper"] = "default"
    latent: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    stride: int = 0
    expansion: int = 2
    groups: int = 4
    padding: Literal["replicate", "zeros"] = "replicate"
    upsampling: Literal["bilinear", "shuffle"] = "bilinear"

    def for_images(self, shape: tuple[int, int, int]) -> Architecture:
        """With every size filled in for images ``(c, h, w)``.

        By default there are two scales of 16 channels up to 16 pixels, and up to 32 two of 16 and
        32 at half resolution. Above there are three of 16 to 64, the finest of which has 8 to 16
        sites a side. The paper's are four of 32 to 256 at full resolution.
        """
        side = max(shape[1:])
        channels: tuple[int, ...]
        if self.size == "paper":
            latent, channels, stride = (128,), (32, 64, 128, 256), 1
        elif side <= 16:
            latent, channels, stride = (16,), (16, 16), 1
        elif side <= 32:
            latent, channels, stride = (64,), (16, 32), 2
        else:
            latent, channels, stride = (128,), (16, 32, 64), 2 ** (side - 1).bit_length() // 16
        return replace(
            self,
            latent=self.latent or latent,
            channels=self.channels or channels,
            stride=self.stride or stride,
        )

    def build(self, shape: tuple[int, int, int]) -> MDEQDecoder:
        """A fresh decoder of images ``(c, h, w)``."""
        from jiio_plugins.models.decoder import MDEQDecoder  # settings alone need no torch

        full = self.for_images(shape)
        return MDEQDecoder(
            latent_shape=full.latent[0] if len(full.latent) == 1 else full.latent,
            image_shape=shape,
            channels=full.channels,
            stride=full.stride,
            expansion=full.expansion,
            groups=full.groups,
            padding=full.padding,
            upsampling=full.upsampling,
        )


def check_penalty(latent_penalty: float) -> None:
    """Raise unless it is a finite number, not negative.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= latent_penalty < math.inf:
        raise ValueError(f"latent_penalty must be finite and not negative, got {latent_penalty}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a generator by fitting each image's latent inside the training step.

    Attributes:
        data: digits, fashion-mnist, mnist, cifar-10, cifar-100, svhn, celeba, a folder of images,
            an npz file with x, or your own module:function. --data is the same in this command
        out: folder of the run: checkpoint, config, TensorBoard, pictures
        folder: where a named data set lies: torchvision's root, or Debian's of Fashion-MNIST
        resize: of files: crop images to their central square and scale it to so many pixels
        resume: go on with the run in --out. Its own settings hold, and need not be given. Of them
            epochs, steps, folder, accelerator, loggers and how often something is written may be
            given anew
        model: sizes of the decoder. A field left out is chosen by the images' size
        latents: where a step's joint optimisation starts: at zero as in the paper, at the latents
            of the image's last visit (kept in a table), or at an encoder's guess
        iterations: joint iterations a training step
        warmup: evaluations of f alone before the first of them
        step_size: of the latent, in units of w² / squared error. Default: 2.5 √(sites / pixels), of
            which a latent vector has one site and a spatial latent h·w
        refine: further steps on state and adjoint before the gradient of the weights
        latent_penalty: weight λ of the latent's prior: squared error + λ ‖w‖² is minimised
        epochs: passes over the training images
        steps: stop after so many steps, whatever the epochs
        batch_size: images a step, over all processes
        lr: of AdamW, at its highest
        weight_decay: of AdamW
        grad_clip: largest norm of the parameters' gradient
        jacobian_weight: weight of the penalty that keeps the cell easy to solve, beside the error
            per pixel
        ema_decay: of the averaged weights that pictures, samples and fits use, smaller in the first
            steps
        precision: bf16-mixed: the cell runs in bfloat16, the states of the solver stay in float32
        accelerator: cpu, cuda, cuda:1, ..., or auto, which takes a GPU where there is one
        checkpoint_every: steps between checkpoints
        checkpoint_seconds: and seconds after which there is one whatever the step
        pictures_every: steps between pictures and held-out fits
        pictures_seconds: and seconds, likewise. It is longer where drawing takes over a tenth of it
        loggers: where losses are logged: tensorboard, wandb (Weights & Biases), both, or nothing
        latents_kept: training images whose latents are fitted at the end, to sample from
        seed: of all that is random in the run

    Raises:
        ValueError: a count below 1, seconds that are not above 0, or a negative latent_penalty.
    """

    data: Annotated[str, tyro.conf.arg(name="dataset", aliases=["--data"])]
    out: Path
    folder: Path = Path("data")
    resize: int | None = None
    resume: bool = False
    model: Architecture = Architecture()
    latents: Latents = "zero"
    iterations: int = 10
    warmup: int = 6
    step_size: float | None = None
    refine: int = 2
    latent_penalty: float = 0.01
    epochs: int = 20
    steps: int | None = None
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    jacobian_weight: float = 0.1
    ema_decay: float = 0.99
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Annotated[str, tyro.conf.arg(aliases=["--device"])] = "auto"
    checkpoint_every: int = 200
    checkpoint_seconds: float = 15.0
    pictures_every: int = 500
    pictures_seconds: float = 15.0
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    latents_kept: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("out", "folder"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        object.__setattr__(self, "loggers", tuple(self.loggers))
        counts = (
            "iterations",
            "epochs",
            "steps",
            "batch_size",
            "checkpoint_every",
            "pictures_every",
            "latents_kept",
            "resize",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("checkpoint_seconds", "pictures_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check_penalty(self.latent_penalty)

    def given(self) -> dict[str, Any]:
        """What a resumed run is to have: what differs from the defaults. data and out have none."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(TrainConfig)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def to_json(self) -> str:
        """All settings as text, but ``resume``, with a checksum."""
        values = {f.name: asdict(self)[f.name] for f in fields(TrainConfig)}
        values |= {"resume": False, "checksum": EMPTY_SEAL}
        return sealed((as_json(values, indent=1) + "\n").encode()).decode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The settings that :meth:`to_json` gave and a file has.

        Raises:
            OSError: it cannot be read.
            ValueError: damaged, or settings that there are not.
        """
        return cls.from_json(read_regular(path))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: damaged, or settings that there are not.
        """
        try:
            values: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"a run's {CONFIG} is damaged: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a run's {CONFIG} is damaged: it holds no settings")
        content = text if isinstance(text, bytes) else text.encode()
        edited = ValueError(
            f"a run's {CONFIG} is damaged or was edited: its checksum is not that of its content. "
            "Take the change back, and give settings on the command line"
        )
        whole = unsealed(content) is not None
        if not whole and ("checksum" in values or has_seal(content)):
            raise edited  # before its names are looked at: one of them may be what has changed
        known = {f.name for f in fields(TrainConfig)}
        for name in ("checksum", "jiio_plugins"):
            values.pop(name, None)
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings in the run's config: {', '.join(unknown)}")
        missing = sorted({"model", "out", "folder", "data"} - set(values))
        if missing:
            raise ValueError(f"a run's {CONFIG} has no {', '.join(missing)}: it is damaged")
        if not whole:
            raise edited
        with understood(f"a run's {CONFIG}"):
            model = values.pop("model")
            for name in ("latent", "channels"):
                model[name] = tuple(model[name])
            return cls(model=Architecture(**model), **values)


def config_of(run: Path) -> Path:
    """The file of the settings of a run that is to go on.

    Args:
        run: its folder.

    Raises:
        FileNotFoundError: there is no run.
    """
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"there is no run in {run}: leave out --resume")
    return run / CONFIG


_run = tyro.conf.arg(metavar="RUN")


@dataclass(frozen=True)
class SampleConfig:
    """New images from a trained generator: draw latents from a density of the fitted ones.

    Writes samples-PRIOR.png, and metrics-PRIOR.json with PSNR and SSIM of held-out fits, Fréchet
    and kernel distances, and how near samples are to training images. neighbours-PRIOR.png shows
    samples above these.

    Attributes:
        run: the --out folder of train-generator, or a shipped generator: digits-generator,
            fashion-mnist-generator, fashion-mnist-spatial
        count: images on the sheet
        prior: one Gaussian, or a mixture whose number of components is chosen by BIC
        out: folder for the files. Default: RUN, or out/NAME for a shipped generator
        columns: of the sheets
        metrics: compare with the images of the run
        measured: samples that are compared
        fits: held-out images that are fitted
        features: network that distances are measured in: fashion-mnist-features, or your own
            module:function. Default: that of the data, or none: then neighbours are sought by
            pixels
        folder: where the images lie now. Default: where they were
        latents: for a shipped generator: training images whose latents are fitted to draw from
        seed: of all that is random
        device: cpu, cuda, cuda:1, ...
        overwrite: replace the files that an earlier call left in --out
    """

    run: Annotated[str, tyro.conf.Positional, _run]
    count: int = 64
    prior: Literal["gaussian", "gmm"] = "gmm"
    out: Path | None = None
    columns: int = 8
    metrics: bool = True
    measured: int = 2000
    fits: int = 100
    features: str | None = None
    folder: Path | None = None
    latents: int = 4096
    seed: int = 0
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True)
class FitConfig:
    """Latents and reconstructions of new images.

    Attributes:
        run: the --out folder of train-generator, a generator.safetensors, or a shipped generator:
            digits-generator, fashion-mnist-generator, fashion-mnist-spatial
        images: image files, or folders of them
        out: where latents.safetensors, a PNG for each image and a sheet go
        iterations: joint iterations
        latent_penalty: weight λ of the latent's prior: squared error + λ ‖w‖² is minimised
        resize: crop the images to their central square and scale it to the generator's size
        device: cpu, cuda, cuda:1, ...
        overwrite: replace the files that an earlier call left in --out
    """

    run: Annotated[str, tyro.conf.Positional, _run]
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = Path("out/fit")
    iterations: int = 60
    latent_penalty: float = 0.01
    resize: bool = False
    device: str = "cpu"
    overwrite: bool = False
