"""JIIO in torchattacks' words. The work is done by :func:`jiio_plugins.attack`."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from jiio_plugins.attacks import attack
from jiio_plugins.equilibrium import check_solver
from jiio_plugins.joint import guarded
from jiio_plugins.losses import check_logits, check_output, logits_of, too_few_classes
from jiio_plugins.methods import Joint, Method
from jiio_plugins.solution import ConvergenceWarning, doubtful_rows
from jiio_plugins.utils import is_count

if TYPE_CHECKING:
    from jiio_plugins.equilibrium import Solver
    from jiio_plugins.losses import Loss, Output
    from jiio_plugins.solution import Solution

NORMS = {"L2": 2.0, "Linf": math.inf}
DEFAULT_EPS = {"L2": 1.0, "Linf": 8 / 255}  # those of torchattacks' PGDL2 and PGD
LOSSES: dict[str, Loss] = {
    "ce": "cross-entropy",  # torchattacks' name of it
    "cross-entropy": "cross-entropy",
    "dlr": "dlr",
    "margin": "margin",
}
ROUNDING = 1e-5  # what normalising an image and back may add to a pixel, with room to spare


class JIIO(Attack):
    """Joint inference and input optimisation, for models with an equilibrium layer.

    ``max_x L(model(x), y)  s.t.  ‖x − x₀‖ ≤ ε, 0 ≤ x ≤ 1``. The equilibrium state z, its adjoint μ
    and x advance together. A step costs an evaluation or two of the cell and one vector-Jacobian
    product, where PGD solves two fixed points.

    A call changes nothing but :attr:`solution`, nor does one that fails: no train/eval flag,
    ``.grad``, ``requires_grad`` or buffer, nor the state of the global random generators.

    Args:
        model: returns logits ``(rows, classes)``. It has a :class:`jiio_plugins.Equilibrium` layer.
        norm: "L2" or "Linf".
        eps: ε, in the units of images in [0, 1]. None: 1.0 for L2, 8/255 for Linf.
        steps: steps on x. None: as many as ``method`` says, 30 unless you give one.
        loss: "ce" (or "cross-entropy"), "dlr" or "margin".
        random_starts: 0: start at the images. k: up to k random starts, the best kept per image.
        early_stop: finish an image once it has been adversarial for four steps in a row.
        seed: of the random starts, which every call repeats, and of the labels that
            ``set_mode_targeted_random`` draws, which go on from call to call.
        method: :class:`jiio_plugins.Joint` (default) with settings of your own, or
            :class:`jiio_plugins.Nested`, the loop that JIIO replaces.
        retry: a longer method of the same kinds, run once more from the images on those that have
            not succeeded. ``steps`` is ``method``'s. None: there is no second run.
        verify: solver of the final check. None or True: the engine's own. False: leave it out, as
            fits where the images are judged anyway. It is needed by several starts and a retry.
        output: where the model returns more than logits: which of it they are, a key, an attribute,
            an index or a function. None: what is called ``logits``, or the first.

    Shape:
        - images ``(rows, C, H, W)`` in [0, 1], or normalised after ``set_normalization_used``. They
          are float32 or float64, as the model is.
        - labels ``(rows,)`` integers. None: what the model predicts.
        - output: like the images, inside ball and box.

    Raises:
        TypeError, ValueError: bad settings, at once. Bad images or labels, when called.

    Not for: models without an equilibrium layer, which torchattacks' own attacks serve.

    Example:
        >>> atk = JIIO(model, norm="L2", eps=0.3)
        >>> adversarial = atk(x, y)
        >>> model(adversarial).argmax(1) == y
        tensor([False,  True,  True,  True])
        >>> print(atk.solution.report())
        4 × CONVERGED: ...

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.3.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "L2",
        eps: float | None = None,
        steps: int | None = None,
        loss: str = "ce",
        random_starts: int = 0,
        early_stop: bool = False,
        seed: int = 0,
        method: Method | None = None,
        retry: Method | None = None,
        verify: bool | Solver | None = None,
        output: Output = None,
    ) -> None:
        super().__init__("JIIO", model)
        self.supported_mode = ["default", "targeted"]
        self.norm = norm
        self.eps = DEFAULT_EPS.get(str(norm), 0.0) if eps is None else eps
        self.steps = steps
        self.loss = loss
        self.random_starts = random_starts
        self.early_stop = early_stop
        self.seed = seed
        self.method = method
        self.retry = retry
        self.verify = verify
        self.output = output
        self._target_generator = torch.Generator().manual_seed(seed)
        self._solution: Solution | None = None
        self._check_settings()

    def __setattr__(self, name: str, value: Any) -> None:
        """As the base class, which looks for attacks inside of what is set.

        It does so by a function that refers to itself, a circle that keeps what was set alive until
        the garbage collector comes.
        """
        if isinstance(value, (Attack, list, dict)):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)

    @property
    def solution(self) -> Solution | None:
        """The last call as the engine saw it: cell evaluations, VJPs, residuals, status per image.

        None before the first call and after one that failed. ``solution.x`` is in [0, 1] even where
        the images are normalised. In a MultiAttack it holds the images left for this attack.
        """
        return self._solution

    def set_model(self, model: nn.Module) -> None:
        """Attack another model from now on.

        Args:
            model: as the class takes it.

        Raises:
            TypeError: it is no module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be an nn.Module with a jiio_plugins.Equilibrium layer, got {model!r}"
            )
        super().set_model(model)

    def __call__(
        self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Adversarial images, as the class says.

        Args:
            inputs: images ``(rows, C, H, W)``, in [0, 1] or normalised.
            labels: classes, integers ``(rows,)``. None: what the model predicts.
            *args: of the base class.
            **kwargs: of the base class.

        Warns:
            ConvergenceWarning: images whose status says that they are not to be relied on, once a
                call, with how many there are of each status and what to do.
        """
        self._solution = None
        # The base class restores neither a frozen BatchNorm nor anything after an exception.
        normalization = self._normalization_applied
        try:
            with guarded(self.model, evaluate=False, freeze=False):
                adversarial: Tensor = super().__call__(inputs, labels, *args, **kwargs)
        finally:
            self._set_normalization_applied(normalization)
        assert self.solution is not None
        if doubt := doubtful_rows(self.solution.status):
            warnings.warn(doubt, ConvergenceWarning, stacklevel=2)
        return adversarial

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images, like those given.

        Args:
            images: ``(rows, C, H, W)`` in [0, 1].
            labels: classes, integers ``(rows,)``. None: what the model predicts.

        Raises:
            TypeError, ValueError: bad images or labels, or settings changed to bad ones.
        """
        self._check_settings()
        self._check_images(images)
        images = images.detach().to(self.device)
        if self._normalization_applied is False:
            clipped = images.clamp(0, 1)
            images = torch.where((images - clipped).abs() <= ROUNDING, clipped, images)
        method = self.method if self.method is not None else Joint()
        self._solution = attack(
            _Classifier(self),
            images,
            self._goal(images, labels),
            norm=NORMS[self.norm],
            eps=self.eps,
            loss=LOSSES[self.loss],
            targeted=self.targeted,
            lower=0.0,
            upper=1.0,
            random_starts=self.random_starts,
            generator=torch.Generator(images.device).manual_seed(self.seed),
            early_stop=self.early_stop,
            training_mode=self._model_training,
            method=method if self.steps is None else replace(method, max_iter=self.steps),
            retry=self.retry,
            verify=self.verify,
        )
        adversarial = self._solution.x
        assert isinstance(adversarial, Tensor)
        return adversarial

    def _goal(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The classes to leave or, in a targeted mode, to reach."""
        if labels is None:
            if self.attack_mode == "targeted(label)":
                raise ValueError("set_mode_targeted_by_label needs the target labels, got None")
            labels = self._logits(images).argmax(1)
        _check_labels("labels", labels, images)
        labels = labels.detach().to(self.device)
        if self.targeted and len(images):
            labels = self.get_target_label(images, labels)
            _check_labels("target labels", labels, images)
        return labels.to(self.device)

    def _logits(self, images: Tensor) -> Tensor:
        """The model's, ``(rows, classes)``.

        Raises:
            ValueError: it returns something else, or fewer than two.
        """
        logits = check_logits(self.get_output_with_eval_nograd(images), len(images))
        problem = too_few_classes("cross-entropy", logits.shape[1])
        if problem:
            raise ValueError(problem)
        return logits

    def get_logits(
        self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's logits, as the base class has them, by ``output``.

        Args:
            inputs: images ``(rows, C, H, W)`` in [0, 1].
            labels: not used.
            *args: of the base class.
            **kwargs: of the base class.
        """
        return logits_of(super().get_logits(inputs, labels, *args, **kwargs), self.output)

    # The base class draws random targets from the global generator, and looks for both kinds of
    # target image by image, which makes the host wait for an accelerator each time.

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """A random class for each image, other than its label, ``(rows,)``.

        Args:
            inputs: images ``(rows, C, H, W)``.
            labels: classes, integers ``(rows,)``. None: what the model predicts.

        Raises:
            ValueError: labels out of range.
        """
        logits = self._logits(inputs)
        scores = torch.rand(logits.shape, generator=self._target_generator).to(logits.device)
        return _smallest_but(logits.argmax(1) if labels is None else labels, scores, 1)

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The class of ``kth_min``-th smallest probability but for the label, ``(rows,)``.

        Args:
            inputs: images ``(rows, C, H, W)``.
            labels: classes, integers ``(rows,)``. None: what the model predicts.

        Raises:
            ValueError: labels out of range, or ``kth_min``.
        """
        logits = self._logits(inputs)
        return _smallest_but(logits.argmax(1) if labels is None else labels, logits, self._kth_min)

    def normalize(self, inputs: Tensor) -> Tensor:
        """Images from [0, 1] to what the model expects, in their dtype.

        Raises:
            ValueError: another number of channels than mean and std have.
        """
        self._check_channels(inputs)
        normalized: Tensor = super().normalize(inputs)
        return normalized.to(inputs.dtype)

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        """Images from what the model expects to [0, 1], in their dtype.

        Raises:
            TypeError, ValueError: bad images, or another number of channels than mean and std have.
        """
        self._check_images(inputs)
        self._check_channels(inputs)
        images: Tensor = super().inverse_normalize(inputs)
        return images.to(inputs.dtype)

    def _check_settings(self) -> None:
        """At the construction and at every call: attributes may have been set in between."""
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        eps: object = self.eps
        if not isinstance(eps, Real):
            raise TypeError(f"eps must be a number, the same for all images, got {eps!r}")
        if not 0 <= float(eps) < math.inf:
            raise ValueError(f"eps must be a finite number, not negative, got {eps}")
        if self.steps is not None and not is_count(self.steps, 1):
            raise ValueError(f"steps must be at least 1, got {self.steps!r}")
        if not is_count(self.random_starts, 0):
            raise ValueError(
                f"random_starts must be an integer, not negative, got {self.random_starts!r}"
            )
        for name in ("method", "retry"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Method):
                raise TypeError(f"{name} must be Joint(...) or Nested(...), got {value!r}")
        check_output(self.output)
        if not isinstance(self.verify, bool):
            check_solver(self.verify, "verify")

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], got {images.dtype}: convert integers "
                "with images.float() / 255"
            )
        if images.ndim < 2:
            raise ValueError(
                f"images must be batch first, (batch, ...), got shape {tuple(images.shape)}"
            )
        dtypes = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        dtype = next(dtypes, images.dtype)
        if images.dtype != dtype:
            raise TypeError(
                f"the images are {images.dtype} and the model's parameters {dtype}: convert one of "
                f"them, with images.to({dtype}) or model.to({images.dtype})"
            )
        finite = torch.isfinite(images)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            raise ValueError(f"images hold NaN or Inf (first in image {first}): clean the input")

    def _check_channels(self, images: Tensor) -> None:
        assert self.normalization_used is not None
        channels = self.normalization_used["mean"].shape[1]
        if images.ndim != 4 or channels not in (1, images.shape[1]):
            raise ValueError(
                f"set_normalization_used was given a mean of {channels} channels, for images of "
                f"shape (N, {channels}, H, W), got {tuple(images.shape)}"
            )


