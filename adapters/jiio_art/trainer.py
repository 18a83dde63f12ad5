"""Adversarial training inside ART, with the joint iteration as the adversary."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from art.config import ART_NUMPY_DTYPE
from art.defences.trainer.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from jiio_art import _inputs
from jiio_art._model import RawInput
from jiio_art._params import check_count, check_trainable
from jiio_art.attack import JIIOAttack
from jiio_plugins.adversarial import (
    TRAINING_METHOD,
    AdversarialTraining,
    FitSettings,
    TensorBatches,
    fit_adversarially,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt
    from art.data_generators import DataGenerator

    from jiio_plugins.adversarial import Batches, Metrics, StepInterval
    from jiio_plugins.methods import Method

logger = logging.getLogger(__name__)


class JIIOAdversarialTrainer(Trainer):
    """Adversarial training of a deep equilibrium classifier.

    ``min_θ mean_i max_{‖x − x_i‖_p ≤ ε} L(model_θ(x), y_i)``

    A step solves for the adversarial examples, the state and its adjoint in one iteration, and
    takes the gradient of the parameters from where that iteration ended. Attacks of ART would solve
    the model's fixed point anew at each of their steps. Norm, ε, first step, iterations, method,
    random starts and autocast are those of ``attack``. ``restart_every`` has a method of its own.
    Preprocessing of the classifier is applied as in ``predict``.

    Args:
        classifier: a :class:`PyTorchClassifier` with an optimiser, ``nn.CrossEntropyLoss`` and a
            model that holds a :class:`jiio_plugins.Equilibrium` layer and returns logits. Trained
            in place.
        attack: a :class:`JIIOAttack` on this classifier, untargeted. Where it names neither method
            nor max_iter, the training takes 7 iterations instead of the attack's 30: a hard example
            is enough, it need not be the worst.
        ratio: share of each batch that is attacked, in (0, 1]. The rest stays clean.
        trades: β of the TRADES loss ``L(model(x_i), y_i) + β max KL(p(x_i) ‖ p(x))``. None: off.
        refine: steps on the state and the adjoint before the gradient, warm-started: one number, or
            a pair of them.
        restart_every: epochs from one search that starts at the images to the next. In between each
            takes up the example where the last one for the same image ended, and is short. For
            arrays (:meth:`fit`). Epochs count within one call of ``fit``. 1: every epoch.
        carried: method of the searches in between. None: that of
            :meth:`jiio_plugins.adversarial.AdversarialTraining.carried`.
        jacobian_weight: of the Jacobian penalty at a random iterate of the search. It keeps the
            cell easy to solve while it is trained. None: a cell whose ρ² stays below 0.4 is left
            alone, see :class:`jiio_plugins.adversarial.AdversarialTraining`. 0 switches it off, for
            a cell that stays so by itself. Others lose their fixed point.
        max_grad_norm: clip the gradient's norm. None: do not.
        scheduler_interval: "epoch", as ART's trainers do, or "step".
        patience: stop after so many epochs without a better robust accuracy on the validation data,
            and put the best weights back. None: train to the end.
        checkpoint: file written after every epoch. A training that was killed goes on from it.
            None: no file is.
        checkpoint_every: and after so many steps.
        resume: go on from ``checkpoint`` where it exists. Without it an existing file is an error.
        judged: images of each epoch that are judged by solves, see
            :class:`jiio_plugins.adversarial.FitSettings`. They make what is shown as clean and
            robust accuracy, and the early warnings. 0: none are.
        seed: of the order of the images, random starts and the penalty.
        verbose: show a progress bar with loss, residual of z, accuracies as the steps see them, and
            as judged.

    Attributes:
        history: one dict per epoch of the last :meth:`fit`, see
            :func:`jiio_plugins.adversarial.fit_adversarially`.

    Raises:
        TypeError, ValueError: bad parameters. The message says what is accepted.
        NotImplementedError: a targeted attack.

    Not for: models without a fixed point, which ART's own trainers handle.

    Example:
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> classifier = PyTorchClassifier(
        ...     model, loss, (1, 8, 8), 10, optimizer=optimizer, clip_values=(0, 1)
        ... )
        >>> attack = JIIOAttack(classifier, norm=2, eps=0.3)
        >>> trainer = JIIOAdversarialTrainer(classifier, attack, verbose=False)
        >>> trainer.fit(x.numpy(), y.numpy(), nb_epochs=3)
        >>> [epoch["seen_robust"] for epoch in trainer.history]
        [0.75, 1.0, 1.0]

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.3.
    """

    _classifier: PyTorchClassifier

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attack: JIIOAttack,
        *,
        ratio: float = 1.0,
        trades: float | None = None,
        refine: int | tuple[int, int] = 0,
        restart_every: int = 1,
        carried: Method | None = None,
        jacobian_weight: float | None = None,
        max_grad_norm: float | None = None,
        scheduler_interval: StepInterval = "epoch",
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        judged: int = 128,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise TypeError(
                f"classifier must be a PyTorchClassifier, got {type(classifier).__name__}"
            )
        super().__init__(classifier=classifier)
        self.attack = attack
        self.ratio, self.trades, self.refine = ratio, trades, refine
        self.restart_every, self.carried = restart_every, carried
        self.jacobian_weight = jacobian_weight
        self.max_grad_norm, self.scheduler_interval = max_grad_norm, scheduler_interval
        self.patience = patience
        self.checkpoint, self.checkpoint_every, self.resume = checkpoint, checkpoint_every, resume
        self.judged, self.seed, self.verbose = judged, seed, verbose
        self.history: list[Metrics] = []
        check_count("restart_every", restart_every, 1)
        check_count("judged", judged, 0)
        if carried is not None and restart_every == 1:
            raise ValueError("carried= is of the searches between restarts: set restart_every")
        self._training()  # its errors now

    def fit(
        self,
        x: npt.NDArray[Any],
        y: npt.NDArray[Any],
        validation_data: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Train on arrays.

        Args:
            x: images ``(rows, *input_shape)`` within the classifier's clip values.
            y: true classes, one-hot ``(rows, classes)`` or indices ``(rows,)``.
            validation_data: ``(x, y)`` of the same kinds, judged after each epoch. None: nothing
                is.
            batch_size: images a step.
            nb_epochs: of the whole training. A resumed one counts those before it.
            scheduler: any of torch's, built for the classifier's optimiser. None: the rate stays.
            **kwargs: ``drop_last``: leave out an incomplete last batch.

        Raises:
            TypeError, ValueError: bad input, an unknown keyword, or a checkpoint of another
                training. Nothing is changed then.
        """
        drop_last = kwargs.pop("drop_last", False)
        images, labels = self.tensors(x, y)
        batches = TensorBatches(images, labels, batch_size, seed=self.seed, drop_last=drop_last)
        self._fit(batches, validation_data, batch_size, nb_epochs, scheduler, kwargs)

    def fit_generator(
        self,
        generator: DataGenerator,
        nb_epochs: int = 20,
        scheduler: Any = None,
        validation_data: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Train on the batches of one of ART's data generators.

        An epoch is ``ceil(size / batch_size)`` batches. A resumed training draws and drops the
        batches before, so it is exact if a new generator yields the same batches again.

        Args:
            generator: ART's. It must know its size.
            nb_epochs: of the whole training. A resumed one counts those before it.
            scheduler: any of torch's, built for the classifier's optimiser. None: the rate stays.
            validation_data: ``(x, y)`` as :meth:`fit` takes it. None: nothing is judged.
            **kwargs: none.

        Raises:
            TypeError, ValueError: bad input, ``restart_every`` above 1, or a checkpoint of another
                training.
        """
        if self.restart_every > 1:
            raise ValueError(
                "a generator does not tell which images a batch holds, and restart_every needs to "
                "know: use fit(x, y), or restart_every=1"
            )
        if generator.size is None:
            raise ValueError("the generator must know its size: give it size=")
        batches = _GeneratorBatches(self, generator)
        self._fit(batches, validation_data, generator.batch_size, nb_epochs, scheduler, kwargs)

    def predict(self, x: npt.NDArray[Any], **kwargs: Any) -> npt.NDArray[np.float32]:
        """The trained classifier's logits, ``(rows, classes)``.

        Args:
            x: images ``(rows, *input_shape)``.
            **kwargs: of the classifier's ``predict``.
        """
        logits: npt.NDArray[np.float32] = self._classifier.predict(x, **kwargs)
        return logits

    def _fit(
        self,
        batches: Batches,
        validation_data: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
        batch_size: int,
        nb_epochs: int,
        scheduler: Any,
        unknown: dict[str, Any],
    ) -> None:
        if unknown:
            raise TypeError(f"unknown keywords: {', '.join(unknown)}")
        if self._classifier.optimizer is None:
            raise ValueError(
                "the classifier has no optimizer: PyTorchClassifier(..., optimizer=...)"
            )
        module = RawInput(self._classifier)
        training = self._training()
        carried = None
        if self.restart_every > 1:
            carried = training.carried()
            carried = replace(carried, method=self._cast(self.carried or carried.method))
        settings = FitSettings(
            epochs=nb_epochs,
            validation_batch=batch_size,
            restart_every=self.restart_every,
            carried=carried,
            scheduler_interval=self.scheduler_interval,
            max_grad_norm=self.max_grad_norm,
            patience=self.patience,
            checkpoint=self.checkpoint,
            checkpoint_every=self.checkpoint_every,
            resume=self.resume,
            judged=self.judged,
            seed=self.seed,
            verbose=self.verbose,
        )
        logger.info("Adversarial training with %r", self.attack)
        self.history = fit_adversarially(
            module,
            training,
            self._classifier.optimizer,
            batches,
            settings,
            validation=None if validation_data is None else self.tensors(*validation_data),
            scheduler=scheduler,
            wrapped=RawInput(self._classifier, keep_wrapper=True),
        )

    def _training(self) -> AdversarialTraining:
        """The engine's step, from what the attack says now."""
        attack = self.attack
        if not isinstance(attack, JIIOAttack):
            raise TypeError(
                "attack must be a JIIOAttack (ART's AdversarialTrainer takes others), got "
                f"{type(attack).__name__}"
            )
        check_trainable(self._classifier, attack)
        method: Method = attack.method or TRAINING_METHOD
        if attack.max_iter is not None:
            method = replace(method, max_iter=attack.max_iter)
        if attack.eps_step is not None and attack.eps > 0:
            method = replace(method, step_size=float(attack.eps_step / attack.eps))
        method = self._cast(method)
        clip = self._classifier.clip_values
        lower, upper = (None, None) if clip is None else clip
        return AdversarialTraining(
            norm=float(attack.norm),
            eps=float(attack.eps),
            lower=self._bound(lower),
            upper=self._bound(upper),
            method=method,
            random_start=attack.num_random_init > 0,
            ratio=self.ratio,
            trades=self.trades,
            refine=self.refine,
            jacobian_weight=self.jacobian_weight,
            loss=RowLoss(self._classifier.loss),
        )

    def _cast(self, method: Method) -> Method:
        """The method, in the attack's autocast if it has one."""
        return replace(method, precision=self.attack.autocast or method.precision)

    def _bound(self, value: Any) -> float | Tensor | None:
        if value is None or np.ndim(value) == 0:
            return None if value is None else float(value)
        return torch.tensor(np.asarray(value, dtype=ART_NUMPY_DTYPE), device=self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._classifier.device
        return device

    def tensors(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Images and class indices, checked, on the classifier's device.

        Args:
            x: images, an array ``(rows, *input_shape)``.
            y: true classes, one-hot ``(rows, classes)`` or indices ``(rows,)``.

        Raises:
            ValueError: bad input, or no images.
        """
        classifier = self._classifier
        images = _inputs.as_images(x, classifier)
        if not images.ndim or not len(images):
            raise ValueError(f"x holds no images, its shape is {images.shape}")
        labels = _inputs.class_indices(y, len(images), classifier.nb_classes)
        # a copy: training must not see what the caller does to the arrays meanwhile
        return torch.tensor(images, device=self._device), torch.tensor(labels, device=self._device)


class RowLoss:
    """Cross-entropy per image, whose plain mean over a batch is the classifier's own loss.

    ``reduction="mean"`` divides by the sum of the class weights of the images that are not ignored,
    ``"sum"`` by nothing.
    """

    def __init__(self, criterion: nn.Module) -> None:
        assert isinstance(criterion, nn.CrossEntropyLoss)  # as check_trainable has seen to
        self.criterion = criterion
        self._rows = copy.copy(criterion)
        self._rows.reduction = "none"

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image, ``(rows,)``.

        Args:
            output: logits, ``(rows, classes)``.
            labels: classes, integers ``(rows,)``.
        """
        rows: Tensor = self._rows(output, labels)
        own = self.criterion
        if own.reduction == "sum":
            return rows * len(rows)
        counted = labels != own.ignore_index
        if own.weight is None:
            total = counted.sum()
        else:
            total = own.weight[labels.where(counted, 0)][counted].sum()
        return rows * (len(rows) / total)

    def __repr__(self) -> str:
        own = self.criterion
        weight = None if own.weight is None else own.weight.tolist()
        return (
            f"CrossEntropyLoss({weight=}, ignore_index={own.ignore_index}, "
            f"reduction={own.reduction!r}, label_smoothing={own.label_smoothing})"
        )


class _GeneratorBatches:
    """One of ART's data generators as the engine's batches."""

    def __init__(self, trainer: JIIOAdversarialTrainer, generator: DataGenerator) -> None:
        self.trainer, self.generator = trainer, generator

    def __len__(self) -> int:
        assert self.generator.size is not None
        return math.ceil(self.generator.size / self.generator.batch_size)

    def skip(self, batches: int) -> None:
        """Draw and drop them: a resumed training has seen them."""
        for _ in range(batches):
            self.generator.get_batch()

    def epoch(self, index: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The next batches. What to skip has been dropped by then."""
        for _ in range(len(self) - skip):
            yield self.trainer.tensors(*self.generator.get_batch())
