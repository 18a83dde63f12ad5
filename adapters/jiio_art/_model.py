"""The classifier as the engine wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import Tensor, nn

from jiio_plugins.losses import logits_of

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier

    from jiio_plugins.losses import Output


class RawInput(nn.Module):
    """Logits as a function of the raw image: ART's preprocessing, then the user's model.

    So ε is in the units of the image, whatever the preprocessing does to it.

    Args:
        classifier: whose preprocessing and model.
        keep_wrapper: call the DistributedDataParallel around the model, if there is one.
        output: which of the model's outputs the logits are, see
            :func:`jiio_plugins.losses.logits_of`.
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        *,
        keep_wrapper: bool = False,
        output: Output = None,
    ) -> None:
        super().__init__()
        self.output = output
        model = classifier.model
        if isinstance(model, nn.parallel.DistributedDataParallel) and not keep_wrapper:
            model = model.module  # the loop makes no parameter gradients
        self.model = model
        self.classifier = classifier
        # ART puts a standardisation by 0 and 1 into every classifier, and it does nothing
        self.preprocess = not all(map(_does_nothing, classifier.preprocessing_operations))

    def forward(self, x: Tensor) -> Any:
        """Images ``(rows, *input_shape)`` -> logits ``(rows, classes)``.

        Raises:
            NotImplementedError: the preprocessing makes several images of one.
        """
        seen = x
        if self.preprocess:
            seen, _ = self.classifier._apply_preprocessing(x, y=None, fit=False, no_grad=False)
            if len(seen) != len(x):
                raise NotImplementedError(
                    f"the classifier's preprocessing turned {len(x)} images into {len(seen)}, as "
                    "expectation over transformation does: JIIO needs one state per image. Use "
                    "nb_samples=1, or attack the classifier without that preprocessing"
                )
        return logits_of(self.model(seen), self.output)


def _does_nothing(step: object) -> bool:
    return isinstance(step, StandardisationMeanStdPyTorch) and bool(
        (step.mean == 0).all() and (step.std == 1).all()
    )