class _Classifier(nn.Module):
    """The attacked model as a function of images in [0, 1], which returns its logits alone."""

    def __init__(self, attack: JIIO) -> None:
        super().__init__()
        parallel = isinstance(attack.model, nn.parallel.DistributedDataParallel)
        self.model = attack.model.module if parallel else attack.model
        self.normalize = attack.normalize if attack._normalization_applied is False else None
        self.output = attack.output

    def forward(self, images: Tensor) -> Any:
        seen = images if self.normalize is None else self.normalize(images)
        return logits_of(self.model(seen), self.output)


def _check_labels(name: str, labels: Tensor, images: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor of classes, got {type(labels).__name__}")
    integers = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.shape != images.shape[:1] or not integers:
        raise (ValueError if integers else TypeError)(
            f"{name} must be integers, one class per image, shape ({len(images)},), got "
            f"{labels.dtype} {tuple(labels.shape)}"
        )


def _smallest_but(labels: Tensor, scores: Tensor, k: int) -> Tensor:
    """The class of k-th smallest score among all but the label, ``(rows,)``."""
    classes = scores.shape[1]
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"labels must be in 0 … {classes - 1} (the model has {classes} classes), "
            f"got {int(labels.min())} … {int(labels.max())}"
        )
    if not 1 <= k < classes:
        raise ValueError(f"kth_min must be in 1 … {classes - 1} with {classes} classes, got {k}")
    others = scores.scatter(1, labels.long()[:, None], torch.inf)
    return others.kthvalue(k, dim=1).indices
