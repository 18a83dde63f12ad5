"""Samples that any attack has found, judged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.counting import Cost, count
from jiio_plugins.equilibrium.state import relative
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from jiio_plugins.losses import attack_objective
from jiio_plugins.verification.candidates import Judge

if TYPE_CHECKING:
    from torch import nn

    from jiio_plugins.equilibrium.solvers import Solver


@dataclass(frozen=True)
class Verdict:
    """What two solves say of some samples, ``(rows,)`` each.

    Attributes:
        model_wrong: by the model's own answer, the solver it carries.
        tight_wrong: by the independent solve.
        converged: whether that solve reached its tolerance, with a finite answer.
        loss: cross-entropy by the independent solve.
        model_loss: cross-entropy by the model.
        residual: ``‖f(z) − z‖ / ‖f(z)‖`` of the state that the model itself stops at.
        tight_residual: the same of the state of the independent solve.
    """

    model_wrong: Tensor
    tight_wrong: Tensor
    converged: Tensor
    loss: Tensor
    model_loss: Tensor
    residual: Tensor
    tight_residual: Tensor

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
        model: returns logits ``(rows, classes)``.
        x: images ``(rows, ...)``.
        y: true classes, integers ``(rows,)``.
        verify: solver of that solve.

    Raises:
        ValueError: no equilibrium layer, logits of another shape, labels out of range.
    """
    problem = Problem(Variable(model, x), attack_objective("cross-entropy", y))
    judging = Judge(problem, verify, warm=False)
    found = judging.everything(problem.v_start)
    count(Cost(verification_f_evals=judging.f_evals))
    f, own = problem.evaluate(found.v, found.model_z), found.model_output
    finite = torch.isfinite(found.output).all(1)
    return Verdict(
        (own.argmax(1) != y) | ~torch.isfinite(own).all(1),  # NaN is no right answer
        (found.output.argmax(1) != y) | ~finite,
        found.converged & finite,
        -found.value,
        -found.model_value,
        relative(f - found.model_z, f),
        found.residual,
    )
