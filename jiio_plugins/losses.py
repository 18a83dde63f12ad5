"""Losses of attacks on classifiers, as functions of the logits, and when they have succeeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jiio_plugins.utils.checks import outside_inference

Loss = Literal["cross-entropy", "dlr", "margin"]
Output = str | int | Callable[[Any], Tensor] | None
LOSSES: tuple[Loss, ...] = ("cross-entropy", "dlr", "margin")


def too_few_classes(loss: Loss, classes: int, targeted: bool = False) -> str | None:
    """What is wrong with a loss on so few classes that it has no slope. None: nothing is.

    Of one logit no loss says which class it is for. dlr is ±1 where the span that it divides by is
    the margin itself: of two classes, and of three if the wanted one is the least likely.

    Args:
        loss: "cross-entropy", "dlr" or "margin".
        classes: of the model.
        targeted: as of the attack.
    """
    if classes < 2:
        return (
            f"the model must return logits of 2 classes or more, got {classes}: of one logit a, "
            "which is for the second of two classes, make torch.cat((torch.zeros_like(a), a), 1)"
        )
    if loss == "dlr" and classes < (least := 4 if targeted else 3):
        return (
            f"the dlr loss{' of a targeted attack' if targeted else ''} needs {least} classes or "
            f'more, the model has {classes}, where it has no slope: take "margin" or '
            '"cross-entropy"'
        )
    return None


def attack_objective(
    loss: Loss, labels: Tensor, targeted: bool = False
) -> Callable[[Tensor], Tensor]:
    """The function of the logits that an attack minimises, ``(rows, classes) -> (rows,)``.

    With the logits a, the labels y and π sorting the logits, largest first:

    - cross-entropy: ``log p_y``.
    - margin: ``a_y − max_{i≠y} a_i``.
    - dlr: the margin divided by ``a_π1 − a_π3``.

    With ``targeted`` the sign of the first two turns. dlr becomes
    ``−(a_y − a_π1) / (a_π1 − (a_π3 + a_π4) / 2)``.

    Args:
        loss: "cross-entropy", "dlr" or "margin".
        labels: y, integers ``(rows,)``.
        targeted: whether y is wanted, or to be left.

    Raises:
        ValueError: an unknown loss. The function raises it for labels out of range, logits of
            another shape, or too few classes for the loss to have a slope.
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
        classes = check_logits(logits, len(labels)).shape[1]
        problem = too_few_classes(loss, classes, targeted)
        if problem:
            raise ValueError(problem)
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
        low_end = (ordered[:, 2] + ordered[:, 3]) / 2 if targeted else ordered[:, 2]
        span = ordered[:, 0] - low_end
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


def logits_of(output: Any, which: Output = None) -> Any:
    """The logits in what a classifier returned.

    Args:
        output: what it returned.
        which: a key or an attribute, an index, or a function of it. None: a tensor is them, else
            what is called ``logits``, as attribute or key, else the first of a tuple or list. What
            is none of these stays as it is.

    Raises:
        ValueError: what ``which`` names is not there, or is no tensor.
    """
    if which is None:
        return _by_rule(output)
    if callable(which):
        found = which(output)
    else:
        try:
            if isinstance(output, (tuple, list)) and str(which).lstrip("-").isdigit():
                found = output[int(which)]
            elif isinstance(output, Mapping) and which in output:
                found = output[which]
            else:
                found = getattr(output, str(which))
        except (AttributeError, IndexError) as error:
            raise ValueError(
                f"output={which!r} is not in what the model returned, {_described(output)}: give a "
                "key, an attribute, an index, or a function of it"
            ) from error
    if not isinstance(found, Tensor):
        raise ValueError(
            f"output={which!r} must be the logits, a tensor, got {type(found).__name__} of "
            f"{_described(output)}"
        )
    return found


def check_output(which: object) -> None:
    """Raise unless it says which of a model's outputs are the logits.

    Raises:
        TypeError: it is no key, attribute, index, function or None.
    """
    plain = isinstance(which, (str, int)) and not isinstance(which, bool)
    if not (which is None or plain or callable(which)):
        raise TypeError(
            "output must be a key, an attribute, an index or a function of what the model returns, "
            f"or None, got {which!r}"
        )


def _by_rule(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    if isinstance(output, (tuple, list)) and output:
        return _by_rule(output[0])
    return output


def _described(output: Any) -> str:
    """What a model returned, in a few words."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{kind} with {', '.join(map(repr, output)) or 'nothing'}"
    return f"{kind} of {len(output)}" if isinstance(output, (tuple, list)) else kind


def check_logits(output: Any, rows: int) -> Tensor:
    """What a model returned, if it is logits ``(rows, classes)``.

    Args:
        output: what the model returned.
        rows: of the batch.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == rows:
        return output
    if isinstance(output, Tensor) and output.shape == (rows,):
        raise ValueError(
            f"the model must return logits of shape ({rows}, classes), 2 classes or more, got "
            f"{(rows,)}, one value per sample: of one logit a, which is for the second of two "
            "classes, make torch.stack((torch.zeros_like(a), a), 1)"
        )
    raise ValueError(
        f"the model must return logits of shape ({rows}, classes), got {_described(output)}: wrap "
        "it in a module whose forward returns them alone, jiio_plugins.models.LogitsOf(model, "
        "output) with the key, the attribute or the index that they have"
    )
