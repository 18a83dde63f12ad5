"""JIIO: state, adjoint and variable advance together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from jiio_plugins.constraints import FeasibleSet
from jiio_plugins.equilibrium.state import relative, row_norm
from jiio_plugins.joint.problem import Problem
from jiio_plugins.methods.base import Callback, Method, Path, Progress, Stop, Tracker
from jiio_plugins.methods.mixing import MIXINGS
from jiio_plugins.methods.safeguard import Descent
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.equilibrium.solvers import FlatMap
    from jiio_plugins.joint.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Joint(Method):
    """JIIO: z, μ and v advance together; no solve is run to its end.

    One iteration at ``(z, w, v)``, where ``w`` stands for ``J_zᵀμ`` and ω = ``relaxation``::

        z ← z + ω (f(z, v) − z)            state_steps times, the last one with its graph and with
                                           what comes before and after the layer
        μ = w + ∂ℓ/∂z at f(z, v)           the head's gradient is free: it needs no VJP of f
        w ← J_zᵀ μ                         one VJP, which yields J_vᵀμ too; in the first
                                           adjoint_warmup iterations these two lines twice
        v ← Π(v + α d(J_vᵀμ + ∂ℓ/∂v))

    Deviations from the paper, each measured at equal cost: the adjoint carries ``J_zᵀμ`` rather
    than μ, so that it always holds the current ∂ℓ/∂z; the head sees f(z, v) rather than z, a state
    one step further that is there anyway; with a ball, two evaluations of f for each VJP
    (``state_steps=1`` is the paper's one), a second step of the adjoint while v makes its longest
    steps and μ has only just begun, z over-relaxed where the paper damps it, and no mixing over the
    history while v moves by normalised steps. The two residuals at one v tell whether ω is
    too long for a row: if a layer's second is not smaller, the row's ω is halved.

    Without a ball v settles, and the history of z, μ and v helps it to (``mixing``): by L-BFGS
    steps of v that z and μ follow along their secants
    (:class:`jiio_plugins.methods.mixing.QuasiNewton`), which goes far in few iterations; or by
    Anderson's method on all three at once as in the paper
    (:class:`jiio_plugins.methods.mixing.BlockAnderson`), which settles to more digits where z and μ
    converge slowly. An iterate that makes a problem's objective worse is taken back
    (:class:`jiio_plugins.methods.safeguard.Descent`).

    Args:
        state_steps: evaluations of f an iteration; one where there is mixing.
        adjoint_warmup: iterations at the beginning that take a second VJP; 0 where there is mixing.
        relaxation: ω in (0, 2). With one state step more than 1 counts as 1, as nothing would tell
            that it is too long; 1 where there is mixing.
        mixing: "quasi-newton" or "anderson", for problems without a ball.
        acceleration: memory of the mixing, in iterations; 0 switches it off.
        tol: without a ball: relative residual of all three blocks at which the loop stops.

    Not for: an f that is not contractive around its fixed point (the status tells), nor batch
    normalisation in train mode inside f.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 3.2.
    """

    state_steps: int = 2
    adjoint_warmup: int = 3
    relaxation: float = 1.5
    mixing: Literal["quasi-newton", "anderson"] = "quasi-newton"
    acceleration: int = 10
    tol: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation must be in (0, 2), got {self.relaxation}")
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing must be one of {', '.join(MIXINGS)}, got {self.mixing!r}")
        if not self.tol >= 0:
            raise ValueError(f"tol must not be negative, got {self.tol}")
        check_counts(self, state_steps=1, adjoint_warmup=0, acceleration=0)

    def run(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        v: Tensor,
        stop: Stop | None = None,
        callback: Callback | None = None,
    ) -> Path:
        """See :class:`Method`."""
        z = problem.warm_up(v, self.warmup)
        mix = None
        if feasible.radius is None and self.acceleration:
            mix = Descent(MIXINGS[self.mixing](self.acceleration), problem.groups)
        relaxation = self.relaxation if mix is None else 1.0
        # with one state step there is no second residual at the same v that could halve it
        longest = 1.0 if self.state_steps == 1 else 2.0
        omega = torch.full_like(z[:, :1], min(relaxation, longest))
        track = Tracker(problem, v, stop)
        w = torch.zeros_like(z) if problem.jz_mu_start is None else problem.jz_mu_start
        mu_accepted = torch.zeros_like(z)
        for k, step in enumerate(self.steps(feasible, v)):
            active = track.active
            before = None
            if k > 0 and mix is None and self.state_steps > 1 and z.shape[1]:
                before = _StateSteps(self.state_steps - 1, omega)
                problem.pay_passes(f_evals=before.steps * active)
            lin = problem.linearize(v, z, advance=before)
            z = z if before is None else lin.z
            loss = problem.loss(lin.output)
            b, direct = lin.gradient(loss)
            mu = w + b
            if mix is None and k < self.adjoint_warmup:
                w = _finite(lin.jz_mu(mu), w)
                mu = w + b
                problem.pay_passes(vjps=active)
            jz_mu, jv_mu = lin.vjp(mu)
            gradient = (direct + jv_mu).reshape(v.shape)
            problem.pay_passes(f_evals=active, vjps=active)
            r = lin.f - z
            track.see(v, loss, lin.output, b, r, active)
            if callback is not None:
                callback(Progress(k, v, gradient, loss.detach(), relative(r, lin.f), z))
            w_before = w
            v_next = feasible.project(v + step * feasible.descent_direction(gradient, v))
            if mix is None:
                size = row_norm(r)
                if before is not None:
                    assert problem.layout is not None
                    shrank = before.shrank(problem.layout.split(r))
                    omega = torch.where(shrank, omega, (omega / 2).clamp(min=0.1))
                z = _step(z, omega, r, size)
                w = _finite(jz_mu, w)
            else:
                change = jz_mu - w
                value = problem.groups.sum(loss.detach() + (lin.own_jz_mu * r).sum(1))
                doubt = problem.groups.sum(row_norm(change) * row_norm(r))
                z_next, w_next, v_next = mix((z, w, v), (r, change, v_next - v), value, doubt)
                mu_accepted = mix.unless_worse(mu_accepted, mu)
                track.settle(mix.below(self.tol))
                z, w = track.keep(z, z_next), track.keep(w, w_next)
                v_next = feasible.project(v_next)
            v = track.move(v, v_next)
            if track.all_done():
                break
        z_residual, mu_residual = relative(r, lin.f), relative(jz_mu - w_before, mu)
        if mix is not None:  # the last trial has not been evaluated: it may be worse
            z, w, v = mix.accepted
            path = track.path(v, z, mu_accepted, w, z_residual, mu_residual)
            return replace(path, v_best=mix.safe_v, loss_best=mix.safe_limit, bounded=True)
        return track.path(v, z, mu, w, z_residual, mu_residual)


class _StateSteps:
    """Steps on z where a layer is called, so that the rest of the network runs once for all.

    Attributes:
        sizes: of each layer, ‖f(z) − z‖ before the last of them, ``(rows,)``.
    """

    def __init__(self, steps: int, omega: Tensor) -> None:
        self.steps, self.omega = steps, omega
        self.sizes: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, f: FlatMap, z: Tensor) -> Tensor:
        """One layer's flat state, taken on."""
        for _ in range(self.steps):
            r = f(z) - z
            size = row_norm(r)
            z = _step(z, self.omega, r, size)
        self.sizes.append(size)
        return z

    def shrank(self, r: Sequence[Tensor]) -> Tensor:
        """Rows in which every layer's residual ``r`` is smaller than before, ``(rows, 1)``.

        Each by itself: a later layer starts with the jump of what goes into it, and that it
        shrinks says nothing about an earlier one.
        """
        smaller = [row_norm(now) < size for now, size in zip(r, self.sizes, strict=True)]
        return torch.stack(smaller, dim=1).all(1, keepdim=True)


def _finite(new: Tensor, old: Tensor) -> Tensor:
    """``new``; ``old`` for a row in which it holds NaN or Inf."""
    return torch.where(torch.isfinite(row_norm(new))[:, None], new, old)


def _step(z: Tensor, omega: Tensor, r: Tensor, size: Tensor) -> Tensor:
    """``z + ω r``; z for a row in which ‖r‖ = ``size`` says that r holds NaN or Inf."""
    return torch.where(torch.isfinite(size)[:, None], torch.addcmul(z, omega, r), z)


def check_method(method: Method | None, name: str = "method") -> Method:
    """The method, :class:`Joint` for None; TypeError for anything else."""
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"{name} must be Joint(...) or Nested(...), got {method!r}")
    return method if method is not None else Joint()
