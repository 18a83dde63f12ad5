"""The variational problem in a generator's latents, as an objective of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_deepinv._checks import parts, shapes
from jiio_deepinv.likelihoods import likelihood_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepinv.optim import DataFidelity, Prior
    from deepinv.physics import Physics

PROBES, RADIUS = 8, 0.5  # directions in which the generator's gain is measured, and how far
PROBES_EACH = 2  # of them where every sample has a place of its own


class Latents(nn.Module):
    """Image, latent and what the image adds to the generator's, all flat: ``v -> (x, u, r)``.

    v is the flat latent u; after :meth:`open_range` it is ``(u, r/c, c)`` with ``x = G(u) + r``,
    where c is a constant of each row that brings the curvature in r/c to 1. One flat tensor is what
    the engine can evaluate row by row; :meth:`split` takes it apart.
    """

    def __init__(self, generator: nn.Module, latent_shape: Sequence[int]) -> None:
        super().__init__()
        self.generator, self.latent_shape = generator, tuple(latent_shape)
        self.size = torch.Size(latent_shape).numel()
        self.image_shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None

    def images(self, flat: Tensor) -> Tensor:
        """G of flat latents."""
        images = self.generator(flat.unflatten(1, self.latent_shape))
        if not isinstance(images, Tensor):
            raise TypeError(
                f"the generator must return images, a tensor, got {type(images).__name__}"
            )
        self.image_shape, self.dtype = tuple(images.shape[1:]), images.dtype
        return images

    @torch.no_grad()
    def probe(self, at: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """G at flat latents ``(rows, latent)``, and what steps there do to it.

        Returns:
            Images ``(rows, *image_shape)``; and of ``count`` random directions, always the same,
            the largest ``(G(u + δ) − G(u)) / ‖δ‖``, likewise. Its squared length is about the
            curvature of ``‖G(u) − x‖² / 2``, which grows with the number of pixels.
        """
        draw = torch.Generator().manual_seed(0)
        delta = RADIUS * nn.functional.normalize(torch.randn(count, self.size, generator=draw))
        delta = torch.cat([torch.zeros_like(delta[:1]), delta]).to(at)
        images = self.images((at + delta[:, None]).flatten(0, 1)).unflatten(0, (-1, len(at)))
        change = (images[1:] - images[:1]) / RADIUS
        largest = change.abs().square().flatten(2).sum(2).argmax(0)
        return images[0], change[largest, torch.arange(len(at), device=at.device)]

    def open_range(self, flat: Tensor, ratio: Tensor) -> Tensor:
        """The v of these latents and r = 0; ``ratio``: curvature in r over s, ``(batch,)``."""
        assert self.dtype is not None
        pixels = torch.Size(self.image_shape).numel() * (1 + self.dtype.is_complex)
        c = ratio.rsqrt().to(flat.dtype)
        return torch.cat([flat, flat.new_zeros(len(flat), pixels), c[:, None]], dim=1)

    def forward(self, v: Tensor) -> Tensor:
        """``(rows, pixels + latent + added pixels)``."""
        flat, rest = v[:, : self.size], v[:, self.size :]
        image = _real(self.images(flat))
        if not rest.shape[1]:
            return torch.cat([image, flat], dim=1)
        r = rest[:, :-1] * rest[:, -1:].detach()
        return torch.cat([image + r, flat, r], dim=1)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, flat u and flat r, which has no columns where the image is the generator's."""
        assert self.dtype is not None
        pixels = torch.Size(self.image_shape).numel() * (1 + self.dtype.is_complex)
        image, u, r = output.split([pixels, self.size, output.shape[1] - pixels - self.size], dim=1)
        if self.dtype.is_complex:
            pairs = image.contiguous().reshape(-1, *self.image_shape, 2)
            return torch.view_as_complex(pairs).to(self.dtype), u, r
        return image.reshape(-1, *self.image_shape).to(self.dtype), u, r


def _real(images: Tensor) -> Tensor:
    """Flat and real, ``(batch, pixels)``."""
    return (torch.view_as_real(images) if images.is_complex() else images).flatten(1)


