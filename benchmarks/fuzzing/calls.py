"""A call, drawn from a seed and a number: the model, what it is given, and what is to be done."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jiio_plugins import (
    Anderson,
    Box,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
)

from .models import CLASSES, FORMS, KINDS, LAYERS, TAME, D, Model, N

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINE = ("optimize", "attack", "parameters", "gradient", "training")
HOSTS = ("torchattacks", "art", "deepinv", "learn2learn")
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Call:
    """One call, ready to be made: on all rows, or on some.

    Attributes:
        how: of ``ENGINE`` or ``HOSTS``, what is called.
        model: what it is called on.
        x: where it starts, ``(rows, 1, 2, 2)``.
        labels: classes, ``(rows,)``.
        given: what else the model takes.
        groups: with "parameters": problem of each row.
        norm: of the ball.
        eps: its radius, a number or ``(rows,)``. None: there is no ball.
        box: bounds of x, or None.
        mask: with "attack": where x may change.
        options: further keywords of what is called.
        expected: what an error must say. None: there is to be none.
    """

    how: str
    model: Model
    x: Tensor
    labels: Tensor
    given: tuple[Tensor, ...] = ()
    groups: Tensor | None = None
    loss: str = "cross-entropy"
    targeted: bool = False
    norm: float = math.inf
    eps: Any = None
    box: tuple[Any, Any] | None = None
    mask: Tensor | None = None
    method: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    expected: str | None = None

    def rows(self, rows: slice) -> Call:
        """The same on some of the rows."""
        cut = {
            name: value[rows]
            for name in ("x", "labels", "mask", "eps")
            if isinstance(value := getattr(self, name), Tensor)
        }
        options = {
            name: value[rows] if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return replace(self, **cut, given=tuple(g[rows] for g in self.given), options=options)

    def objective(self, outputs: Tensor) -> Tensor:
        """What is minimised, ``(rows,)``."""
        if self.how in ("attack", *HOSTS):
            value: Tensor = LOSSES[self.loss, self.targeted](outputs, self.labels)
            return value if self.targeted else -value
        # that of a gradient has one minimum, whatever the model's rank
        own, echo = outputs[:, :CLASSES], outputs[:, CLASSES:]
        return (own - 1).square().sum(1) + 0.5 * echo.square().sum(1)

    def constraint(self) -> Any:
        """Ball and box as the engine's."""
        if "constraint" in self.options:
            return self.options["constraint"]
        parts: list[Any] = []
        if self.eps is not None:
            parts.append({1.0: L1Ball, 2.0: L2Ball, math.inf: LinfBall}[self.norm](self.eps))
        if self.box is not None:
            parts.append(Box(*self.box))
        return Intersection(*parts) if len(parts) == 2 else (parts or [None])[0]

    def further(self, *without: str) -> dict[str, Any]:
        """The options that are keywords of what is called."""
        return {k: v for k, v in self.options.items() if k not in without}


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{i≠y} a_i − a_y``."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf)
    return others.amax(1) - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin in units of the span of the first three logits."""
    ranked = logits.topk(3, dim=1).values
    return margin(logits, labels) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Likewise, with the mean of the third and the fourth."""
    ranked = logits.topk(4, dim=1).values
    span = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2
    return margin(logits, labels) / (span + 1e-12)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row."""
    return cross_entropy(logits, labels, reduction="none")


LOSSES: dict[tuple[str, bool], Callable[[Tensor, Tensor], Tensor]] = {
    ("cross-entropy", False): nll,
    ("cross-entropy", True): nll,
    ("margin", False): margin,
    ("margin", True): margin,
    ("dlr", False): dlr,
    ("dlr", True): targeted_dlr,
}
METHODS: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: None,
    lambda rng: Joint(max_iter=rng.choice((1, 5, 30))),
    lambda rng: Joint(max_iter=10, mixing="anderson"),
    lambda rng: Joint(max_iter=10, state_steps=1, adjoint_warmup=0, relaxation=1.0),
    lambda rng: Joint(max_iter=12, gap_tol=0.1, max_state_steps=2),
    lambda rng: Nested(max_iter=rng.choice((1, 5, 20))),
    lambda rng: Nested(solver=Anderson(tol=1e-2), warm_start=True, max_iter=8),
)


def build(seed: int, number: int, hosts: bool) -> Call:
    """The call of this number. ``hosts``: through the adapters too."""
    rng = random.Random(f"{seed}/{number}")
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    how = rng.choice(("optimize", "optimize", "attack", "attack", *ENGINE, *(HOSTS * hosts)))
    dtype = rng.choice((torch.float32, torch.float64))
    if how in ("optimize", "attack") and rng.random() < 0.08:
        dtype = rng.choice(HALF)
    dtype = torch.float32 if how == "art" else dtype
    kinds = TAME if how == "gradient" else KINDS
    layer = rng.choice((LAYERS[0], *LAYERS)) if hosts else LAYERS[rng.random() < 0.3]
    forms = {"Equilibrium": FORMS[:2], "own solver": FORMS, "TorchDEQ": FORMS[:2]}[layer]
    outputs = D if how == "deepinv" else rng.choice((CLASSES, CLASSES + 2))
    model = Model(rng.choice(kinds), layer, rng.choice(forms), outputs, rng, generator)
    model = model.to(dtype).train(rng.random() < 0.5)
    rows = rng.randrange(0 if how in ("optimize", "attack") else 1, 10)
    x = torch.rand(rows, 1, 2, D // 2, generator=generator).to(dtype)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    call = Call(how, model, x, labels, method=rng.choice(METHODS)(rng))
    DRAWS[how](call, rng, generator)
    return call


def _draw_set(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    call.eps, call.norm = rng.choice((0.0, 0.01, 0.1, 0.5)), rng.choice((1.0, 2.0, math.inf))
    if rng.random() < 0.2:
        call.eps = torch.rand(len(call.x), generator=generator).to(call.x.dtype)
    if rng.random() < 0.5:
        call.box = rng.choice(((0.0, 1.0), (torch.zeros(2), torch.ones(1, 2, 2).to(call.x))))


def _draw_optimize(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    _draw_set(call, rng, generator)
    call.eps = call.eps if rng.random() < 0.7 else None
    if rng.random() < 0.3:
        call.given = (torch.randn(len(call.x), N, generator=generator).to(call.x.dtype),)


def _draw_attack(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    _draw_set(call, rng, generator)
    _draw_loss(call, rng)
    retry = {"retry": Joint(max_iter=20)}
    call.options = rng.choice(({}, {}, {"random_starts": 2}, {"early_stop": True}, retry))
    if rng.random() < 0.3:
        shape = rng.choice((call.x.shape, (1, 1, 1, 2)))
        call.mask = (torch.rand(shape, generator=generator) < 0.6).expand(call.x.shape)


def _draw_loss(call: Call, rng: random.Random) -> None:
    call.targeted = rng.random() < 0.3
    enough = call.model.head.out_features >= (4 if call.targeted else 3)
    call.loss = rng.choice(("cross-entropy", "margin", *(["dlr"] * enough)))


def _draw_parameters(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    del generator
    if rng.random() < 0.6 and len(call.x) > 1:
        call.groups = torch.arange(len(call.x)) % rng.randrange(1, len(call.x) + 1)


def _draw_gradient(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    del generator
    call.model.echo = True
    call.method = rng.choice((None, Joint(max_iter=60), Nested(max_iter=40)))


def _draw_host(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    del generator
    call.eps, call.norm = rng.choice((0.0, 0.01, 0.1, 0.5)), rng.choice((2.0, math.inf))
    call.box = (0.0, 1.0)
    _draw_loss(call, rng)


def _draw_reconstruction(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    """y is noise, what the generator makes of zero, or all dark; the mask may be empty."""
    call.method, rows, like = None, len(call.x), call.x
    y = rng.choice(("image", "image", "fitted", "dark"))
    call.options = {
        "y": y,
        "mask": rng.choice((None, 1.0, 0.5, 0.0)),
        "noise": torch.randn(rows, 1, 2, 2, generator=generator).to(like) / 10,
        "settings": {
            "latent_penalty": rng.choice((0.0, 1e-3, 1.0)),
            "range_penalty": rng.choice((None, None, 10.0)),
            "iters": rng.choice((5, 40)),
        },
    }


def _draw_learner(call: Call, rng: random.Random, generator: torch.Generator) -> None:
    del generator
    call.method = None
    call.options = {
        "lr": rng.choice((0.1, 1.0)),
        "reg": rng.choice((0.01, 0.3)),
        "iters": rng.choice((1, 20, 60)),
        "first_order": rng.random() < 0.3,
    }


DRAWS: dict[str, Callable[[Call, random.Random, torch.Generator], None]] = {
    "optimize": _draw_optimize,
    "attack": _draw_attack,
    "parameters": _draw_parameters,
    "gradient": _draw_gradient,
    "training": _draw_set,
    "torchattacks": _draw_host,
    "art": _draw_host,
    "deepinv": _draw_reconstruction,
    "learn2learn": _draw_learner,
}


def exact(call: Call, x: Tensor) -> Tensor:
    """The objective at x by Newton's method in float64, ``(rows,)``."""
    model = copy.deepcopy(call.model).double()
    return call.objective(model.exact(x.double(), *(g.double() for g in call.given)))
