"""The variational problem in a generator's latents, as an objective of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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
STIFFER = 10  # a sensing matrix of a quarter of the measurements is, at most


class Place(NamedTuple):
    """Constants of each row, flat: ``w = mean + std · ξ``, and c, see :class:`Latents`.

    Attributes:
        mean: where the latents lie, ``(rows, latent)``, or one row for all.
        std: how far they spread, likewise.
        c: scale of what is added to the image, ``(rows, 1)``. None: nothing is added.
    """

    mean: Tensor
    std: Tensor
    c: Tensor | None = None

    def latents(self, xi: Tensor) -> Tensor:
        """The w that ξ ``(rows, latent)`` stands for."""
        return self.mean + self.std * xi

    def given(self, rows: int) -> tuple[Tensor, ...]:
        """For so many rows, as the engine hands it on to the model."""
        return tuple(t.expand(rows, -1) for t in self if t is not None)


class Latents(nn.Module):
    """Image, latent and what the image adds to the generator's, all flat: ``v -> (x, ξ, δ)``.

    v is ξ, with the latent ``w = mean + std · ξ`` (:class:`Place`). Without a place, w is ξ. Where
    the place has a c, v is ``(ξ, δ/c)`` and ``x = G(w) + δ``. That c brings the curvature in δ/c to
    1. One flat tensor is what the engine can evaluate row by row, and :meth:`split` takes it apart.

    Args:
        generator: G, latents ``(rows, *latent_shape)`` → images.
        latent_shape: shape of one latent.
    """

    def __init__(self, generator: nn.Module, latent_shape: Sequence[int]) -> None:
        super().__init__()
        self.generator, self.latent_shape = generator, tuple(latent_shape)
        self.size = torch.Size(latent_shape).numel()
        self.image_shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None

    def images(self, flat: Tensor) -> Tensor:
        """G of flat latents ``(rows, latent)``.

        Raises:
            TypeError: it returns no tensor.
        """
        images = self.generator(flat.unflatten(1, self.latent_shape))
        if not isinstance(images, Tensor):
            raise TypeError(
                f"the generator must return images, a tensor, got {type(images).__name__}"
            )
        self.image_shape, self.dtype = tuple(images.shape[1:]), images.dtype
        return images

    @torch.no_grad()
    def probe(self, place: Place, count: int) -> tuple[Tensor, Tensor]:
        """G at the means of a place, and what steps from there do to it.

        Args:
            place: where to start. Its mean is ``(rows, latent)``.
            count: number of random directions, always the same.

        Returns:
            Images ``(rows, *image_shape)``, and the largest ``(G(mean + std Δξ) − G(mean)) / ‖Δξ‖``
            of the steps Δξ, likewise. Its squared length is about the curvature of
            ``‖G(mean + std ξ) − x‖² / 2`` in ξ, which grows with the number of pixels. Δξ is larger
            where std is, as a step down the objective is.
        """
        draw = torch.Generator().manual_seed(0)
        steps = torch.randn(count, 1, self.size, generator=draw).to(place.mean) * place.std
        steps = RADIUS * nn.functional.normalize(steps, dim=2)
        # one pass of the generator for all of them, the means first
        steps = torch.cat([torch.zeros_like(steps[:1]), steps])
        rows = len(place.mean)
        images = self.images(place.latents(steps).flatten(0, 1)).unflatten(0, (-1, rows))
        change = (images[1:] - images[:1]) / RADIUS
        largest = change.abs().square().flatten(2).sum(2).argmax(0)
        return images[0], change[largest, torch.arange(rows, device=steps.device)]

    @property
    def pixels(self) -> int:
        """Real numbers of an image."""
        assert self.dtype is not None  # images() was called
        return torch.Size(self.image_shape).numel() * (1 + self.dtype.is_complex)

    def forward(self, v: Tensor, *given: Tensor) -> Tensor:
        """Image, ξ and δ side by side, ``(rows, pixels + latent + added pixels)``.

        Args:
            v: the optimised variable, ``(rows, latent)``, or ``(rows, latent + pixels)`` with a c.
            *given: tensors of a :class:`Place`, in its order. None: w is ξ.
        """
        xi, delta = v[:, : self.size], v[:, self.size :]
        place = Place(*given) if given else None
        image = _real(self.images(xi if place is None else place.latents(xi)))
        if place is None or place.c is None:
            return torch.cat([image, xi], dim=1)
        delta = delta * place.c
        return torch.cat([image + delta, xi, delta], dim=1)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, flat ξ and flat δ of what :meth:`forward` returned.

        δ has no columns where the image is the generator's.
        """
        rest = output.shape[1] - self.pixels - self.size
        image, xi, delta = output.split([self.pixels, self.size, rest], dim=1)
        if self.dtype is not None and self.dtype.is_complex:
            pairs = image.contiguous().reshape(-1, *self.image_shape, 2)
            return torch.view_as_complex(pairs).to(self.dtype), xi, delta
        return image.reshape(-1, *self.image_shape).to(self.dtype), xi, delta


