"""The classifier as the engine wants it, and the state of it that a call must not change."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import Tensor, nn

from jiio_plugins.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Iterator

    from art.estimators.classification import PyTorchClassifier

    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Callback, Path, Stop


class RawInput(nn.Module):
    """Logits as a function of the raw image: ART's preprocessing, then the user's model.

    So ε is in the units of the image, whatever the preprocessing does to it.

    Attributes:
        autocast: run the model in this precision; None: as it is.
    """

    def __init__(self, classifier: PyTorchClassifier, *, keep_wrapper: bool = False) -> None:
        super().__init__()
        model = classifier.model
        if isinstance(model, nn.parallel.DistributedDataParallel) and not keep_wrapper:
            model = model.module  # the loop makes no parameter gradients
        self.model = model
        self.classifier = classifier
        self.autocast: torch.dtype | None = None
        # ART puts a standardisation by 0 and 1 into every classifier; it does nothing
        self.preprocess = not all(map(_does_nothing, classifier.preprocessing_operations))

    def forward(self, x: Tensor) -> Any:
        """Images ``(n, *input_shape)`` -> logits ``(n, classes)``."""
        seen = x
        if self.preprocess:
            seen, _ = self.classifier._apply_preprocessing(x, y=None, fit=False, no_grad=False)
            if len(seen) != len(x):
                raise NotImplementedError(
                    f"the classifier's preprocessing turned {len(x)} images into {len(seen)}, as "
                    "expectation over transformation does: JIIO needs one state per image. Use "
                    "nb_samples=1, or attack the classifier without that preprocessing"
                )
        if self.autocast is None:
            return self.model(seen)
        with torch.autocast(x.device.type, dtype=self.autocast):
            logits = self.model(seen)
        return logits.float() if isinstance(logits, Tensor) else logits


def _does_nothing(step: object) -> bool:
    return isinstance(step, StandardisationMeanStdPyTorch) and bool(
        (step.mean == 0).all() and (step.std == 1).all()
    )


@dataclass(frozen=True, kw_only=True)
class Autocast(Method):
    """``inner`` with the model in a lower precision.

    Only the loop: the engine's verification comes after it, and tells what the classifier does in
    its own precision.
    """

    inner: Method
    module: RawInput
    dtype: torch.dtype

    def restrict(self, rows: Tensor) -> Self:
        """See :class:`Method`; the steps are those of ``inner``."""
        return replace(self, inner=self.inner.restrict(rows))

    def run(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        v: Tensor,
        stop: Stop | None = None,
        callback: Callback | None = None,
    ) -> Path:
        """See :class:`Method`."""
        self.module.autocast = self.dtype
        try:
            return self.inner.run(problem, feasible, v, stop, callback)
        finally:
            self.module.autocast = None


@contextmanager
def undisturbed(classifier: PyTorchClassifier) -> Iterator[None]:
    """Put back train/eval flags and global random states, which ART's own calls change."""
    flags = [(module, module.training) for module in classifier._model.modules()]
    numpy_state = np.random.get_state()  # noqa: NPY002 (the global state is what is kept)
    device = classifier.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, training in flags:
            module.training = training
