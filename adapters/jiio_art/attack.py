"""JIIO as an evasion attack of ART: its words translated for :func:`jiio_plugins.attack`."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from art.estimators.pytorch import PyTorchEstimator
from torch import Tensor
from tqdm.auto import tqdm

from jiio_art import _inputs
from jiio_art._model import RawInput
from jiio_art._params import check_params
from jiio_art.record import AttackRecord
from jiio_plugins import Joint, attack
from jiio_plugins.joint import guarded
from jiio_plugins.losses import check_logits
from jiio_plugins.solution import doubtful_rows

if TYPE_CHECKING:
    import numpy.typing as npt
    from art.estimators.classification import PyTorchClassifier
    from art.summary_writer import SummaryWriter

    from jiio_plugins.equilibrium import Solver
    from jiio_plugins.losses import Loss, Output
    from jiio_plugins.methods import Callback, Method, Progress

logger = logging.getLogger(__name__)


class JIIOAttack(EvasionAttack):
    """Attack a deep equilibrium classifier by joint inference and input optimisation.

    ``max_x L(h(z*), y)  s.t.  z* = f(z*, x),  ‖x − x₀‖_p ≤ ε,  x within clip_values``

    The state z, its adjoint μ and x advance together. ART's own attacks solve for the first two at
    every step. The model inside the classifier has a :class:`jiio_plugins.Equilibrium` layer and
    returns logits. ε and clip values hold for the images as :meth:`generate` gets them, before any
    preprocessing of the classifier. A call changes nothing of the classifier's and no global random
    state.

    Args:
        estimator: a :class:`PyTorchClassifier`, on CPU or CUDA. Of its preprocessing only steps
            written in PyTorch are supported.
        norm: 1, 2, ``np.inf`` or "inf".
        eps: ε in the units of the images, a number or an array: ``(rows,)`` or ``(rows, 1, …)`` for
            one value per sample. With the L∞ norm also anything else that broadcasts to the images.
        eps_step: first step in the units of the images. Later ones are shorter, down to 0.8 /
            max_iter of it. Same kind and shape as eps. None: the method's own, a multiple of ε.
        max_iter: steps on x. None: the method's own.
        targeted: move towards ``y`` instead of away from it.
        num_random_init: 0: start at the image. k: up to k random starts in the ball, the best kept
            per sample.
        batch_size: images that are worked on together.
        random_eps: draw each sample's ε from a normal distribution of mean 0 and deviation ε/2,
            truncated to [0, ε] (Kurakin et al., 2017). eps_step shrinks with it.
        loss: "cross-entropy", "dlr" or "margin".
        early_stop: stop a sample once it has been adversarial for four evaluations in a row.
        method: a :class:`jiio_plugins.Joint` or :class:`jiio_plugins.Nested`. None: ``Joint()``.
        retry: a longer method of the same kinds, run once more from x on the samples that have not
            succeeded. Its own step sizes hold. ``max_iter`` and ``eps_step`` are ``method``'s.
            None: there is no second run.
        verify: solver of the final check. None or True: the engine's own. False: leave it out, as
            fits where the images are judged anyway. It is needed by several starts and a retry.
        autocast: precision in which the loop runs the model, ``torch.bfloat16`` say. The
            perturbation stays in float32, and the result is verified without it. None: as the model
            is.
        seed: of the random starts and random ε. A call with the same arguments gives the same
            result.
        summary_writer: as in ART: True, a folder, or a ``SummaryWriter``. It is updated at every
            step.
        verbose: show a progress bar over batches.
        output: where the model returns more than logits: which of it they are, a key, an attribute,
            an index or a function. None: what is called ``logits``, or the first. (ART's own
            ``predict`` takes no such model.)

    Attributes:
        solution: an :class:`AttackRecord` of the last :meth:`generate`: success, costs, residuals
            and status per sample. None before the first call and after one that raised.

    Raises:
        EstimatorError: the estimator is not a PyTorch classifier.
        TypeError, ValueError: bad parameters. The message says what is accepted.
        NotImplementedError: preprocessing that is not written in PyTorch.

    Not for: models without a fixed point, which ART's own attacks handle.

    Example:
        >>> from art.estimators.classification import PyTorchClassifier
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> classifier = PyTorchClassifier(model, loss, (1, 8, 8), 10, clip_values=(0, 1))
        >>> attack = JIIOAttack(classifier, norm=2, eps=0.3, verbose=False)
        >>> x_adv = attack.generate(x.numpy(), y.numpy())
        >>> attack.solution.success
        array([ True, False, False, False])

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.3.
    """

    attack_params = [  # noqa: RUF012 (ART's own attacks declare theirs like this)
        *EvasionAttack.attack_params,
        "norm",
        "eps",
        "eps_step",
        "max_iter",
        "targeted",
        "num_random_init",
        "batch_size",
        "random_eps",
        "loss",
        "early_stop",
        "method",
        "retry",
        "verify",
        "autocast",
        "seed",
        "verbose",
        "output",
    ]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassifierMixin, PyTorchEstimator)

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: int | float | str = np.inf,
        eps: int | float | npt.NDArray[Any] = 0.3,
        eps_step: int | float | npt.NDArray[Any] | None = None,
        *,
        max_iter: int | None = None,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        random_eps: bool = False,
        loss: Loss = "cross-entropy",
        early_stop: bool = False,
        method: Method | None = None,
        retry: Method | None = None,
        verify: bool | Solver | None = None,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        summary_writer: str | bool | SummaryWriter = False,
        verbose: bool = True,
        output: Output = None,
    ) -> None:
        super().__init__(estimator=estimator, summary_writer=summary_writer)
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.max_iter = max_iter
        self._targeted = targeted
        self.num_random_init = num_random_init
        self.batch_size = batch_size
        self.random_eps = random_eps
        self.loss = loss
        self.early_stop = early_stop
        self.method = method
        self.retry = retry
        self.verify = verify
        self.autocast = autocast
        self.seed = seed
        self.verbose = verbose
        self.output = output
        self.solution: AttackRecord | None = None
        self._check_params()

    def generate(
        self, x: npt.NDArray[Any], y: npt.NDArray[Any] | None = None, **kwargs: Any
    ) -> npt.NDArray[np.float32]:
        """Adversarial examples for some images.

        Args:
            x: images ``(rows, *input_shape)`` within the classifier's clip values, of any real
                type.
            y: true classes, or with ``targeted`` the wanted ones: one-hot ``(rows, classes)`` or
                indices ``(rows,)``. None: the classifier's own predictions.
            **kwargs: ``mask``: bool or non-negative floats that broadcast to x. Pixels where it is
                zero keep their value.

        Returns:
            A new float32 array of the shape of x. A sample for which nothing better was found comes
            back as it started. Where the status of some says that they are not to be relied on, the
            log has a warning with their number and what to do.

        Raises:
            TypeError: another keyword.
            ValueError: bad input, or a model without an equilibrium layer. The message says how to
                add one.
        """
        self.solution = None
        unknown = kwargs.keys() - {"mask"}
        if unknown:
            raise TypeError(f"generate takes x, y and mask, got {', '.join(sorted(unknown))} too")
        self._check_params()  # attributes may have been set since
        images = _inputs.as_images(x, self.estimator)
        if not len(images):
            self.solution = AttackRecord.join([])
            return images.copy()
        region = _inputs.Region.of(
            images,
            norm=float(self.norm),
            eps=self.eps,
            eps_step=self.eps_step,
            scale=self._random_scale(len(images)),
            clip_values=self.estimator.clip_values,
            mask=kwargs.get("mask"),
        )
        adversarial = np.empty_like(images)
        records = []
        with guarded(self.estimator._model, evaluate=False, freeze=False, randomness=True):
            labels = self._labels(images, y)
            starts = range(0, len(images), self.batch_size)
            bar = tqdm(starts, desc="JIIO - Batches", leave=False, disable=not self.verbose)
            for batch_id, start in enumerate(bar):
                rows = slice(start, start + self.batch_size)
                adversarial[rows], record = self._batch(
                    batch_id, images[rows], labels[rows], region.batch(rows)
                )
                records.append(record)
        self.solution = AttackRecord.join(records)
        if self.verify is not False:
            logger.info("Success rate of attack: %.2f%%", 100 * self.solution.success.mean())
        if doubt := doubtful_rows(torch.from_numpy(self.solution.status)):
            logger.warning(doubt)
        if self.summary_writer is not None:
            self.summary_writer.reset()
        return adversarial

    def _labels(self, x: npt.NDArray[np.float32], y: Any) -> npt.NDArray[np.int64]:
        if y is not None:
            return _inputs.class_indices(y, len(x), self.estimator.nb_classes)
        if self.targeted:
            raise ValueError("a targeted attack needs the wanted classes: generate(x, y=targets)")
        model, own = RawInput(self.estimator, output=self.output), []
        model.eval()
        with torch.no_grad():
            for start in range(0, len(x), self.batch_size):
                images = torch.tensor(x[start : start + self.batch_size])
                logits = check_logits(model(images.to(self.estimator.device)), len(images))
                own.append(logits.argmax(1).cpu().numpy())
        return np.concatenate(own)

    def _batch(
        self,
        batch_id: int,
        x: npt.NDArray[np.float32],
        y: npt.NDArray[np.int64],
        region: _inputs.Region,
    ) -> tuple[npt.NDArray[np.float32], AttackRecord]:
        device = self.estimator.device

        def tensor(array: npt.NDArray[Any] | None) -> Tensor | None:
            return None if array is None else torch.tensor(np.ascontiguousarray(array)).to(device)

        module = RawInput(self.estimator, output=self.output)
        method = self.method or Joint()
        if self.max_iter is not None:
            method = replace(method, max_iter=self.max_iter)
        if region.step is not None:
            method = replace(method, step_size=tensor(region.step))
        retry = self.retry
        if self.autocast is not None:
            method = replace(method, precision=self.autocast)
            retry = None if retry is None else replace(retry, precision=self.autocast)
        # seeded per batch, so that a batch does not depend on how many restarts another one needed
        seed = np.random.SeedSequence([self.seed, batch_id]).generate_state(1, np.uint64)[0]
        images, labels = torch.tensor(x, device=device), torch.tensor(y, device=device)
        radius = torch.tensor(region.radius, dtype=images.dtype, device=device)
        solution = attack(
            module,
            images,
            labels,
            norm=float(self.norm),
            eps=radius,
            loss=self.loss,
            targeted=self.targeted,
            lower=tensor(region.lower),
            upper=tensor(region.upper),
            mask=tensor(region.mask),
            random_starts=self.num_random_init,
            generator=torch.Generator(device).manual_seed(int(seed)),
            early_stop=self.early_stop,
            method=method,
            retry=retry,
            verify=self.verify,
            callback=self._summary(batch_id, x.shape, y),
        )
        assert isinstance(solution.x, Tensor)
        return solution.x.cpu().numpy(), AttackRecord.of(solution, labels, self.targeted)

    def _random_scale(self, rows: int) -> npt.NDArray[np.float64] | None:
        """Factors of ε: half a normal variable, truncated to [0, 1]."""
        if not self.random_eps:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.empty(rows, dtype=torch.float64)
        torch.nn.init.trunc_normal_(draws, 0.0, 0.5, 0.0, 1.0, generator=generator)
        return draws.numpy()

    def _summary(
        self, batch_id: int, shape: tuple[int, ...], y: npt.NDArray[np.int64]
    ) -> Callback | None:
        """What keeps ART's summary writer informed. Restarts go on counting steps."""
        writer = self.summary_writer
        if writer is None:
            return None
        one_hot = np.eye(self.estimator.nb_classes, dtype=np.float32)[y]
        steps = itertools.count()

        def update(progress: Progress) -> None:
            writer.update(
                batch_id=batch_id,
                global_step=next(steps),
                # ART's sign: uphill for the attacker
                grad=-progress.gradient.reshape(shape).cpu().numpy(),
                patch=None,
                estimator=self.estimator,
                x=progress.v.reshape(shape).cpu().numpy(),
                y=one_hot,
                targeted=self.targeted,
            )

        return update

    def _check_params(self) -> None:
        super()._check_params()
        check_params(self)
