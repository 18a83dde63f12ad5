"""Losses of attacks on classifiers, as functions of the logits, and when they have succeeded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jiio_plugins.utils.checks import outside_inference

if TYPE_CHECKING:
    from collections.abc import Callable

Loss = Literal["cross-entropy", "dlr", "margin"]
LOSSES: tuple[Loss, ...] = ("cross-entropy", "dlr", "margin")


def attack_objective(
    loss: Loss, labels: Tensor, targeted: bool = False
) -> Callable[[Tensor], Tensor]:
    """The function of the logits that an attack minimises, ``(rows, classes) -> (rows,)``.

    With the logits a, the labels y and π sorting the logits, largest first:

    - cross-entropy: ``log p_y``.
    - margin: ``a_y − max_{i≠y} a_i``.
    - dlr: the margin divided by ``a_π1 − a_π3``.

    With ``targeted`` the sign of the first two turns. dlr becomes
    ``−(a_y − a_π1) / (a_π1 − (a_π3 + a_π4) / 2)``, as far as there are classes.

    Args:
        loss: "cross-entropy", "dlr" or "margin".
        labels: y, integers ``(rows,)``.
        targeted: whether y is wanted, or to be left.

    Raises:
        ValueError: an unknown loss. The function raises it for labels out of range, or logits of
            another shape.
        TypeError: labels that are not integers.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.ndim != 1:
        raise TypeError(
            f"labels must be integers of shape (batch,), got {labels.dtype} {tuple(labels.shape)}"
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    labels = outside_inference(labels.long())

    def objective(logits: Tensor) -> Tensor:
        _check_logits(logits, len(labels))
        classes = logits.shape[1]
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels must be in 0 … {classes - 1} (the model has {classes} classes), "
                f"got {low} … {high}"
            )
        if loss == "cross-entropy":
            value = -cross_entropy(logits, labels, reduction="none")
            return -value if targeted else value
        own = logits.gather(1, labels[:, None]).squeeze(1)
        others = logits.scatter(1, labels[:, None], -torch.inf)
        margin = own - others.amax(1)
        if targeted:
            margin = -margin
        if loss == "margin":
            return margin
        ordered = logits.sort(1, descending=True).values
        if targeted and classes >= 4:
            span = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
        else:
            span = ordered[:, 0] - ordered[:, min(2, classes - 1)]
        # equal logits have no span, and the loss stays finite
        return margin / (span + 1e-12)

    return objective


def hit(output: Any, labels: Tensor, targeted: bool) -> Tensor:
    """Samples whose predicted class is the wanted one, or no longer the true one, ``(rows,)``.

    Args:
        output: logits ``(rows, classes)``.
        labels: integers ``(rows,)``.
        targeted: whether the labels are wanted, or to be left.
    """
    if not len(labels):  # a model that was given no image has no output
        return torch.zeros_like(labels, dtype=torch.bool)
    predicted = output.argmax(1)
    right: Tensor = predicted == labels
    return right if targeted else ~right


def _check_logits(logits: Any, rows: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != rows:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape ({rows}, classes), got {got}")
