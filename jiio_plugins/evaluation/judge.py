"""The judge: which examples break a model, by solves that no attack had a part in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins.attacks import attack_objective
from jiio_plugins.constraints import Box
from jiio_plugins.equilibrium.state import relative
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from jiio_plugins.verification import Judge

if TYPE_CHECKING:
    from jiio_plugins.equilibrium.solvers import Solver


@dataclass(frozen=True)
class Verdict:
    """One entry per sample.

    Attributes:
        model_wrong: by the model's own answer, the solver it carries.
        tight_wrong: by the independent solve.
        converged: whether that solve reached its tolerance, with a finite answer.
        loss, model_loss: cross-entropy by the independent solve and by the model.
        residual: ‖f(z) − z‖ / ‖f(z)‖ of the state that the model itself stops at.
    """

    model_wrong: Tensor
    tight_wrong: Tensor
    converged: Tensor
    loss: Tensor
    model_loss: Tensor
    residual: Tensor

    @property
    def broken(self) -> Tensor:
        """Wrong by both, and verified."""
        return self.model_wrong & self.tight_wrong & self.converged

    @property
    def doubtful(self) -> Tensor:
        """Wrong by either, but not verified: it may or may not break its sample."""
        return (self.model_wrong | self.tight_wrong) & ~self.converged

    @property
    def differ(self) -> Tensor:
        """Samples whose two losses are more than 1 % (and 0.01) apart, or classes differ."""
        gap = (self.loss - self.model_loss).abs()
        far = ~(gap <= 1e-2 * (1 + self.loss.abs()))
        return far | (self.model_wrong != self.tight_wrong)

    @classmethod
    def join(cls, parts: list[Verdict]) -> Verdict:
        """Batches -> one."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor, verify: Solver) -> Verdict:
    """The model's own answer, and that of a solve from the layers' initial state.

    Args:
        model: returns logits ``(batch, classes)``.
        x: images ``(batch, ...)``.
        y: true classes, integers ``(batch,)``.
        verify: solver of that solve.

    Raises:
        ValueError: no equilibrium layer, logits of another shape, labels out of range.
    """
    problem = Problem(Variable(model, x), attack_objective("cross-entropy", y))
    found = Judge(problem, verify, warm=False).everything(problem.v_start)
    f, own = problem.evaluate(found.v, found.model_z), found.model_output
    finite = torch.isfinite(found.output).all(1)
    return Verdict(
        (own.argmax(1) != y) | ~torch.isfinite(own).all(1),  # NaN is no right answer
        (found.output.argmax(1) != y) | ~finite,
        found.converged & finite,
        -found.value,
        -found.model_value,
        relative(f - found.model_z, f),
    )


def check_feasible(
    name: str,
    found: Any,
    x: Tensor,
    *,
    norm: float,
    eps: float,
    lower: float | Tensor | None,
    upper: float | Tensor | None,
) -> Tensor:
    """What an attack returned, if it is images of the same shape within ball and box.

    The only slack is rounding: 1e-5 ε, and four units in the last place of every pixel.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape, NaN or Inf, outside the ball or the box.
    """
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"the attack {name!r} must return a floating-point tensor, got {got}")
    if found.shape != x.shape:
        raise ValueError(
            f"the attack {name!r} must return images of the shape it was given, "
            f"{tuple(x.shape)}, got {tuple(found.shape)}"
        )
    images: Tensor = found.detach().to(x.device, x.dtype)
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"the attack {name!r} returned NaN or Inf")
    # in float64, as the difference of two float32 images rounds once more
    size = torch.linalg.vector_norm((images.double() - x.double()).flatten(1), ord=norm, dim=1)
    rounding = 4 * torch.finfo(x.dtype).eps * (float(x.abs().max()) + eps)
    allowed = eps * (1 + 1e-5) + rounding * x[0].numel() ** (1 / norm)
    if bool((size > allowed).any()):
        worst = int(size.argmax())
        raise ValueError(
            f"the attack {name!r} left the ball: ‖x_adv − x‖ = {float(size[worst]):.6g} in the "
            f"L{norm:g} norm (image {worst} of its batch), allowed is {eps:g}. Is it set to the "
            "same norm and radius?"
        )
    if lower is None and upper is None:
        return images
    box = Box(-torch.inf if lower is None else lower, torch.inf if upper is None else upper)
    clipped = box.bind(images).clip(images.flatten(1)).reshape(images.shape)
    if bool(((clipped - images).abs() > rounding).any()):
        raise ValueError(
            f"the attack {name!r} left the box [{lower}, {upper}]: its images have values from "
            f"{float(images.min()):g} to {float(images.max()):g}. Give it the same bounds"
        )
    return clipped
