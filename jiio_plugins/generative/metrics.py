"""How good a generator is: held-out fits, distances between sets of images, nearest neighbours.

Fréchet and kernel distances are computed by torchmetrics in the features of a network that is named
with every figure. They are called FID and KID with Inception's features alone. With any other
network the figures are on another scale, and so is their name here.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from jiio_plugins.joint.guard import flags_kept
from jiio_plugins.utils.builds import importing_torchvision
from jiio_plugins.utils.console import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENOUGH = 100  # held-out images, of whose distances a hundredth part is asked for
_BATCH = 500


def need_torchmetrics() -> None:
    """Raise now, and not after the first figures, where there is none to compute them with.

    Raises:
        ImportError: torchmetrics is missing, or torchvision, which it imports, is built for another
            torch.
    """
    with importing_torchvision():
        import torchmetrics  # noqa: F401


def psnr(made: Tensor, images: Tensor) -> Tensor:
    """``−10 log₁₀ mean (made − images)²`` of each, in dB (peak 1), ``(rows,)``.

    Args:
        made: ``(rows, c, h, w)`` in [0, 1].
        images: what it is to be, likewise.
    """
    mse = (made - images).square().flatten(1).mean(1)
    # an exact copy gets 120 dB, not Inf, which would spoil every mean
    return -10 * mse.clamp(min=1e-12).log10()


def ssim(made: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each pair, ``(rows,)``, at most 1.

    The window is the usual Gaussian of σ = 1.5 and 11 pixels. Images of fewer than 11 pixels a side
    get σ = 0.9 and 7 pixels.

    Args:
        made: ``(rows, c, h, w)`` in [0, 1].
        images: what it is to be, likewise.

    Source: Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13 (2004).
    """
    need_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = 1.5 if min(images.shape[-2:]) >= 11 else 0.9
    values: Any = structural_similarity_index_measure(
        made, images, sigma=sigma, data_range=1.0, reduction="none"
    )
    return torch.as_tensor(values).reshape(len(images))


class Distances(NamedTuple):
    """Between two sets of images, in some network's features.

    Attributes:
        frechet: ``‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)``.
        kernel: squared maximum mean discrepancy with the kernel ``(xᵀy / features + 1)³``. It is
            the mean over 100 subsets of 1,000 images, or of half of the smaller set, but of two at
            least.
        kernel_std: its standard deviation over the subsets.
    """

    frechet: float
    kernel: float
    kernel_std: float


def distances(real: Tensor, made: Tensor, features: nn.Module, *, seed: int = 0) -> Distances:
    """Fréchet and kernel distance between two sets of images.

    Args:
        real: ``(rows, c, h, w)`` in [0, 1].
        made: likewise, as many as there are.
        features: images → ``(rows, features)``. It is called in eval mode, without gradients.
        seed: of the kernel distance's subsets.

    Raises:
        ValueError: fewer than two images on a side, or features that are not a matrix.

    Source: Heusel et al. (NeurIPS 2017), eq. 6, and Bińkowski et al. (ICLR 2018), section 4.
    """
    need_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    if min(len(real), len(made)) < 2:
        raise ValueError(
            f"distances need two images at least on each side, got {len(real)} and {len(made)}"
        )
    a, b = (extract(features, images) for images in (real, made))
    # the features are computed once: what torchmetrics is given as network passes them on
    passes = _Identity(a.shape[1])
    frechet = FrechetInceptionDistance(feature=passes).to(a.device)
    with _quiet(seed):
        size = min(1000, max(2, (min(len(a), len(b)) + 1) // 2))
        kernel = KernelInceptionDistance(feature=passes, subsets=100, subset_size=size).to(a.device)
        for metric in (frechet, kernel):
            metric.update(a, real=True)
            metric.update(b, real=False)
        mean, std = kernel.compute()
    return Distances(float(frechet.compute()), float(mean), float(std))


@torch.no_grad()
def extract(features: nn.Module, images: Tensor) -> Tensor:
    """Features of all images, ``(rows, features)``.

    Args:
        features: the network, called in eval mode. Its train/eval flags are put back.
        images: ``(rows, c, h, w)`` in [0, 1].

    Raises:
        ValueError: the network returns anything but a matrix.
    """
    with flags_kept(features):
        features.eval()
        out = torch.cat([features(part) for part in images.split(_BATCH)])
    if out.ndim != 2:
        raise ValueError(f"a feature network must return (rows, d), got {tuple(out.shape)}")
    return out


class _Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Guard the global generator, which subsets are drawn from, and say nothing of memory."""
    import warnings

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        torch.default_generator.manual_seed(seed)  # torch's own touches the GPUs too
        yield


@dataclass(frozen=True)
class Neighbours:
    """The nearest of some training images.

    Attributes:
        index: of each image's nearest training image, ``(rows,)``.
        distance: Euclidean, in the features or in pixels, ``(rows,)``.
    """

    index: Tensor
    distance: Tensor

    def split(self, first: int) -> tuple[Neighbours, Neighbours]:
        """Those of the first images, and those of the others."""
        return (
            Neighbours(self.index[:first], self.distance[:first]),
            Neighbours(self.index[first:], self.distance[first:]),
        )


def nearest(
    images: Tensor, train: Tensor, features: nn.Module | None = None, *, progress: bool = False
) -> Neighbours:
    """The training image nearest to each image.

    Args:
        images: ``(rows, c, h, w)`` in [0, 1].
        train: the training images, ``(images, c, h, w)``, floats in [0, 1] or bytes.
        features: distances are between its outputs. None: between pixels.
        progress: show a bar.
    """

    def rows(part: Tensor) -> Tensor:
        part = (part.float() / 255 if part.dtype == torch.uint8 else part).to(images.device)
        return part.flatten(1) if features is None else extract(features, part)

    mine = rows(images)
    least = torch.full((len(images),), torch.inf, device=mine.device)
    index = torch.zeros(len(images), dtype=torch.long, device=mine.device)
    chunks = range(0, len(train), 2000)
    for first in progress_bar(chunks, desc="training images", disable=not progress, leave=False):
        found, at = torch.cdist(mine, rows(train[first : first + 2000])).min(1)
        index = torch.where(found < least, at + first, index)
        least = torch.minimum(least, found)
    return Neighbours(index, least)


class Nearness(NamedTuple):
    """How near samples are to the training set, beside held-out images, which cannot be copies.

    Attributes:
        samples: median distance of a sample to its nearest training image.
        held_out: the same of held-out images.
        ratio: samples / held_out. Far below 1 means that training images are repeated.
        copies: share of samples nearer to a training image than 99 % of the held-out images are.
            NaN where there are fewer than 100 of these.
    """

    samples: float
    held_out: float
    ratio: float
    copies: float


def nearness(samples: Neighbours, held_out: Neighbours) -> Nearness:
    """Sum up how near samples are to the training set.

    Args:
        samples: :func:`nearest` of the samples.
        held_out: :func:`nearest` of held-out images, in the same features.
    """
    ours, theirs = float(samples.distance.median()), float(held_out.distance.median())
    copies = math.nan
    if len(held_out.distance) >= _ENOUGH:
        threshold = held_out.distance.quantile(0.01)
        copies = float((samples.distance < threshold).float().mean())
    return Nearness(ours, theirs, ours / max(theirs, 1e-12), copies)