class Objective:
    """``(data(x, y) + w prior(x) + λ/2 ‖u − m‖² + ρ/2 ‖r‖²) / s`` per sample.

    s is about the curvature in u, so that one step size serves all operators, noise levels and
    generators; it moves no minimum. It is that of the data term along what the generator draws
    (:func:`curvature`) times the squared length of a step (:meth:`Latents.probe`), plus λ.

    Attributes:
        centre: m, ``(batch, latent)``, where it is not zero.
        stiffness: curvature of the data term in x, ``(batch,)``.
        scale: s, ``(batch,)``.
        image: the image of the last call.
    """

    def __init__(
        self, model: Latents, y: Any, physics: Physics, data: DataFidelity | None,
        prior: Prior | None, prior_weight: float, latent_penalty: float, range_penalty: float,
        centre: Tensor | None,
    ) -> None:  # fmt: skip
        self.model = model
        self.y, self.physics, self.data, self.prior = y, physics, data, prior
        self.prior_weight, self.latent_penalty = prior_weight, latent_penalty
        self.range_penalty, self.centre = range_penalty, centre
        self.image: Tensor | None = None

    def measure(self, image: Tensor, change: Tensor, direction: Tensor) -> None:
        """Take s from what :meth:`Latents.probe` saw; raise where all does not fit."""
        made = self._measurements(image)
        if self.data is None:
            gain = entry_gain(self.physics, image, made, direction)
            self.data = likelihood_of(self.physics, gain)
        self._check_slope(image, change)
        self.stiffness = curvature(self.fidelity, image, direction)
        length = change.abs().square().flatten(1).sum(1)
        length = torch.where(length > 0, length, torch.ones_like(length))
        self.scale = self.stiffness * length + self.latent_penalty

    def __call__(self, output: Tensor) -> Tensor:
        """``(batch,)``."""
        image, u, r = self.model.split(output)
        self.image = image.detach()
        total = self.fidelity(image)
        if self.prior is not None:
            total = total + self.prior_weight * self._prior_value(image)
        away = u if self.centre is None else u - self.centre
        total = total + 0.5 * self.latent_penalty * away.square().sum(1)
        total = total + 0.5 * self.range_penalty * r.square().sum(1)
        return (total / self.scale).to(u.dtype)

    def _prior_value(self, image: Tensor) -> Tensor:
        assert self.prior is not None
        value = self.prior(image)
        if not isinstance(value, Tensor) or value.shape[:1] != (len(image),):
            got = getattr(value, "shape", type(value).__name__)
            raise ValueError(
                f"prior(x) must return one value per sample, shape ({len(image)},), got {got}"
            )
        return value.reshape(len(image), -1).sum(1)

    def fidelity(self, image: Tensor) -> Tensor:
        """The data term, ``(batch,)``."""
        assert self.data is not None  # measure() was called
        value = self.data(image, self.y, self.physics)
        if not isinstance(value, Tensor) or value.shape != (len(image),):
            got = getattr(value, "shape", type(value).__name__)
            raise ValueError(
                f"data_fidelity(x, y, physics) must return one value per sample, shape "
                f"({len(image)},), got {got}"
            )
        return value

    def _measurements(self, image: Tensor) -> Any:
        """A(image); what does not fit is said here, before a deeper layer does."""
        expected = getattr(self.physics, "img_size", None)
        shape = tuple(image.shape[1:])
        try:
            with torch.no_grad():
                made = self.physics.A(image)
        except Exception as error:
            wants = "" if expected is None else f"; the physics' img_size is {tuple(expected)}"
            raise ValueError(
                f"the physics does not take the generator's images, shape (batch, "
                f"{', '.join(map(str, shape))}) and {image.dtype}{wants}: {error}"
            ) from error
        ours, theirs = shapes(made), shapes(self.y)
        if ours != theirs:
            raise ValueError(
                f"y does not fit physics and generator: physics.A of the generator's images "
                f"{tuple(image.shape)} has shape {_words(ours)}, y has {_words(theirs)}"
            )
        return made

    def _check_slope(self, image: Tensor, change: Tensor) -> None:
        """Raise unless the data term has a gradient at images."""
        try:
            found = slope(self.fidelity, image)
        except RuntimeError as error:
            if "nference tensor" in str(error):
                raise ValueError(
                    "the physics or the data fidelity holds tensors made in inference mode, which "
                    f"no gradient passes: make them outside of it. torch says {error}"
                ) from error
            raise ValueError(
                "the physics has no differentiable forward (or the data fidelity has none): "
                f"torch says {error}"
            ) from error
        except (AttributeError, TypeError, IndexError) as error:
            raise ValueError(
                f"data_fidelity, a {type(self.data).__name__}, does not take what the physics "
                f"makes, {_words(shapes(self.y))}: {type(error).__name__}: {error}. Stacked "
                "physics need a StackedPhysicsDataFidelity"
            ) from error
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                "the data term's gradient at the generator's first image is NaN or Inf: the "
                "physics or the data fidelity is not differentiable there, or y is not in its range"
            )
        # zero at one image alone may be a minimum
        if not bool(found.any()) and not bool(slope(self.fidelity, image + RADIUS * change).any()):
            raise ValueError(
                "the data term's gradient is zero at all images tried: the physics rounds, takes "
                "signs or else has no useful derivative, so that nothing can be fitted to y"
            )


