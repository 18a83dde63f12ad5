"""The same model with the gradients of autograd, taken at one state of a solve or another.

Yang, Pang and Liu (NeurIPS 2022) break defences of DEQs that resist ready-made attacks. They take
gradients from somewhere else than the inexact implicit backward pass: through the unrolled
iteration, or at its intermediate states. Each of these is the same network with another solver or
gradient rule in its equilibrium layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins.equilibrium.adjoints import Adjoint, Unrolled
from jiio_plugins.equilibrium.counting import Counter, counting_into
from jiio_plugins.joint.modes import SolveMode
from jiio_plugins.methods.base import Method
from jiio_plugins.methods.records import Evaluation
from jiio_plugins.methods.round import Iteration

if TYPE_CHECKING:
    from jiio_plugins.equilibrium.solvers import Solver
    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.best import BestSoFar
    from jiio_plugins.methods.records import MethodResult


@dataclass(frozen=True, kw_only=True)
class Backpropagated(Method):
    """Projected gradient steps along what autograd gives for the mean loss over some *views*.

    ``v⁺ = Π(v + α_k ε d(∇_v (1/m) Σ_j ℓ(h(z_j(v)))))`` with ``z_j`` the state that view j yields, h
    the head and d the steepest descent direction of length one. Steps, projection and final check
    are those of :class:`jiio_plugins.Joint` and :class:`jiio_plugins.Nested`. Only the gradient
    differs, which is what is to be compared.

    Costs are what autograd did, as a mean over the rows: it treats a batch as a whole.

    Args:
        max_iter: steps on v.
        step_size: α_0 in units of ε, a number or one per problem. Without a ball α, in units of
            v²/objective. None: 2.0 with a ball, but 30 / max_iter up to 3.0 in an L2 ball, and 0.1
            without one.
        final_step_size: α at the last step, in the same units. None: with a ball 0.8 / max_iter of
            step_size (of 2.0, where that is None), without one step_size.
        warmup: unused. Every view solves from the layer's initial state.
        precision: dtype in which the model runs under autocast. None: as it is.
        gap_tol: with a ball: a problem leaves where its v is at rest, see :class:`Method`. 0, the
            default, takes all steps, as PGD does.
        views: gradient rules. ``(None,)``, the default, is the model's own, as any attack of
            another library would use it. ``(Unrolled(steps=30),)`` goes through the unrolled
            iteration, ``(Unrolled(steps=2), Unrolled(steps=4), …)`` through intermediate states.
        solver: for rules that need one. None: the layers' own.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range, or views that are no gradient rules.

    Source: Madry et al. (ICLR 2018). For the views Yang, Pang and Liu, "A Closer Look at the
    Adversarial Robustness of Deep Equilibrium Models" (NeurIPS 2022).
    """

    views: tuple[Adjoint | None, ...] = (None,)
    solver: Solver | None = None
    max_iter: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.views or not all(v is None or isinstance(v, Adjoint) for v in self.views):
            raise ValueError(f"views must hold gradient rules or None, got {self.views!r}")

    def start(self, problem: Problem) -> Iteration:
        """See :class:`Method`."""
        return _BackpropagatedIteration(self, problem)


class _BackpropagatedIteration(Iteration):
    """One pass forward and back for each view. Nothing is kept from one v to the next."""

    def __init__(self, method: Backpropagated, problem: Problem) -> None:
        self.method, self.problem = method, problem
        self.counter = Counter()
        self.mu_residual = torch.zeros(problem.rows, device=problem.v_start.device)

    def evaluate(self, k: int, v: Tensor, active: Tensor) -> Evaluation:
        """See :class:`Iteration`."""
        problem, leaf, losses = self.problem, v.detach().requires_grad_(), []
        with counting_into((self.counter,)):  # here autograd solves, and reports to counters
            for rule in self.method.views:
                view = SolveMode(self.method.solver, rule)
                output = problem.run_layers(view, leaf)
                losses.append(problem.loss(output))
            loss = torch.stack(losses).mean(0)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        self.z = torch.cat(view.z, dim=1).detach()
        unknown = torch.full_like(self.z[:, :1], torch.inf)  # no residual: the start is judged
        loss = loss.detach()
        nan = torch.full_like(loss, torch.nan)
        none = torch.zeros_like(self.z)
        return Evaluation(loss, output, gradient, self.z, unknown, self.z, self.z, nan, none)

    def gradient_error(self, at: Evaluation) -> Tensor:
        """See :class:`Iteration`. There is none: it is the gradient of what was computed."""
        return torch.zeros_like(at.mu_residual)

    def finish(self, at: Evaluation, v: Tensor, best: BestSoFar) -> MethodResult:
        """See :class:`Iteration`. Autograd treats a batch as a whole, so rows share the cost."""
        self.mu = self.jz_mu = torch.zeros_like(self.z)
        counter, rows = self.counter, self.problem.rows
        self.problem.pay(counter.f_evals / rows, counter.vjps / rows)
        self.mu_residual = torch.full_like(self.mu_residual, counter.worst_adjoint_residual)
        return super().finish(at, v, best)


def through_unrolled(steps: int = 30, *, max_iter: int = 20) -> Backpropagated:
    """PGD through plain iterations from the initial state.

    Args:
        steps: iterations of f, all with their graph.
        max_iter: steps on v.
    """
    return Backpropagated(views=(Unrolled(steps=steps),), max_iter=max_iter)


def through_intermediate(
    states: tuple[int, ...] = (2, 4, 8, 16), *, max_iter: int = 20
) -> Backpropagated:
    """PGD on the mean loss at several states of the unrolled iteration.

    Args:
        states: numbers of the iterations of f after which the loss is taken. Each has an unrolled
            pass of its own.
        max_iter: steps on v.
    """
    return Backpropagated(views=tuple(Unrolled(steps=k) for k in states), max_iter=max_iter)
