"""What a method knows at one v, shows its callback, and says where it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.equilibrium.state import relative, row_norm

Stop = Callable[[object], Tensor]


class Progress(NamedTuple):
    """What a callback sees after every evaluation.

    Attributes:
        iteration: from 0 on.
        v: the variable, flat, ``(problems, d)``.
        gradient: of the objective by v, ``(problems, d)``.
        loss: running objective, ``(rows,)``.
        z_residual: ``‖f(z) − z‖ / ‖f(z)‖``, ``(rows,)``.
        z: state, flat, ``(rows, n)``.
        mu_residual: ``‖J_zᵀμ + ∂ℓ/∂z − μ‖ / ‖μ‖``, ``(rows,)``. Near 1 the gradient is one of an
            adjoint that has not settled. NaN where it is not known.
    """

    iteration: int
    v: Tensor
    gradient: Tensor
    loss: Tensor
    z_residual: Tensor
    z: Tensor
    mu_residual: Tensor


Callback = Callable[[Progress], None]


class Evaluation(NamedTuple):
    """What a method knows at one v.

    Attributes:
        loss: running objective, ``(rows,)``.
        output: what the model returned.
        gradient: of the objective by v, ``(problems, d)``.
        z: state, flat, ``(rows, n)``.
        r: ``f(z) − z``, ``(rows, n)``. Where it is not known ``(rows, 1)`` of Inf.
        fz: ``f(z)``, ``(rows, n)``. Where that is not known, z.
        dl_dz: ``∂ℓ/∂z``, ``(rows, n)``. Where that is not known, z.
        mu_residual: ``‖J_zᵀμ + ∂ℓ/∂z − μ‖ / ‖μ‖``, ``(rows,)``. NaN where it is not known.
        jz_mu: ``J_zᵀμ`` through each layer's own state, ``(rows, n)``. Where no adjoint is known
            that of μ = 0.
    """

    loss: Tensor
    output: Any
    gradient: Tensor
    z: Tensor
    r: Tensor
    fz: Tensor
    dl_dz: Tensor
    mu_residual: Tensor
    jz_mu: Tensor

    @property
    def z_residual(self) -> Tensor:
        """``‖f(z) − z‖ / ‖f(z)‖``, ``(rows,)``."""
        return relative(self.r, self.fz)

    @property
    def shift(self) -> Tensor:
        """By how much the loss at the fixed point is another, to first order, ``(rows,)``.

        With the head at f(z) it is ``μᵀJ_z (I − J_z)(z* − z)``, which is ``μᵀJ_z (f(z) − z)``.
        Where nothing is known it is 0.

        Source: the dual-weighted residual of Becker and Rannacher, Acta Numerica 10 (2001).
        """
        shift = (self.jz_mu * self.r).sum(1)
        return torch.where(shift.isfinite(), shift, 0.0)

    @property
    def shift_error(self) -> Tensor:
        """How wrong :attr:`shift` is for each unit that ``(I − J_z)⁻¹`` amplifies, ``(rows,)``.

        It is ``‖J_zᵀμ + ∂ℓ/∂z − μ‖ ‖f(z) − z‖``.
        """
        unsettled = self.mu_residual * row_norm(self.jz_mu + self.dl_dz)
        unsettled = torch.where(unsettled.isfinite(), unsettled, row_norm(self.dl_dz))
        return unsettled * row_norm(self.r)


class Followed(NamedTuple):
    """The last gradient that was followed in a ball.

    Attributes:
        gradient: it, ``(problems, d)``.
        near: problems whose v has hardly moved since, bool ``(problems,)``.
        slow: problems with a row in which z and μ were settled at each v, because plain steps
            creep there or lead away, bool ``(problems,)``.
    """

    gradient: Tensor
    near: Tensor
    slow: Tensor


@dataclass
class MethodResult:
    """Where a method ended. Flat tensors, and losses that nobody has verified.

    Attributes:
        v: last iterate, ``(problems, d)``.
        z: state there, ``(rows, n)``.
        mu: adjoint μ from before the last step on v, ``(rows, n)``.
        jz_mu: ``J_zᵀμ`` of it, ``(rows, n)``. With the ∂ℓ/∂z of where v is now it makes the next μ.
        v_best: iterate of least running loss, ``(problems, d)``. After mixing it is the last whose
            gain was beyond doubt.
        loss_best: its running loss, ``(problems,)``. After mixing it is a bound on its objective.
        v_sure: of the iterates at which z was solved for from the initial state, that of least
            loss, ``(problems, d)``.
        loss_sure: that loss, ``(problems,)``. It is inf where there was none.
        loss_first: the loss at the start, as far as the adjoint tells it where z has not settled,
            ``(problems,)``.
        shift_first: by how much that differs from the running loss, ``(problems,)``.
        error_first: :attr:`Evaluation.shift_error` at the start, ``(problems,)``. It tells how far
            off ``loss_first`` may be.
        loss_last: running loss at the last iterate that was evaluated, ``(problems,)``.
        iterations: of the loop, ``(rows,)``.
        z_residual: ``‖f(z) − z‖ / ‖f(z)‖`` before the last step on v, ``(rows,)``.
        mu_residual: the same of the adjoint equation, ``(rows,)``.
        bounded: whether ``loss_best`` is a bound.
        mu_error: estimate of the relative error of the last adjoint, ``(rows,)``. None: there is
            none.
        followed: the last gradient. None: what :attr:`jz_mu` yields is as good.
    """

    v: Tensor
    z: Tensor
    mu: Tensor
    jz_mu: Tensor
    v_best: Tensor
    loss_best: Tensor
    v_sure: Tensor
    loss_sure: Tensor
    loss_first: Tensor
    shift_first: Tensor
    error_first: Tensor
    loss_last: Tensor
    iterations: Tensor
    z_residual: Tensor
    mu_residual: Tensor
    bounded: bool = False
    mu_error: Tensor | None = None
    followed: Followed | None = None
