"""One training step: fit the latents of a batch jointly, then the envelope gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from jiio_plugins.envelope import envelope_loss, joint_solution
from jiio_plugins.equilibrium.regularization import jacobian_penalty
from jiio_plugins.methods.joint import Joint

if TYPE_CHECKING:
    from jiio_plugins.generative.config import TrainConfig
    from jiio_plugins.methods.base import Method
    from jiio_plugins.models.decoder import MDEQDecoder


class WithLatent(nn.Module):
    """``w → (decoder(w), w)``, so that an objective can hold a prior on the latent."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Image ``(rows, *image_shape)`` and latent ``(rows, *latent_shape)``."""
        return self.decoder(w), w


class SquaredError:
    """``ℓ = ‖image − y‖² + λ ‖w‖²`` per row, of what :class:`WithLatent` returns.

    Args:
        images: y, ``(rows, c, h, w)`` in [0, 1].
        penalty: λ, in squared error per squared latent.
    """

    def __init__(self, images: Tensor, penalty: float) -> None:
        self.images, self.penalty = images, penalty

    def __call__(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """ℓ, ``(rows,)``."""
        image, w = output
        error = (image.to(self.images.dtype) - self.images).square().flatten(1).sum(1)
        return error + self.penalty * w.square().flatten(1).sum(1)


def default_step_size(decoder: MDEQDecoder) -> float:
    """``2.5 √(sites / pixels)``, in units of w² / squared error.

    A latent's gradient is a sum over the pixels that it reaches. A vector reaches all ``c · h · w``
    of an image, a spatial latent the fewer the more sites (height × width) it has. Trained
    generators compensate for some of that, which leaves the root. The constant was measured on the
    shipped ones: 0.31 for 8×8 digits and 0.09 for 28×28 garments fit as well as the best step does.
    """
    sites = math.prod(decoder.latent_shape[1:])
    return float(2.5 * (sites / math.prod(decoder.image_shape)) ** 0.5)


def with_step_size(method: Method, decoder: MDEQDecoder) -> Method:
    """The method with the decoder's default step where it names none.

    Args:
        method: what fits the latents.
        decoder: the generator, see :func:`default_step_size`.
    """
    if method.step_size is not None:
        return method
    return replace(method, step_size=default_step_size(decoder))


class Encoder(nn.Module):
    """Image → a first guess of its latent: two strided convolutions and a linear layer.

    Args:
        image_shape: ``(channels, height, width)``, in pixels.
        latent_shape: of one latent.
        width: channels of the first convolution. The second has twice as many.
    """

    def __init__(
        self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...], width: int = 16
    ) -> None:
        super().__init__()
        colours, height, width_px = image_shape
        size = torch.Size(latent_shape).numel()
        flat = 2 * width * ((height + 3) // 4) * ((width_px + 3) // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(colours, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, size),
            nn.Unflatten(1, latent_shape),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Latents ``(rows, *latent_shape)``."""
        latents: Tensor = self.layers(images)
        return latents


class StepResult(NamedTuple):
    """What one step gives: the scalar to call ``backward`` on, and what it saw per image.

    Attributes:
        loss: scalar with a graph.
        latents: where the loop ended, ``(rows, *latent_shape)``.
        mse: squared error per pixel and channel, ``(rows,)``.
        z_residual: ``‖f(z) − z‖ / ‖f(z)‖`` there, ``(rows,)``.
        costate_residual: the same of the adjoint equation, ``(rows,)``.
        f_evals: evaluations of f, ``(rows,)``.
        vjps: vector-Jacobian products, ``(rows,)``.
    """

    loss: Tensor
    latents: Tensor
    mse: Tensor
    z_residual: Tensor
    costate_residual: Tensor
    f_evals: Tensor
    vjps: Tensor


class TrainingStep(nn.Module):
    """The step as a module, so that DistributedDataParallel can wrap it as a whole.

    ``loss = mean ℓ(w*) / pixels + weight · jacobian_penalty [+ mean ‖encoder(y) − w*‖²]``. The
    joint loop ended at w*. By the envelope theorem it is held constant.

    Args:
        decoder: the generator.
        encoder: makes the first guess, and learns to. None: ``start`` does.
        config: iterations, penalties.
        method: what fits the latents. None: :class:`Joint` with the config's iterations. Without a
            step size it takes :func:`default_step_size`.
    """

    def __init__(
        self,
        decoder: MDEQDecoder,
        encoder: Encoder | None,
        config: TrainConfig,
        method: Method | None = None,
    ) -> None:
        super().__init__()
        self.model, self.encoder = WithLatent(decoder), encoder
        joint = Joint(max_iter=config.iterations, warmup=config.warmup, step_size=config.step_size)
        self.method = with_step_size(method or joint, decoder)
        self.latent_penalty = config.latent_penalty
        self.jacobian_weight = config.jacobian_weight
        self.refine = config.refine

    @property
    def decoder(self) -> MDEQDecoder:
        """The generator."""
        decoder: MDEQDecoder = self.model.decoder  # type: ignore[assignment]
        return decoder

    def forward(self, images: Tensor, start: Tensor, generator: torch.Generator) -> StepResult:
        """One training step, up to ``backward``.

        Args:
            images: y, ``(rows, c, h, w)`` in [0, 1].
            start: latents to start from, ``(rows, *latent_shape)``. Unused with an encoder.
            generator: source of the Jacobian penalty's probes.
        """
        objective = SquaredError(images, self.latent_penalty)
        # under autocast the guess comes in half precision, the latents stay in float32
        guess = None if self.encoder is None else self.encoder(images).float()
        start = start if guess is None else guess.detach()
        solution = joint_solution(self.model, start, objective, method=self.method)
        loss = envelope_loss(self.model, solution, objective, refine=self.refine)
        loss = loss / images[0].numel()
        if self.jacobian_weight:
            cell = self.decoder.equilibrium.cell
            injection = self.decoder.injection(solution.x)
            penalty = jacobian_penalty(cell, solution.z, *injection, generator=generator)
            loss = loss + self.jacobian_weight * penalty
        if guess is not None:
            loss = loss + (guess - solution.x).square().flatten(1).sum(1).mean()
        # the loss that the loop ended with holds the prior, the error that is reported does not
        prior = self.latent_penalty * solution.x.square().flatten(1).sum(1)
        return StepResult(
            loss,
            solution.x,
            (solution.loss - prior) / images[0].numel(),
            solution.z_residual,
            solution.costate_residual,
            solution.f_evals,
            solution.vjps,
        )
