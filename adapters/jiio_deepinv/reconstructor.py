"""Reconstruction with a DEQ generator, in deepinv's words. The work is done by the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from deepinv.models import Reconstructor
from torch import Tensor, nn

from jiio_deepinv._checks import (
    check_guess,
    check_keywords,
    check_latents,
    check_measurements,
    check_modules,
    check_physics,
    check_truth,
    check_usable,
    check_weights,
    latent_shape_of,
    parts,
    usable,
    usable_physics,
)
from jiio_deepinv._objective import PROBES, PROBES_EACH, Latents, Objective, Place
from jiio_deepinv.likelihoods import per_sample
from jiio_deepinv.metrics import Metrics
from jiio_plugins import count_evaluations
from jiio_plugins.equilibrium import Anderson, check_solver, full_precision
from jiio_plugins.joint import guarded
from jiio_plugins.methods import Joint, check_method
from jiio_plugins.optimize import optimize_input

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deepinv.optim import DataFidelity, Prior
    from deepinv.physics import Physics
    from deepinv.utils import TensorList

    from jiio_plugins.equilibrium import Solver
    from jiio_plugins.methods import Method
    from jiio_plugins.solution import Solution

    Init = Tensor | Callable[[Any, Physics], Tensor]

_DEFAULTS = (60, 1.0, 1e-4)  # of iters, step_size and tol


class JIIOReconstructor(Reconstructor):
    """``x̂ = G(w*)``, ``w* = argmin_w  data(G(w), y) + b prior(G(w)) + λ/2 ‖(w − m)/s‖²``, jointly.

    G is a generator with an equilibrium layer. Its state, the adjoint and w advance in one
    iteration (:class:`jiio_plugins.Joint`), each sample by itself.

    With gradients on, x̂ is a differentiable function of everything that requires grad (generator,
    y, physics, data fidelity, prior). This is implicit differentiation of the joint fixed point, so
    memory does not depend on ``iters``. Its residuals are in ``solution.stats.implicit``. There is
    a warning where they are above 1e-3 or, if that is more, ten times ``implicit.tol`` (but always
    above 0.5).

    Args:
        generator: a module with a :class:`jiio_plugins.Equilibrium` that maps latents
            ``(rows, *latent_shape)`` to images ``(rows, *image_shape)``, real or complex.
        data_fidelity: the data term, a ``deepinv.optim.DataFidelity``. None: minus the
            log-likelihood of the physics' noise model (:func:`jiio_deepinv.likelihood_of`).
        prior: a ``deepinv.optim.Prior`` with a value (an explicit one), or None.
        prior_weight: b.
        latent_penalty: λ, against the data term as it is: with a likelihood, 1 is a standard normal
            prior on w.
        range_penalty: ρ. With it the image may leave the generator's range, ``x̂ = G(w*) + δ*``
            where ``ρ/2 ‖δ‖²`` is minimised along. None: it may not.
        latent_shape: of one latent, d or a shape. None: ``generator.latent_shape``.
        encoder: a module that guesses the latents. ``encoder(y, physics)`` returns m, or (m, s)
            with how far off it may be, see :class:`jiio_deepinv.GaussianEncoder`. w starts at m and
            moves in units of s. The encoder is trained along. None: m is 0. Without s it is 1.
        init: where w starts instead, ``(rows, *latent_shape)`` or ``init(y, physics)``. It gets no
            gradient. None: m.
        iters: steps on w.
        step_size: in units of the inverse curvature in ``(w − m)/s``, which is estimated per sample
            from the physics, the likelihood and the generator's gain. A step too long is halved as
            often as needed, per sample.
        tol: relative residual of state, adjoint and w at which a sample is finished.
        method: another :class:`jiio_plugins.Joint` or :class:`jiio_plugins.Nested` in place of
            ``iters``, ``step_size`` and ``tol``.
        implicit: solver that refines the solution and solves the equation of its gradient. None: as
            exact as the dtype allows. ``Anderson(max_iter=8, memory=8, tol=0.1)`` makes training
            several times cheaper.

    Shape:
        y as the physics makes it, real, complex or a TensorList, batch first → ``(rows, C, ...)``.

    Raises:
        TypeError, ValueError: bad settings, at once. What does not fit together, when called.

    Not for: priors without a value (plug-and-play denoisers), physics without a derivative.

    Example:
        >>> from deepinv.physics import GaussianNoise, Inpainting
        >>> from jiio_plugins.models import load_pretrained
        >>> physics = Inpainting((1, 8, 8), mask=0.5, noise_model=GaussianNoise(0.1))
        >>> model = JIIOReconstructor(load_pretrained("digits-generator"))
        >>> y = physics(x)
        >>> with torch.no_grad():
        ...     x_hat = model(y, physics)
        >>> (y - x).square().mean(), (x_hat - x).square().mean()
        (tensor(0.07), tensor(0.02))
        >>> print(model.solution.report())
        4 × CONVERGED: ...

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.1.
    """

    def __init__(
        self,
        generator: nn.Module,
        *,
        data_fidelity: DataFidelity | None = None,
        prior: Prior | None = None,
        prior_weight: float = 1.0,
        latent_penalty: float = 1.0,
        range_penalty: float | None = None,
        latent_shape: int | Sequence[int] | None = None,
        encoder: nn.Module | None = None,
        init: Init | None = None,
        iters: int = 60,
        step_size: float = 1.0,
        tol: float = 1e-4,
        method: Method | None = None,
        implicit: Solver | None = None,
    ) -> None:
        super().__init__()
        check_modules(generator, encoder, data_fidelity, prior)
        check_solver(implicit, "implicit")
        check_weights(
            prior_weight=prior_weight,
            latent_penalty=latent_penalty,
            range_penalty=range_penalty or 0.0,
        )
        if prior is None and prior_weight != 1:
            raise ValueError(f"prior_weight is of a prior: give prior= too, got {prior_weight}")
        if method is not None and (iters, step_size, tol) != _DEFAULTS:
            raise ValueError(
                "method= is in place of iters, step_size and tol: give them to it, as in "
                "Joint(max_iter=…, step_size=…, tol=…)"
            )
        self.generator = generator
        self.data_fidelity = None if data_fidelity is None else per_sample(data_fidelity)
        self.prior, self.prior_weight = prior, prior_weight
        self.latent_penalty, self.range_penalty = latent_penalty, range_penalty
        self.latent_shape = latent_shape_of(generator, latent_shape)
        self.encoder, self.init = encoder, init
        default = Joint(max_iter=iters, step_size=step_size, tol=tol)
        self.method = check_method(method) if method is not None else default
        self.implicit = implicit
        self._solution: Solution | None = None
        self._latents: Tensor | None = None

    @property
    def solution(self) -> Solution | None:
        """The last call as the engine saw it: f evaluations, VJPs, residuals, status per sample.

        ``value`` is the minimised sum. ``x`` holds the variable as it was optimised, flat:
        ξ = ``(w − m)/s``, then with ``range_penalty`` δ, scaled. None before the first call and
        after one that failed.
        """
        return self._solution

    @property
    def latents(self) -> Tensor | None:
        """The w of the last call, ``(rows, *latent_shape)``: a start for one on like images."""
        return self._latents

    def forward(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        init: Init | None = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The reconstruction, and with ``compute_metrics`` deepinv's dictionary of metrics.

        Args:
            y: measurements, batch first.
            physics: their forward model A.
            init: where w starts, see the class. None: as the class has it.
            x_gt: true images, shaped like the reconstruction, for the metric "psnr".
            compute_metrics: also return ``{"residual", "cost", "psnr": list[rows][iteration]}``.
            **kwargs: what deepinv's wrappers pass to every model, not used. A setting of the class
                among them is an error.

        Returns:
            Images ``(rows, *image_shape)``, with ``compute_metrics`` in a pair with the dictionary.

        Raises:
            TypeError, ValueError: bad measurements or physics, or what does not fit together.
        """
        self._solution = self._latents = None
        check_measurements(y)
        check_physics(physics)
        check_keywords(kwargs, JIIOReconstructor)
        if compute_metrics:
            check_truth(x_gt, len(parts(y)[0]))
        check_usable(self.generator)
        gradients = torch.is_grad_enabled()  # leaving inference mode would turn them on
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            y, physics = usable(y), usable_physics(physics)
            metrics = Metrics(x_gt) if compute_metrics else None
            image = self._reconstruct(y, physics, init, metrics)
        return image if metrics is None else (image, metrics.finish(image.detach()))

    def _reconstruct(
        self, y: Any, physics: Physics, init: Init | None, metrics: Metrics | None
    ) -> Tensor:
        start, place = self._start(y, physics, init)
        exact: bool | Solver = True if self.implicit is None else self.implicit
        differentiable = torch.is_grad_enabled() and exact
        with full_precision(start.device.type), guarded(self.generator, freeze=False):
            model = Latents(self.generator, self.latent_shape)
            objective = Objective(
                model,
                y,
                physics,
                self.data_fidelity,
                self.prior,
                self.prior_weight,
                self.latent_penalty,
                self.range_penalty or 0.0,
            )
            v = start.flatten(1)
            # at zero one row stands for the whole batch, and more steps can be tried
            zero = Place(torch.zeros_like(v[:1]), torch.ones_like(v[:1]))
            with count_evaluations() as probing:
                image, change = model.probe(place or zero, PROBES_EACH if place else PROBES)
            whole = (len(v), *image.shape[1:])
            image, change = image.expand(whole).contiguous(), change.expand(whole).contiguous()
            objective.measure(image, change, guessed=place is not None)
            if self.range_penalty is not None:
                ratio = (objective.stiffness + self.range_penalty) / objective.scale
                place = (place or zero)._replace(c=ratio.detach().rsqrt().to(v.dtype)[:, None])
                v = torch.cat([v, v.new_zeros(len(v), model.pixels)], dim=1)
            given = () if place is None else place.given(len(v))
            solution = optimize_input(
                model,
                v,
                objective,
                given=given,
                method=self.method,
                differentiable=differentiable,
                verify=self._verifier(bool(differentiable)),
                callback=None if metrics is None else metrics.watch(objective),
            )
            assert isinstance(solution.x, Tensor)
            v = solution.x
            live = any(t.requires_grad for t in (v, *given)) and torch.is_grad_enabled()
            image, _, _ = model.split(model(v, *given) if live else solution.output.detach())
            xi = v[:, : model.size].detach()
            latents = xi if place is None else place.latents(xi).detach()
            self._latents = latents.reshape(start.shape)
        assert solution.value is not None
        assert solution.stats.model_value is not None
        scale = objective.scale.to(solution.value.dtype)
        self._solution = replace(
            solution,
            x=v.detach(),
            value=solution.value * scale.detach(),
            stats=replace(
                solution.stats,
                f_evals=solution.stats.f_evals + probing.f_evals / len(v),
                model_value=solution.stats.model_value * scale.detach(),
            ),
        )
        return image

    def _verifier(self, differentiable: bool) -> Solver | None:
        """The engine's own, but no closer than a loose gradient is worth."""
        if not differentiable or self.implicit is None:
            return None
        return Anderson(max_iter=100, tol=self.implicit.tol / 10)

    def _start(self, y: Any, physics: Physics, init: Init | None) -> tuple[Tensor, Place | None]:
        """Where the variable starts, ``(rows, *latent_shape)``, and m and s with their graphs.

        None in place of the two stands for 0 and 1.
        """
        wanted = (len(parts(y)[0]), *self.latent_shape)
        like = next(self.generator.parameters(), parts(y)[0].real)
        place: Place | None = None
        start = like.new_zeros(wanted).detach()
        if self.encoder is not None:
            mean, std = check_guess(self.encoder(y, physics), wanted)
            place = Place(mean.to(like).flatten(1), std.to(like).flatten(1))
        chosen = init if init is not None else self.init
        if chosen is not None:
            with torch.no_grad():
                w = chosen if isinstance(chosen, Tensor) else chosen(y, physics)
                start = check_latents(w, wanted, "init").detach().clone().to(like)
                if place is not None:
                    away = (start.flatten(1) - place.mean) / place.std
                    start = away.detach().reshape(wanted)
        return start, place
