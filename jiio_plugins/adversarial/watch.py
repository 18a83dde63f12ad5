"""What is said early when a training and the judged sample of it differ.

Where the cell loses its fixed point, what the steps see and what the model answers have nothing to
do with each other any more, and the loss goes down all the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jiio_plugins.adversarial.judged import Metrics

_LOOSE = 0.1  # mean relative residual of z; trainings that ended well stay below 0.03
_ASTRAY = 0.25  # share of examples; near the decision boundary a few differ in any training
_UNVERIFIED = 0.1  # share of images
_FALL = 0.1  # of an accuracy
_REMEDY = (
    "Set or raise jacobian_weight (1 holds most cells), lower the learning rate, or take more "
    "iterations or refine="
)


@dataclass
class Watch:
    """Says what looks wrong in a training, each thing once.

    Attributes:
        said: what has been, by its name.
    """

    said: list[str] = field(default_factory=list)

    def judged(self, epoch: int, metrics: Metrics, count: int) -> None:
        """Look at a judged sample.

        Args:
            epoch: its number, from 1 on.
            metrics: means of what :func:`judged_rows` or :func:`validate` returns.
            count: images in the sample.
        """
        noise = count**-0.5  # two standard errors of a share, at most
        if metrics["unverified"] > max(_UNVERIFIED, noise):
            self._say(
                "unverified",
                f"in epoch {epoch} independent solves did not converge for "
                f"{metrics['unverified']:.0%} of {count} judged training images. The cell has no "
                "fixed point there that a solver finds, so no answer of the model can be trusted. "
                f"{_REMEDY}",
            )
        if metrics.get("astray", 0.0) > max(_ASTRAY, noise):
            self._say(
                "astray",
                f"in epoch {epoch} the search and independent solves disagree on "
                f"{metrics['astray']:.0%} of {count} judged adversarial images: by solves "
                f"{metrics['robust']:.0%} are classified correctly. The model learns to classify "
                f"before it has converged, and its fixed point is being lost. {_REMEDY}",
            )
        if metrics["robust"] > metrics["clean"] + noise:
            self._say(
                "above",
                f"in epoch {epoch} {metrics['robust']:.0%} of {count} judged adversarial images "
                f"are classified correctly, and of the images themselves {metrics['clean']:.0%}. "
                "The search goes where the loss of the model is lower, so its gradients are wrong. "
                f"{_REMEDY}",
            )

    def residual(self, epoch: int, residual: float) -> None:
        """Look at the mean relative residual of z in an epoch.

        Args:
            epoch: its number, from 1 on.
            residual: the mean.
        """
        if not residual <= _LOOSE:
            self._say(
                "residual",
                f"in epoch {epoch} the search left z at a mean relative residual of {residual:.2g} "
                f"(fine: below {_LOOSE}). It lags behind the images, so the search is weaker than "
                f"it looks and the model may learn to classify before it has converged. {_REMEDY}",
            )

    def validation(self, history: list[Metrics], count: int) -> None:
        """Look at the validation's accuracies.

        Args:
            history: of all epochs so far.
            count: images that were judged in each.
        """
        for name in ("clean", "robust"):
            values = [metrics[f"validation_{name}"] for metrics in history]
            if max(values) - values[-1] > max(_FALL, count**-0.5):
                self._say(
                    "validation",
                    f"in epoch {len(history)} the {name} accuracy on the validation data is "
                    f"{values[-1]:.0%}, after {max(values):.0%} before. Take the weights of a "
                    f"better epoch (patience=, or a checkpoint). {_REMEDY}",
                )

    def _say(self, name: str, message: str) -> None:
        if name not in self.said:
            self.said.append(name)
            warnings.warn(message, RuntimeWarning, stacklevel=5)
