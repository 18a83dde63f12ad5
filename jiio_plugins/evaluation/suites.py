"""Ready suites. The engine's own attacks need nothing, the default suite uses torchattacks too.

APGD and Square are torchattacks' and not ART's. ART's APGD evaluates the model twice a step and
keeps the last iterate where torchattacks keeps the adversarial one. On a DEQ every evaluation is a
solve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from jiio_plugins.attacks import attack
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.evaluation.attack import Attack
from jiio_plugins.hosts import load_adapter
from jiio_plugins.losses import too_few_classes
from jiio_plugins.methods.backpropagated import (
    Backpropagated,
    through_intermediate,
    through_unrolled,
)
from jiio_plugins.methods.joint import Joint
from jiio_plugins.methods.nested import Nested
from jiio_plugins.threat_model import ThreatModel

if TYPE_CHECKING:
    from jiio_plugins.losses import Loss
    from jiio_plugins.methods.base import Method

HOST_NORMS = {2.0: "L2", float("inf"): "Linf"}
Bound = float | Tensor | None


def engine_attack(
    name: str,
    method: Method,
    gradient: str,
    *,
    eps: float,
    norm: float,
    lower: Bound = 0.0,
    upper: Bound = 1.0,
    loss: Loss = "cross-entropy",
    random_starts: int = 0,
) -> Attack:
    """An attack of this package as a member of a suite.

    Args:
        name: as in :class:`Attack`.
        method: what optimises, see :func:`attack`.
        gradient: as in :class:`Attack`.
        eps: ε of the ball, in the units of the images.
        norm: of the ball, 1, 2 or inf.
        lower: least pixel value, a number or a tensor that broadcasts over the batch. None: no
            bound.
        upper: largest pixel value, likewise.
        loss: "cross-entropy", "dlr" or "margin".
        random_starts: as in :func:`attack`.

    Raises:
        ValueError: another norm, or another kind of gradient.
    """
    threat = ThreatModel(norm=norm, eps=eps, lower=lower, upper=upper)
    settings: dict[str, Any] = {"loss": loss, "method": method, "random_starts": random_starts}

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = attack(model, x, y, **vars(threat), **settings).x
        assert isinstance(found, Tensor)
        return found

    return Attack(name, run, gradient, lambda x, classes: too_few_classes(loss, classes))


def quick_suite(
    *, eps: float, norm: float, lower: Bound = 0.0, upper: Bound = 1.0
) -> tuple[Attack, ...]:
    """A first look, without a host library: JIIO, PGD through the model's own backward pass, DLR.

    About 600 evaluations of f and VJPs for each sample that withstands. DLR is left out where there
    are two classes.

    Args:
        eps: ε of the ball, in the units of the images.
        norm: of the ball, 1, 2 or inf.
        lower: least pixel value, a number or a tensor that broadcasts over the batch. None: no
            bound.
        upper: largest pixel value, likewise.
    """
    ball: dict[str, Any] = {"eps": eps, "norm": norm, "lower": lower, "upper": upper}
    return (
        engine_attack("JIIO", Joint(), "implicit", **ball),
        engine_attack("PGD", Backpropagated(max_iter=10), "own", **ball),
        engine_attack("JIIO, DLR", Joint(), "implicit", loss="dlr", **ball),
    )


def default_suite(
    *,
    eps: float,
    norm: float,
    lower: float = 0.0,
    upper: float = 1.0,
    steps: int = 20,
    queries: int = 50,
    seed: int = 0,
) -> tuple[Attack, ...]:
    """JIIO, nested PGD, APGD-CE, APGD-DLR, PGD through unrolled and intermediate states, Square.

    Cheap attacks come first: with ``skip_broken`` the others see only what withstands. An image
    that withstands all costs about 4,000 evaluations of f and VJPs. DLR is left out where there are
    two classes, and those of torchattacks where the images are not ``(rows, C, H, W)`` or, for
    Square, too small.

    Args:
        eps: ε of the ball, in the units of the images.
        norm: 2 or inf (those that torchattacks knows).
        lower: least pixel value. Images are rescaled to [0, 1] for torchattacks.
        upper: largest pixel value.
        steps: of APGD. JIIO, whose steps are cheap, takes 50 at least. The three PGDs, whose steps
            shrink and need no tuning, take half as many. To publish a result take 100.
        queries: of Square, each one a solve. To publish a result take 1,000 or more.
        seed: of the random starts and of Square.

    Raises:
        ValueError: another norm, no steps, an empty range.
        ImportError: torchattacks is missing. The message has the command that installs it.
    """
    if float(norm) not in HOST_NORMS:
        raise ValueError(
            f"torchattacks knows norm 2 and inf, got {norm}; quick_suite takes the L1 norm too"
        )
    if steps < 1 or queries < 1:
        raise ValueError(f"steps and queries must be at least 1, got {steps} and {queries}")
    load_adapter("torchattacks")  # says what to install before anything is run
    ball: dict[str, Any] = {"eps": eps, "norm": norm, "lower": lower, "upper": upper}
    half = max(1, steps // 2)
    jiio = Joint(max_iter=max(50, steps))
    nested = Nested(max_iter=half, solver=Anderson(max_iter=200, tol=1e-4))
    unrolled, between = through_unrolled(max_iter=half), through_intermediate(max_iter=half)
    apgd: dict[str, Any] = {"steps": steps, "seed": seed, **ball}
    return (
        engine_attack("JIIO", jiio, "implicit", **ball),
        engine_attack("JIIO, DLR", jiio, "implicit", loss="dlr", **ball),
        engine_attack("PGD nested, tight", nested, "implicit", **ball),
        host_attack("APGD-CE", "own", "APGD", loss="ce", **apgd),
        host_attack("APGD-DLR", "own", "APGD", loss="dlr", **apgd),
        engine_attack("PGD unrolled", unrolled, "unrolled", **ball),
        engine_attack("PGD intermediate", between, "intermediate", **ball),
        host_attack("Square", "none", "Square", n_queries=queries, seed=seed, **ball),
    )


def host_attack(
    name: str,
    gradient: str,
    kind: str,
    *,
    eps: float,
    norm: float,
    lower: float = 0.0,
    upper: float = 1.0,
    **settings: Any,
) -> Attack:
    """Torchattacks' ``kind`` (APGD, Square, …) as a member of a suite.

    Args:
        name: as in :class:`Attack`.
        gradient: likewise.
        kind: name of a class of torchattacks that takes ``norm`` and ``eps``.
        eps: as in :func:`default_suite`.
        norm: likewise.
        lower: likewise.
        upper: likewise.
        **settings: further arguments of that class.

    Raises:
        TypeError: bounds that are no numbers.
        ValueError: an empty or unbounded pixel range. When run: images or classes that do not fit.
    """
    if not isinstance(lower, (int, float)) or not isinstance(upper, (int, float)):
        raise TypeError(
            f"torchattacks needs a pixel range of two numbers, got {lower!r} and {upper!r}"
        )
    scale = upper - lower
    if not 0 < scale < float("inf"):
        raise ValueError(f"torchattacks needs a bounded pixel range, got [{lower}, {upper}]")

    dlr = settings.get("loss") == "dlr"

    def unfit(x: Tensor, classes: int) -> str | None:
        if x.ndim != 4:
            return (
                f"torchattacks needs images (batch, channels, height, width), got {tuple(x.shape)}"
            )
        if kind == "Square" and float(norm) == 2 and min(x.shape[2:]) < 5:  # it divides by h // 5
            return (
                "torchattacks' Square needs images of 5 × 5 pixels or more for the L2 norm, got "
                f"{tuple(x.shape)}"
            )
        return too_few_classes("dlr" if dlr else "cross-entropy", classes)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import torchattacks

        problem = unfit(x, model(x[:1]).shape[1] if dlr else 2)
        if problem:
            raise ValueError(problem)
        if eps == 0:  # some of its attacks divide by ε
            return x
        unit = x if (lower, upper) == (0, 1) else ((x - lower) / scale).clamp(0, 1)
        wrapped = model if (lower, upper) == (0, 1) else _Rescaled(model, lower, scale).eval()
        host = getattr(torchattacks, kind)(
            wrapped, norm=HOST_NORMS[float(norm)], eps=eps / scale, **settings
        )
        host.set_device(x.device)
        found: Tensor = host(unit, y)
        return found if wrapped is model else (lower + scale * found).clamp(lower, upper)

    return Attack(name, run, gradient, unfit)


class _Rescaled(nn.Module):
    """The model as a function of images in [0, 1]."""

    def __init__(self, model: nn.Module, lower: float, scale: float) -> None:
        super().__init__()
        self.model, self.lower, self.scale = model, lower, scale

    def forward(self, t: Tensor) -> Tensor:
        logits: Tensor = self.model(self.lower + self.scale * t)
        return logits
