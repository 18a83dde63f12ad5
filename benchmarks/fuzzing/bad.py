"""Bad inputs, and what an error must say of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from jiio_plugins import Box, L2Ball

from .calls import HALF
from .models import CLASSES, Plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .calls import Call


def other_dtype(x: Tensor) -> torch.dtype:
    """One that is not that of x."""
    return torch.float64 if x.dtype in (torch.float32, *HALF) else torch.float32


ENGINES = ("optimize", "attack")
LABELLED = ("attack", "torchattacks", "art")
GIVEN_X = ("optimize", "attack", "parameters", "training", "torchattacks")

# who, option or attribute, a bad value, what the error must say
BAD: tuple[tuple[tuple[str, ...], str, Any, str], ...] = (
    ((*GIVEN_X, "art"), "x", lambda c: c.x * math.nan, r"NaN"),
    (GIVEN_X, "x", lambda c: c.x / 0, r"NaN|Inf"),
    (GIVEN_X, "x", lambda c: (10 * c.x).int(), r"float"),
    (GIVEN_X, "x", lambda c: c.x > 0.5, r"float"),
    (GIVEN_X, "x", lambda c: c.x.to(torch.complex64), r"complex"),
    (GIVEN_X, "x", lambda c: c.x.tolist(), r"tensor"),
    (GIVEN_X, "x", lambda c: c.x.to(other_dtype(c.x)), r"float(16|32|64)"),
    (GIVEN_X, "x", lambda c: c.x[0, 0, 0, 0], r"batch"),
    ((*GIVEN_X, "gradient", "art"), "method", lambda _: 3, r"method"),
    (ENGINES, "verify", lambda _: 3, r"verify"),
    (ENGINES, "model", lambda c: Plain(c.x.dtype), r"[Ee]quilibrium"),
    (ENGINES, "model", lambda _: "model", r"model"),
    (("optimize",), "given", lambda c: (c.x[1:].flatten(1),), r"given"),
    (("optimize",), "given", lambda c: c.x, r"given"),
    (("optimize", "training"), "constraint", lambda _: 0.5, r"constraint"),
    (("optimize", "training"), "constraint", lambda _: L2Ball(-1.0), r"radius"),
    (("optimize", "training"), "constraint", lambda _: Box(1.0, 0.0), r"lower|upper|Box"),
    (("optimize",), "objective", lambda _: 3, r"objective"),
    (("optimize",), "objective", lambda _: lambda y: y.sum(), r"objective"),
    (("optimize",), "objective", lambda _: lambda y: y.detach().sum(1), r"objective"),
    (("optimize",), "differentiable", lambda _: 3, r"differentiable"),
    (("parameters",), "variables", lambda _: ["nothing"], r"variables"),
    (("parameters",), "variables", lambda _: "context", r"variables"),
    (("parameters",), "groups", lambda c: torch.arange(len(c.x)) * 2, r"groups"),
    (("parameters",), "groups", lambda c: torch.ones(len(c.x)), r"groups"),
    (("training",), "refine", lambda _: -1, r"refine"),
    (("training",), "start", lambda c: c.x[1:], r"start"),
    (LABELLED, "labels", lambda c: c.labels + CLASSES + 2, r"label|class|y must"),
    (("attack", "torchattacks"), "labels", lambda c: c.labels.float(), r"label"),
    (LABELLED, "labels", lambda c: c.labels[:-1], r"label|y must"),
    (("attack", "torchattacks"), "labels", lambda c: c.labels[:, None], r"label"),
    (LABELLED, "eps", lambda _: -1.0, r"eps|radius"),
    (LABELLED, "eps", lambda _: math.nan, r"eps|radius"),
    (("attack",), "eps", lambda c: torch.ones(len(c.x) + 1), r"eps|radius"),
    (LABELLED, "norm", lambda _: 3, r"norm"),
    (LABELLED, "loss", lambda _: "hinge", r"loss"),
    (("attack",), "mask", lambda _: torch.ones(7), r"mask"),
    (("attack",), "box", lambda _: (1.0, 0.0), r"lower|upper|box|Box"),
    (("attack",), "box", lambda _: (0.9, 1.0), r"box"),
    (("attack",), "random_starts", lambda _: -1, r"random_starts"),
    (("attack",), "retry", lambda _: 3, r"retry"),
    (("learn2learn",), "objective", lambda _: lambda out: out, r"one"),
    (("learn2learn",), "objective", lambda _: lambda out: 3, r"loss"),
    (("learn2learn",), "adapt", lambda _: ["nothing"], r"adapt|parameter|names"),
    (("learn2learn",), "lr", lambda _: -1.0, r"lr"),
    (("deepinv",), "measurement", lambda c: c.x * math.nan, r"NaN"),
    (("deepinv",), "measurement", lambda c: c.x[:, :, :1], r"y "),
    (("deepinv",), "measurement", lambda _: [1.0], r"y "),
    (("deepinv",), "physics", lambda _: 3, r"physics"),
    (("deepinv",), "settings", lambda _: {"latent_penalty": -1.0}, r"latent_penalty"),
)


def spoil(call: Call, choose: Callable[[Any], Any]) -> None:
    """Give a call one bad input, and note what an error must say of it."""
    _, name, value, expected = choose([b for b in BAD if call.how in b[0]])
    if name == "norm" and call.how == "torchattacks":
        name = "options"
        call.options["norm"] = "L3"
    elif name in vars(call):
        setattr(call, name, value(call))
    else:
        call.options[name] = value(call)
    call.expected = expected
