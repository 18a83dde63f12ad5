"""What of a training is judged by solves: rows of its steps, validation data, the finished model.

A search follows z, it does not solve for it. What the steps see is corrected by what is judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jiio_plugins.adversarial.step import likeliest
from jiio_plugins.envelope import joint_solution
from jiio_plugins.joint.guard import flags_kept
from jiio_plugins.verification import Verdict, default_verifier, judge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from jiio_plugins.adversarial.step import AdversarialStep, AdversarialTraining

Metrics = dict[str, float]


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


def validate(
    model: nn.Module, training: AdversarialTraining, x: Tensor, y: Tensor, *, batch_size: int = 128
) -> Metrics:
    """Clean and robust accuracy in eval mode, by the answers of the model itself.

    Robust means: against the training's own search from the image. For figures to report use
    ``jiio_plugins.evaluation``.

    Args:
        model: returns logits ``(rows, classes)``.
        training: whose search and whose ball.
        x: images ``(n, ...)``.
        y: true classes, integers ``(n,)``, or what else the training's loss takes, whose likeliest
            class is the true one: probabilities ``(n, classes)``.
        batch_size: images judged together.

    Returns:
        "clean" and "robust", and "unverified": the share of samples where an independent solve, at
        the image or at the example, does not reach its tolerance. It grows when the fixed point is
        being lost.
    """
    judged: dict[str, list[Verdict]] = {"clean": [], "robust": []}
    with flags_kept(model):
        model.eval()
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            found = joint_solution(
                model,
                images,
                training.adversary(labels),
                method=training.method,
                constraint=training.region(images),
            )
            classes = likeliest(labels)
            for name, seen in (("clean", images), ("robust", found.x)):
                judged[name].append(judge(model, seen, classes, default_verifier(x.dtype)))
    clean, robust = (Verdict.join(parts) for parts in judged.values())
    flags = {
        "clean": ~clean.model_wrong,
        "robust": ~robust.model_wrong,
        "unverified": ~(clean.converged & robust.converged),
    }
    return {name: float(flag.double().mean()) for name, flag in flags.items()}


def finished(
    model: nn.Module,
    training: AdversarialTraining,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    most: int,
) -> tuple[Metrics, int]:
    """:func:`validate` on training images, with the weights that a training leaves.

    An epoch's figures are of weights that still move.

    Args:
        model: that has been trained.
        training: see :func:`validate`.
        batches: images ``(rows, ...)`` and their classes, integers or probabilities. No more are
            drawn than are needed.
        classes: that there are. Images of others, which a loss may ignore, are left out.
        most: images to judge, at most.

    Returns:
        What :func:`validate` returns, and of how many images. Nothing of none.
    """
    images, labels, count, size = [], [], 0, 1
    for x, y in batches:
        likely = likeliest(y)
        known = ((likely >= 0) & (likely < classes)).nonzero().squeeze(1)[: most - count]
        images.append(x[known])
        labels.append(y[known])
        count, size = count + len(known), max(size, len(x))
        if count >= most:
            break
    if not count:
        return {}, 0
    return validate(model, training, torch.cat(images), torch.cat(labels), batch_size=size), count