def _real(images: Tensor) -> Tensor:
    """Flat and real, ``(batch, pixels)``."""
    return (torch.view_as_real(images) if images.is_complex() else images).flatten(1)


class Objective:
    """``ℓ = (data(x, y) + b prior(x) + λ/2 ‖ξ‖² + ρ/2 ‖δ‖²) / κ`` per sample.

    κ is about the curvature in ξ, so that one step size serves all operators, noise levels and
    generators. It moves no minimum. It is that of the data term along what the generator draws
    (:func:`curvature`) times the squared length of a step (:meth:`Latents.probe`), plus λ.

    Args:
        model: what makes ``(x, ξ, δ)``.
        y: measurements, as the physics makes them.
        physics: the forward model A.
        data: the data term. None: the likelihood of the physics' noise model.
        prior: an explicit prior, or None.
        prior_weight: b, not negative.
        latent_penalty: λ, not negative.
        range_penalty: ρ, not negative.

    Attributes:
        stiffness: curvature of the data term in x, ``(rows,)``.
        scale: κ, ``(rows,)``.
        reach: root mean square of the image, or of what a step on ξ does to it, ``(rows,)``.
        image: the image of the last call.
    """

    def __init__(
        self,
        model: Latents,
        y: Any,
        physics: Physics,
        data: DataFidelity | None,
        prior: Prior | None,
        prior_weight: float,
        latent_penalty: float,
        range_penalty: float,
    ) -> None:
        self.model = model
        self.y, self.physics, self.data, self.prior = y, physics, data, prior
        self.prior_weight, self.latent_penalty = prior_weight, latent_penalty
        self.range_penalty = range_penalty
        self.image: Tensor | None = None

    def measure(self, image: Tensor, change: Tensor, *, guessed: bool) -> None:
        """Take κ from what :meth:`Latents.probe` saw, and see that all fits.

        From zero, latents move the image as a whole. From a guess they move it anywhere, and first
        about down the data term's slope, along which a compressed sensing matrix is stiffest. That
        counts up to STIFFER times the other: Poisson noise has spikes at dark pixels.

        Args:
            image: where the latents start, ``(rows, *image_shape)``.
            change: what a step on ξ does to it, likewise.
            guessed: whether they start at an encoder's guess.

        Raises:
            ValueError: physics, y, data term and images that do not fit, or no slope to descend.
        """
        self.reach = torch.maximum(_mean_square(image), _mean_square(RADIUS * change)).sqrt()
        empty = (_mean_square(image) == 0).reshape(-1, *[1] * (image.ndim - 1))
        direction = change if guessed else torch.where(empty, change, image)
        made = self._measurements(image)
        if self.data is None:
            gain = entry_gain(self.physics, image, made, self._small(direction))
            self.data = likelihood_of(self.physics, gain)
        steepest = self._check_slope(image, change)
        self.stiffness = curvature(self.fidelity, image, self._small(direction))
        if guessed:
            flat = (_mean_square(steepest) == 0).reshape(-1, *[1] * (change.ndim - 1))
            steepest = torch.where(flat, change, steepest)
            along = curvature(self.fidelity, image, self._small(steepest))
            most = STIFFER * self.stiffness
            self.stiffness = torch.minimum(torch.maximum(self.stiffness, along), most)
        length = change.abs().square().flatten(1).sum(1)
        length = torch.where(length > 0, length, torch.ones_like(length))
        self.scale = self.stiffness * length + self.latent_penalty
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError(
                "the generator's image, or what a small step on its latents does to it, is not "
                f"finite or too large for {change.dtype} (its largest change is "
                f"{float(change.abs().max()):g}): its equilibrium layer does not converge there. "
                "See jiio_plugins.check"
            )

    def _small(self, direction: Tensor) -> Tensor:
        """A step in a direction, small against the image and what latents do to it."""
        size = _mean_square(direction).sqrt().clamp(min=torch.finfo(self.reach.dtype).tiny)
        h = (1e-2 * self.reach / size).to(direction.dtype)
        return direction * h.reshape(-1, *[1] * (direction.ndim - 1))

    def __call__(self, output: Tensor) -> Tensor:
        """ℓ, ``(rows,)``, of what the model returned."""
        image, xi, delta = self.model.split(output)
        self.image = image.detach()
        total = self.fidelity(image)
        if self.prior is not None:
            total = total + self.prior_weight * self._prior_value(image)
        total = total + 0.5 * self.latent_penalty * xi.square().sum(1)
        total = total + 0.5 * self.range_penalty * delta.square().sum(1)
        return (total / self.scale).to(xi.dtype)

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
        """The data term, ``(rows,)``."""
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
        """A(image). What does not fit is said here, before a deeper layer does."""
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

    def _check_slope(self, image: Tensor, change: Tensor) -> Tensor:
        """The data term's gradient at images. An error where it has none."""
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
        if not bool(found.any()) and self._hides_slope(image, change):
            raise ValueError(
                "the data term's gradient is zero at all images tried, though its value is not the "
                "same at all: the physics rounds, takes signs or else has no useful derivative, so "
                "that nothing can be fitted to y"
            )
        return found

    def _hides_slope(self, image: Tensor, change: Tensor) -> bool:
        """Whether the data term changes from image to image and has a gradient at none.

        A gradient that is zero at one image alone may be that of an optimum, or of a saturated
        generator, whose images are all alike. A physics that drops everything has none anywhere.
        """
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(change.shape, generator=draw, dtype=self.reach.dtype).to(change)
        reach = self.reach.reshape(-1, *[1] * (image.ndim - 1))
        away = noise * torch.where(reach > 0, reach, 1.0).to(image.dtype)
        tried = [image + RADIUS * step for step in (change, away, -away)]
        if any(bool(slope(self.fidelity, other).any()) for other in tried):
            return False
        with torch.no_grad():
            here = self.fidelity(image)
            changes = [self.fidelity(other) - here for other in tried]
        return any(bool((torch.isfinite(d) & (d != 0)).any()) for d in changes)


