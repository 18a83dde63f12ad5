"""The same model with other gradients: what its layers do is set from outside, for a block.

Yang, Pang and Liu (NeurIPS 2022) break defences of DEQs that resist ready-made attacks by taking
gradients from somewhere else than the (inexact) implicit backward pass: through the unrolled
iteration, or at its intermediate states. Each of these is the same network with another solver or
gradient rule in its equilibrium layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.adjoints import Adjoint, Unrolled
from jiio_plugins.equilibrium.counting import Counter, counting_into, open_counters
from jiio_plugins.equilibrium.layer import layer_mode
from jiio_plugins.equilibrium.state import StateLayout
from jiio_plugins.joint.modes import NO_LAYER, SolveMode
from jiio_plugins.methods.base import Method, Path, Progress, Tracker

if TYPE_CHECKING:
    from jiio_plugins.constraints import FeasibleSet
    from jiio_plugins.equilibrium.solvers import Solver
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.base import Callback, Stop


@dataclass(frozen=True, kw_only=True)
class Backpropagated(Method):
    """Projected gradient steps along what autograd gives for the mean loss over some *views*.

    ``v⁺ = Π(v + α_k ε d(∇_v (1/m) Σ_j ℓ(h(z_j(v)))))`` with ``z_j`` the state that view j yields.
    Steps, projection and final check are those of :class:`jiio_plugins.Joint` and
    :class:`jiio_plugins.Nested`: only the gradient differs, which is what is to be compared.

    Args:
        views: gradient rules. ``(None,)``, the default: the model's own, as any attack of another
            library would use it. ``(Unrolled(steps=30),)``: through the unrolled iteration.
            ``(Unrolled(steps=2), Unrolled(steps=4), …)``: through intermediate states.
        solver: for rules that need one; None: the layers' own.

    Costs are what autograd did, as a mean over the rows: it treats a batch as a whole.

    Source: Madry et al. (ICLR 2018); for the views Yang, Pang and Liu, "A Closer Look at the
    Adversarial Robustness of Deep Equilibrium Models" (NeurIPS 2022).
    """

    views: tuple[Adjoint | None, ...] = (None,)
    solver: Solver | None = None
    max_iter: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.views or not all(v is None or isinstance(v, Adjoint) for v in self.views):
            raise ValueError(f"views must hold gradient rules or None, got {self.views!r}")

    def run(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        v: Tensor,
        stop: Stop | None = None,
        callback: Callback | None = None,
    ) -> Path:
        """See :class:`Method`."""
        counter = Counter()
        track = Tracker(problem, v, stop)
        with counting_into((*open_counters(), counter)):
            for k, step in enumerate(self.steps(feasible, v)):
                leaf = v.detach().requires_grad_()
                losses = []
                for rule in self.views:
                    view = SolveMode(self.solver, rule)
                    with layer_mode(view):
                        output = problem.variable.call(leaf)
                    if not view.z:
                        raise ValueError(NO_LAYER)
                    losses.append(problem.loss(output))
                loss = torch.stack(losses).mean(0)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                z = torch.cat(view.z, dim=1).detach()
                unknown = torch.full_like(z[:, :1], torch.inf)  # no residual: the start is judged
                track.see(v, loss, output, unknown, unknown, track.active)
                if callback is not None:
                    callback(Progress(k, v, gradient, loss.detach(), unknown[:, 0], z))
                v_next = feasible.project(v + step * feasible.descent_direction(gradient, v))
                v = track.move(v, v_next)
                if track.all_done():
                    break
        problem.layout = StateLayout(view.layouts)
        problem.pay(counter.f_evals / problem.rows, counter.vjps / problem.rows)
        mu = torch.zeros_like(z)
        none = torch.zeros(problem.rows, device=v.device)
        return track.path(v, z, mu, mu, none, none)


def through_unrolled(steps: int = 30, *, max_iter: int = 20) -> Backpropagated:
    """PGD through ``steps`` plain iterations from the initial state."""
    return Backpropagated(views=(Unrolled(steps=steps),), max_iter=max_iter)


def through_intermediate(
    states: tuple[int, ...] = (2, 4, 8, 16), *, max_iter: int = 20
) -> Backpropagated:
    """PGD on the mean loss at several states of the unrolled iteration."""
    return Backpropagated(views=tuple(Unrolled(steps=k) for k in states), max_iter=max_iter)
