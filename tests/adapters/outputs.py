"""Forms in which classifiers return their logits, and what says where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Answer:
    """As Hugging Face's models return it."""

    loss: Tensor
    logits: Tensor


class Returning(nn.Module):
    """A classifier whose logits are returned in another form."""

    def __init__(self, net: nn.Module, form: Any) -> None:
        super().__init__()
        self.net, self.form = net, form

    def forward(self, images: Tensor) -> Any:
        return self.form(self.net(images))


# form, and output=
FORMS: dict[str, tuple[Any, Any]] = {
    "tuple": (lambda y: (y, y.sum()), None),
    "nested": (lambda y: [(y, y.sum()), 3], None),
    "dict": (lambda y: {"loss": y.sum(), "logits": y}, None),
    "object": (lambda y: Answer(y.sum(), y), None),
    "key": (lambda y: {"logits": -y, "out": y}, "out"),
    "attribute": (lambda y: Answer(y, -y), "loss"),
    "index": (lambda y: (y.sum(), y), 1),
    "function": (lambda y: {"parts": [y.sum(), y]}, lambda out: out["parts"][1]),
}
