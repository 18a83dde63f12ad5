"""Latents of images, and images from latents: fitting and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from jiio_plugins.data.images import to_unit
from jiio_plugins.envelope import joint_solution
from jiio_plugins.generative.config import check_penalty
from jiio_plugins.generative.metrics import psnr
from jiio_plugins.generative.step import SquaredError, WithLatent, with_step_size
from jiio_plugins.methods.joint import Joint
from jiio_plugins.optimize import optimize_input
from jiio_plugins.utils.console import progress_bar

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

    from jiio_plugins.methods.base import Method
    from jiio_plugins.models.decoder import MDEQDecoder

Prior = Literal["gaussian", "gmm"]


@dataclass(frozen=True)
class Fit:
    """Latents of some images, one entry per image.

    Attributes:
        latents: ``(rows, *latent_shape)``.
        images: what the generator makes of them, ``(rows, c, h, w)`` in [0, 1], by a converged
            solve.
        psnr: in dB (peak 1), ``(rows,)``.
        status: :class:`jiio_plugins.Status` codes, ``(rows,)``.
        f_evals: evaluations of f, ``(rows,)``.
        vjps: vector-Jacobian products, ``(rows,)``.
    """

    latents: Tensor
    images: Tensor
    psnr: Tensor
    status: Tensor
    f_evals: Tensor
    vjps: Tensor


def fit(
    decoder: MDEQDecoder,
    images: Tensor,
    *,
    start: Tensor | None = None,
    method: Method | None = None,
    latent_penalty: float = 0.01,
    batch_size: int = 256,
    progress: bool = False,
) -> Fit:
    """The latent of each image: ``argmin_w ‖G(w) − y‖² + λ‖w‖²``.

    Args:
        decoder: the generator G.
        images: y, ``(rows, c, h, w)`` in [0, 1], on the decoder's device.
        start: latents to start from, ``(rows, *latent_shape)``. None: zero.
        method: :class:`jiio_plugins.Joint` (default, 60 iterations, memory 10) or
            :class:`jiio_plugins.Nested`. Without a step size it takes that of
            :func:`jiio_plugins.generative.step.default_step_size`.
        latent_penalty: λ, in squared error per squared latent.
        batch_size: images fitted together. No result depends on it, but for rounding.
        progress: show a bar.

    Returns:
        A :class:`Fit`, whose images and PSNR come from an independent solve.

    Raises:
        TypeError: no tensor.
        ValueError: no images, or images of another shape than the generator's or outside [0, 1]. A
            start of another shape, or a negative λ.
    """
    _check_images(decoder, images)
    check_penalty(latent_penalty)
    images = images.detach()
    start = decoder.zeros(len(images)) if start is None else start
    if start.shape != (len(images), *decoder.latent_shape):
        raise ValueError(
            f"start must hold a latent per image, {(len(images), *decoder.latent_shape)}, got "
            f"{tuple(start.shape)}"
        )
    model = WithLatent(decoder)
    method = with_step_size(method or Joint(max_iter=60), decoder)
    parts = []
    batches = list(zip(images.split(batch_size), start.split(batch_size), strict=True))
    for y, w in progress_bar(batches, desc="fitting latents", disable=not progress):
        found = optimize_input(model, w, SquaredError(y, latent_penalty), method=method)
        assert isinstance(found.x, Tensor)
        made, _ = found.output
        parts.append(
            Fit(
                found.x,
                made.detach(),
                psnr(made.detach(), y),
                found.status,
                found.stats.f_evals,
                found.stats.vjps,
            )
        )
    return Fit(*(torch.cat([getattr(p, name) for p in parts]) for name in Fit.__annotations__))


def _check_images(decoder: MDEQDecoder, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim and not len(images):
        raise ValueError("no images to fit")
    if images.ndim != 4 or tuple(images.shape[1:]) != decoder.image_shape:
        raise ValueError(
            f"the generator makes images {decoder.image_shape}, got {tuple(images.shape[1:])}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must be in [0, 1], got values from {low:g} to {high:g}")


def fit_latents(
    decoder: MDEQDecoder,
    images: Tensor,
    *,
    iterations: int = 30,
    latent_penalty: float = 0.01,
    batch_size: int = 256,
    desc: str | None = None,
) -> Tensor:
    """The latents alone of many images, without verification, to build a prior from.

    Args:
        decoder: the generator.
        images: ``(rows, c, h, w)``, uint8, on any device.
        iterations: of :class:`jiio_plugins.Joint`, from zero.
        latent_penalty: λ, see :func:`fit`.
        batch_size: images fitted together.
        desc: what the progress bar says. None: no bar.

    Returns:
        ``(rows, *latent_shape)``, on the decoder's device.

    Not for: figures that are reported. :func:`fit` verifies them.
    """
    model, out = WithLatent(decoder), []
    device = next(decoder.parameters()).device
    method = with_step_size(Joint(max_iter=iterations), decoder)
    for part in progress_bar(images.split(batch_size), desc=desc, disable=desc is None):
        objective = SquaredError(to_unit(part.to(device)), latent_penalty)
        out.append(joint_solution(model, decoder.zeros(len(part)), objective, method=method).x)
    return torch.cat(out)


@torch.no_grad()
def decode(decoder: MDEQDecoder, latents: Tensor, batch_size: int = 256) -> Tensor:
    """Images of latents, ``(rows, c, h, w)`` in [0, 1].

    Args:
        decoder: the generator.
        latents: ``(rows, *latent_shape)``, on the decoder's device.
        batch_size: latents decoded together.
    """
    return torch.cat([decoder(part) for part in latents.split(batch_size)])


@dataclass(frozen=True)
class LatentPrior:
    """A density of latents to draw from: a mixture of Gaussians with full covariances.

    Attributes:
        mixture: scikit-learn's, fitted to flattened latents in float64.
        latent_shape: of one latent.
        bic: Bayesian information criterion of every number of components tried. The least won.
    """

    mixture: GaussianMixture
    latent_shape: tuple[int, ...]
    bic: dict[int, float]

    @property
    def components(self) -> int:
        """How many Gaussians."""
        count: int = self.mixture.n_components
        return count

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """New latents ``(count, *latent_shape)``, float32, on the CPU.

        Args:
            count: how many.
            seed: of the draw and of its order.
        """
        self.mixture.random_state = seed
        # they come sorted by component, and a sheet of the first few would show one alone
        drawn, _ = self.mixture.sample(count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return torch.from_numpy(drawn)[order].float().reshape(count, *self.latent_shape)

    def __str__(self) -> str:
        if len(self.bic) == 1:
            return "a Gaussian" if self.components == 1 else f"{self.components} Gaussians"
        tried = ", ".join(str(k) for k in self.bic)
        return f"a mixture of {self.components} Gaussians (of {tried} by BIC)"


def fit_prior(
    latents: Tensor,
    *,
    prior: Prior = "gmm",
    components: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    seed: int = 0,
) -> LatentPrior:
    """A density fitted to ``latents``.

    Args:
        latents: fitted ones, ``(rows, *latent_shape)``.
        prior: "gaussian" is one Gaussian with full covariance, "gmm" a mixture of them.
        components: numbers of components tried. Only those count that leave each component more
            latents than it has dimensions. The one of least BIC is taken.
        seed: of the mixture's initialisation.

    Raises:
        ValueError: an unknown prior, or fewer than two latents.
    """
    from sklearn.mixture import GaussianMixture

    if prior not in ("gaussian", "gmm"):
        raise ValueError(f"prior must be 'gaussian' or 'gmm', got {prior!r}")
    flat = latents.detach().cpu().flatten(1).double()
    if len(flat) < 2:
        raise ValueError(f"a prior needs two latents at least, got {len(flat)}")
    tried = [k for k in components if k * flat.shape[1] < len(flat)] if prior == "gmm" else []
    mixtures = [
        GaussianMixture(k, random_state=seed, reg_covar=1e-4).fit(flat.numpy())
        for k in tried or [1]
    ]
    bic = {m.n_components: float(m.bic(flat.numpy())) for m in mixtures}
    best = min(mixtures, key=lambda m: bic[m.n_components])
    return LatentPrior(best, tuple(latents.shape[1:]), bic)


def sample_latents(
    latents: Tensor,
    count: int,
    *,
    prior: Prior = "gmm",
    components: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    seed: int = 0,
) -> Tensor:
    """New latents ``(count, *latent_shape)`` from a density fitted to ``latents``.

    They are ``fit_prior(...).sample(count)``, like ``latents`` in type and device.

    Args:
        latents: fitted ones, ``(rows, *latent_shape)``.
        count: how many to draw.
        prior: as in :func:`fit_prior`.
        components: as in :func:`fit_prior`.
        seed: of the fit and of the draw.

    Raises:
        ValueError: an unknown prior, or fewer than two latents.
    """
    fitted = fit_prior(latents, prior=prior, components=components, seed=seed)
    return fitted.sample(count, seed).to(latents)