def _words(sizes: list[tuple[int, ...]]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else str(sizes)


def entry_gain(physics: Physics, image: Tensor, made: Any, step: Tensor) -> Any:
    """How large an entry of A(x) becomes where one of x is 1, at most 1, see ``likelihood_of``.

    It is a ratio of two root mean squares: that of ``A(image + step) − A(image)``, where it is not
    zero (a mask leaves the others as they are), and that of the step. It is not above 1: where a
    physics lengthens images, y is as exact as its noise model says.

    Args:
        physics: the forward model A.
        image: ``(rows, *image_shape)``.
        made: ``A(image)``.
        step: a small one, likewise.

    Returns:
        ``(rows,)``, or for stacked physics a list of them.
    """
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


def slope(function: Any, image: Tensor) -> Tensor:
    """The gradient of a function of images at some of them.

    Args:
        function: images → ``(rows,)``.
        image: ``(rows, *image_shape)``.
    """
    with torch.enable_grad():
        leaf = image.clone().requires_grad_()
        gradient: Tensor = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    return gradient.detach()


def curvature(function: Any, image: Tensor, step: Tensor) -> Tensor:
    """``|dᵀ ∂² d| / dᵀd`` of a function of images along small steps d, ``(rows,)``.

    The steps stand for those in which latents move the image: a compressed sensing matrix lengthens
    its own row space tenfold, and what a generator draws hardly at all. ∂² is the second
    derivative, taken as a difference of two gradients at ``image ± d``. No f is evaluated.

    Args:
        function: images → ``(rows,)``.
        image: ``(rows, *image_shape)``.
        step: d, likewise.

    Returns:
        The curvature, 1 where it is zero or not finite.
    """
    change = slope(function, image + step) - slope(function, image - step)
    inner = (change.conj() * step).real if image.is_complex() else change * step
    ratio = inner.flatten(1).mean(1).abs() / (2 * _mean_square(step))
    usable = torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio, torch.ones_like(ratio))