def _words(sizes: list[tuple[int, ...]]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else str(sizes)


def entry_gain(physics: Physics, image: Tensor, made: Any, direction: Tensor) -> Any:
    """How large an entry of A(x) becomes where one of x is 1, at most 1; see ``likelihood_of``.

    The ratio of the root mean squares of ``A(image + h d) − A(image)``, where that is not zero (a
    mask leaves the others as they are), and of ``h d``, ``(batch,)``; for stacked physics a list of
    them. Not above 1: where a physics lengthens images, y is as exact as its noise model says.
    """
    step = _reach(image, direction)
    with torch.no_grad():
        moved = physics.A(image + step)
    size = _mean_square(step)
    changes = [after - before for after, before in zip(parts(moved), parts(made), strict=True)]
    gains = [
        (_mean_square(d) / (d != 0).flatten(1).to(size.dtype).mean(1) / size).sqrt().clamp(max=1)
        for d in changes
    ]
    # a physics that does not see this step says nothing of the others
    gains = [torch.where(gain > 0, gain, torch.ones_like(gain)) for gain in gains]
    return gains[0] if len(gains) == 1 else gains


def _mean_square(t: Tensor) -> Tensor:
    return t.abs().square().flatten(1).mean(1)


def _reach(image: Tensor, direction: Tensor) -> Tensor:
    """A step in a direction, small against the image: ``(batch, ...)``."""
    h = (1e-2 * (_mean_square(image) / _mean_square(direction)).sqrt()).to(direction.dtype)
    return direction * h.reshape(-1, *[1] * (direction.ndim - 1))


def slope(function: Any, image: Tensor) -> Tensor:
    """The gradient of a function of images, ``(batch,)``, at these."""
    with torch.enable_grad():
        leaf = image.clone().requires_grad_()
        gradient: Tensor = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    return gradient.detach()


def curvature(function: Any, image: Tensor, direction: Tensor) -> Tensor:
    """``|dᵀ H d| / dᵀd`` of a function of images along directions d, ``(batch,)``.

    The directions stand for those in which latents move the image: a compressed sensing matrix
    lengthens its own row space tenfold, and what a generator draws hardly at all. H is the second
    derivative, taken as a difference of two gradients at ``image ± h d``: it costs no evaluation
    of f.
    """
    step = _reach(image, direction)
    change = slope(function, image + step) - slope(function, image - step)
    inner = (change.conj() * step).real if image.is_complex() else change * step
    ratio = inner.flatten(1).mean(1).abs() / (2 * _mean_square(step))
    usable = torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio, torch.ones_like(ratio))
