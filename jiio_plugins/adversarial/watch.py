"""A training held against solves: a judged sample, and what is said early when they differ.

A search follows z, it does not solve for it. Where the cell loses its fixed point, what the steps
see and what the model answers have nothing to do with each other any more, and the loss goes down
all the same. So some of the images that a step has searched from are judged before its update.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jiio_plugins.adversarial.step import likeliest
from jiio_plugins.joint.guard import flags_kept
from jiio_plugins.verification import default_verifier, judge

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jiio_plugins.adversarial.step import AdversarialStep

    Metrics = dict[str, float]

_LOOSE = 0.1  # mean relative residual of z; trainings that ended well stay below 0.03
_ASTRAY = 0.25  # share of examples; near the decision boundary a few differ in any training
_UNVERIFIED = 0.1  # share of images
_FALL = 0.1  # of an accuracy
_REMEDY = (
    "Set or raise jacobian_weight (1 holds most cells), lower the learning rate, or take more "
    "iterations or refine="
)


def judged_rows(
    model: nn.Module, step: AdversarialStep, x: Tensor, labels: Tensor, most: int
) -> dict[str, Tensor]:
    """Some rows of a step by solves, in eval mode, before the step's update.

    Args:
        model: that made the step.
        step: whose examples are judged.
        x: its images, ``(rows, ...)``.
        labels: classes, integers ``(rows,)``, or probabilities ``(rows, classes)``.
        most: rows to judge, at most. They are the first ones that were attacked.

    Returns:
        Booleans ``(judged,)``. "clean" and "robust": the image, and the example that the step has
        found for it, are classified correctly, by the model's own answer and by an independent
        solve. "unverified": at either, that solve did not reach its tolerance. "astray": the search
        and that solve disagree on whether the example is classified correctly. "there_robust" and
        "there_clean": what the step saw of these rows. Nothing where the labels are no classes.
    """
    classes = likeliest(labels)
    if classes.ndim != 1 or classes.is_floating_point() or step.output.ndim != 2:
        return {}
    known = (classes >= 0) & (classes < step.output.shape[1])  # others a loss may ignore
    rows = known[: len(step.robust)].nonzero().squeeze(1)[:most]
    if not len(rows):
        return {}
    verifier = default_verifier(x.dtype)
    with flags_kept(model):
        model.eval()
        clean, robust = (
            judge(model, t[rows].detach(), classes[rows], verifier) for t in (x, step.solution.x)
        )
    seen = {} if step.clean is None else {"there_clean": step.clean[rows]}
    return {
        "clean": ~(clean.model_wrong | clean.tight_wrong),
        "robust": ~(robust.model_wrong | robust.tight_wrong),
        "unverified": ~(clean.converged & robust.converged),
        "astray": step.robust[rows] == robust.tight_wrong,
        "there_robust": step.robust[rows],
        **seen,
    }


def corrected(means: Metrics) -> Metrics:
    """An epoch's means, "clean" and "robust" of all its images where the steps saw them all.

    What is seen of all images, and by how much judging those in the sample changes it. Where the
    two agree that is far more certain than the sample alone.

    Args:
        means: of what :func:`judged_rows` returns, and of what the steps saw.
    """
    means = dict(means)
    for name in ("clean", "robust"):
        there = means.pop(f"there_{name}", None)
        if there is not None and name in means:
            value = means[name] + means[f"seen_{name}"] - there
            means[name] = min(max(value, 0.0), 1.0)
    return means


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
            metrics: means of what :func:`judged_rows` returns.
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
        if metrics["astray"] > max(_ASTRAY, noise):
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
