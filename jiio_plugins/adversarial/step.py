"""Adversarial training of an equilibrium classifier: one step, for any training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from jiio_plugins.envelope import JointSolution, Refine, envelope_pass, joint_solution, refiner
from jiio_plugins.equilibrium.mode import layer_mode
from jiio_plugins.equilibrium.state import StateLayout
from jiio_plugins.joint.inputs import check_input
from jiio_plugins.joint.modes import PenaltyMode, SolveMode
from jiio_plugins.joint.problem import FlatState
from jiio_plugins.methods.base import Method
from jiio_plugins.methods.joint import Joint
from jiio_plugins.threat_model import ThreatModel
from jiio_plugins.utils.checks import check_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from jiio_plugins.constraints import Constraint
    from jiio_plugins.methods.records import Progress

    LossRows = Callable[[Any, Tensor], Tensor]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Two evaluations of f an iteration, unless z is well ahead of μ: where z lags behind x, a cell
# learns to classify before it has converged. Of the warm-up two will do: the loss found is the
# same. Longer steps on the images, the default of so short a run, leave z too far behind.
TRAINING_METHOD = Joint(max_iter=7, step_size=2.0, warmup=2, adjoint_warmup=6, relaxation=1.2)


# From images that an earlier search left, which are hard already. Steps of ε from the first to the
# last: there is nothing to explore. With fewer than three the model learns to beat the search.
CARRIED_METHOD = Joint(
    max_iter=3,
    warmup=3,
    max_state_steps=3,
    adjoint_warmup=2,
    relaxation=1.2,
    step_size=1.0,
    final_step_size=1.0,
)


# ρ² up to which a cell is left alone: a search keeps up with z there. A weight on all of it takes
# off what the model learns, and one that follows the residuals comes too late on some cells.
_EASY = 0.4

CARRIED_REFINE = (3, 0)  # z follows the last step on x, as long as the others


def cross_entropy_rows(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample, ``(rows,)``.

    Args:
        output: logits, ``(rows, classes)``.
        labels: classes ``(rows,)``, or probabilities ``(rows, classes)``.

    Raises:
        TypeError: labels that are neither.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    classes = labels.ndim == 1 and labels.dtype in _INTEGERS
    if not classes and (not labels.is_floating_point() or labels.shape != output.shape):
        raise TypeError(
            f"labels must be classes, integers (rows,), or probabilities {tuple(output.shape)}, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    target = labels.long() if classes else labels.to(output.dtype)
    return cross_entropy(output, target, reduction="none")


def likeliest(labels: Tensor) -> Tensor:
    """Labels as classes, ``(rows,)``: of probabilities the likeliest.

    Args:
        labels: classes ``(rows,)``, or probabilities ``(rows, classes)``.
    """
    return labels.argmax(1) if labels.is_floating_point() and labels.ndim == 2 else labels


@dataclass(frozen=True)
class AdversarialStep:
    """What one training step computed.

    Attributes:
        loss: scalar with a graph: call ``backward()``.
        robust: attacked samples classified correctly at their adversarial example, bool
            ``(attacked,)``. They are the first ones of the batch.
        clean: the same at the image itself, bool ``(rows,)``. None where the step never looked
            there (random or carried starts without TRADES).
        output: the model's at the examples, detached.
        solution: of the inner problem. ``solution.x`` are the adversarial examples.
        residual: relative residual of z where the gradient is taken, after the refinement of z,
            ``(rows,)``. Without one that of the search, from before its last step on x.
        penalty: the Jacobian penalty, a detached scalar. None without one.
        _passed: what :meth:`ahead` needs. None unless it was asked for.
    """

    loss: Tensor
    robust: Tensor
    clean: Tensor | None
    output: Tensor
    solution: JointSolution
    residual: Tensor
    penalty: Tensor | None = None
    _passed: _Passed | None = field(default=None, repr=False)

    def ahead(self) -> Tensor:
        """The examples one step of ε further, where the next search for these samples may start.

        ``project(x + ε d)``, d being the direction of length one in which the loss rises fastest.
        The pass that makes the gradient of the parameters makes that of its input as well, at the
        best z and μ of the step. So this step costs no evaluation of f and no VJP.

        Returns:
            Images, shaped like x. A sample that was not attacked stays where it is.

        Raises:
            RuntimeError: ``loss.backward()`` has not been called, or the step was made without
                ``ahead=True``.

        Source: the gradient of a parameter update put to use for the input, Shafahi et al.,
        "Adversarial training for free!" (NeurIPS 2019).
        """
        if self._passed is None:
            raise RuntimeError(
                "ahead() needs the gradient at the examples: training(..., ahead=True)"
            )
        return self._passed.ahead()


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """``min_θ mean_i max_{x_i ∈ C_i} L(model_θ(x_i), y_i)``, the inner problem solved jointly.

    ``C_i = {‖x − x_i‖_p ≤ ε, lower ≤ x ≤ upper}``. Where the joint loop ends, the gradient is one
    more VJP (:func:`jiio_plugins.envelope_loss`). With TRADES the loss is
    ``L(model(x_i), y_i) + β max_x KL(p(x_i) ‖ p(x))`` instead. Its clean pass uses the solver and
    the gradient rule that the layer carries.

    Args:
        norm: 1, 2 or inf.
        eps: ε in the units of x.
        lower: least pixel value, a number or broadcastable to x. None: no bound.
        upper: largest pixel value, likewise.
        method: of the inner problem. The default is
            ``Joint(max_iter=7, step_size=2.0, warmup=2, adjoint_warmup=6, relaxation=1.2)``: short,
            and with shorter steps and less over-relaxation than an attack. That keeps z nearer to
            its fixed point while it is trained.
        random_start: start in the ball at random instead of at the image. TRADES always does.
        ratio: share of each batch that is attacked, in (0, 1]. The rest stays clean.
        trades: β. None: no TRADES.
        refine: further steps on z and μ before the gradient, see
            :func:`jiio_plugins.envelope_loss`.
        jacobian_weight: weight of a penalty of J_z at a random iterate of the joint loop, see
            :func:`jiio_plugins.jacobian_penalty`. It keeps the cell easy to solve. None: 1, of what
            the penalty of a layer exceeds 0.4 by, which with power steps is near ρ². 0: without,
            for a cell that stays easy by itself. Others lose their fixed point.
        jacobian_probes: random probes in it.
        jacobian_power: power steps that turn each probe to where the cell contracts least. 0: none,
            a Hutchinson estimate of ``‖J_z‖²_F / n``.
        loss: ``loss(output, labels) -> (rows,)``.

    Raises:
        TypeError, ValueError: bad parameters or input.

    Example:
        >>> training = AdversarialTraining(norm=2, eps=0.3, lower=0.0, upper=1.0)
        >>> step = training(model, x, y)
        >>> step.loss.backward()
        >>> optimizer.step()
        >>> step.clean.tolist(), step.robust.tolist()
        ([True, True, True, True], [False, True, True, True])

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.3. Madry et al. (ICLR
    2018). TRADES: Zhang et al. (ICML 2019), eq. 5. Penalty: Bai, Koltun and Kolter (ICML 2021).
    """

    norm: float
    eps: float
    lower: float | Tensor | None = None
    upper: float | Tensor | None = None
    method: Method = TRAINING_METHOD
    random_start: bool = False
    ratio: float = 1.0
    trades: float | None = None
    refine: Refine = 0
    jacobian_weight: float | None = None
    jacobian_probes: int = 1
    jacobian_power: int = 4
    loss: LossRows = cross_entropy_rows

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", self.threat.norm)
        eps: object = self.eps
        if not isinstance(eps, Real):
            raise TypeError(
                f"eps must be a number, the same for all samples, got {type(self.eps).__name__}"
            )
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, got {self.eps}")
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be Joint(...) or Nested(...), got {self.method!r}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        for name in ("trades", "jacobian_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        check_counts(self, jacobian_probes=1, jacobian_power=0)
        refiner(self.refine, torch.float32)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        *,
        wrapped: nn.Module | None = None,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
        ahead: bool = False,
    ) -> AdversarialStep:
        """The loss of one batch.

        Args:
            model: returns logits ``(rows, classes)``, or what ``loss`` takes. The search runs in
                eval mode, the passes with gradients keep the flags as they are.
            x: images ``(rows, ...)`` inside the box.
            labels: ``(rows,)``, or what ``loss`` takes. The default also takes probabilities
                ``(rows, classes)``.
            wrapped: what the passes with parameter gradients call, if that is not the model itself:
                a wrapper of it for several processes. A DistributedDataParallel model needs none.
            generator: of random starts, the Jacobian penalty and its iterate, on x's device. None:
                the global one.
            start: where the search starts, shaped like x, projected on the set: the images that an
                earlier search for the same samples ended with. See :meth:`carried`. None: where
                this step starts by itself.
            ahead: let ``loss.backward()`` leave what :meth:`AdversarialStep.ahead` needs.

        Raises:
            TypeError, ValueError: bad input.
        """
        x = check_input(x)
        entries = 0 if isinstance(labels, Tensor) and not labels.ndim else len(labels)
        if entries != len(x):
            raise ValueError(f"labels must hold one entry per sample ({len(x)}), got {entries}")
        outer = model if wrapped is None else wrapped
        attacked = math.ceil(self.ratio * len(x))
        region = self.region(x, attacked)
        clean = state = None
        if start is None:
            start = self.start(x, generator, region)
        if self.trades is not None:
            mode = SolveMode()  # each layer's own solver and gradient rule
            with layer_mode(mode):
                clean = outer(x)
            state = FlatState(StateLayout(mode.layouts), torch.cat(mode.z, dim=1).detach())
        search = self.adversary(labels, None if clean is None else clean.detach())
        penalised = self.jacobian_weight is None or self.jacobian_weight > 0
        iterate = _RandomIterate(self.method.max_iter, generator) if penalised else None
        solution = joint_solution(
            model,
            x,
            search,
            method=self.method,
            constraint=region,
            start=start,
            state=state,
            callback=iterate,
        )
        passed = _Passed(solution.x, region, x, self.eps) if ahead else None
        values, output, residual = envelope_pass(
            outer,
            solution if passed is None else replace(solution, x=passed.x),
            self.adversary(labels, clean),
            refine=self.refine,
        )
        total = -values.mean()
        if self.trades is not None:
            total = self._loss(clean, labels).mean() + self.trades * total
        penalty = None
        if iterate is not None:
            states = solution.flat.layout.split(iterate.z)
            pass_ = PenaltyMode(states, self.jacobian_probes, generator, self.jacobian_power)
            with layer_mode(pass_):
                outer(iterate.x.reshape(x.shape))
            penalty = pass_.value
            total = total + self._penalised(pass_.values)
        if clean is None and start is None:
            clean = search.first
        return AdversarialStep(
            loss=total,
            robust=_correct(output, labels)[:attacked],
            clean=None if clean is None else _correct(clean, labels),
            output=output.detach(),
            solution=solution,
            residual=solution.z_residual if residual is None else residual,
            penalty=None if penalty is None else penalty.detach(),
            _passed=passed,
        )

    def carried(self) -> AdversarialTraining:
        """The step for searches that take up earlier ones, by ``start=``.

        The same with ``method=Joint(max_iter=3, warmup=3, max_state_steps=3, adjoint_warmup=2,
        relaxation=1.2, step_size=1.0, final_step_size=1.0)`` and, if there is no ``refine``,
        ``refine=(3, 0)``.
        Measured under L2 balls.

        Source: Zheng, Zhang, Gu, Chellappa and Luo, "Efficient adversarial training with
        transferable adversarial examples" (CVPR 2020).
        """
        return replace(self, method=CARRIED_METHOD, refine=self.refine or CARRIED_REFINE)

    def start(
        self, x: Tensor, generator: torch.Generator | None = None, region: Constraint | None = None
    ) -> Tensor | None:
        """Where a search starts by itself, shaped like x. None: at x.

        Args:
            x: images ``(rows, ...)``.
            generator: of a random start. None: the global one.
            region: the set that it is drawn in. None: ``self.region(x)``.
        """
        if not self.random_start and self.trades is None:
            return None
        region = self.region(x) if region is None else region
        return region.bind(x.detach()).sample(generator).reshape(x.shape)

    def settings(self) -> dict[str, Any]:
        """The parameters as plain values. The loss is there by its name, or how it prints."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        name = getattr(self.loss, "__name__", repr(self.loss))
        for key in ("method", "lower", "upper", "refine"):
            values[key] = repr(values[key])
        return {**values, "loss": name}

    def _penalised(self, penalties: list[Tensor]) -> Tensor:
        """What the loss gets of the layers' Jacobian penalties."""
        each = torch.stack(penalties)
        if self.jacobian_weight is not None:
            return self.jacobian_weight * each.sum()
        return (each - _EASY).clamp(min=0).sum()

    def _loss(self, output: Any, labels: Tensor) -> Tensor:
        try:
            return self.loss(output, labels)
        except IndexError as error:
            raise ValueError(
                f"the loss does not take these labels for logits of shape {tuple(output.shape)}: "
                f"{error} Integer labels go from 0 to classes - 1"
            ) from error

    def adversary(self, labels: Tensor, clean: Tensor | None = None) -> _Adversary:
        """The objective of the inner problem. With clean logits it is that of TRADES.

        Args:
            labels: ``(rows,)``, or what ``loss`` takes.
            clean: logits of the images, ``(rows, classes)``. None: no TRADES.
        """
        if clean is None:
            return _Adversary(lambda output: self._loss(output, labels))
        target = log_softmax(clean, dim=1)

        def divergence(output: Tensor) -> Tensor:
            own = log_softmax(output, dim=1)
            return kl_div(own, target, reduction="none", log_target=True).sum(1)

        return _Adversary(divergence)

    @property
    def threat(self) -> ThreatModel:
        """Ball and box."""
        return ThreatModel(norm=self.norm, eps=self.eps, lower=self.lower, upper=self.upper)

    def region(self, x: Tensor, attacked: int | None = None) -> Constraint:
        """Ball and box around x.

        Args:
            x: images ``(rows, ...)`` inside the box.
            attacked: rows from here on have a ball of radius 0. None: all rows are attacked.

        Raises:
            ValueError: x lies outside of the box.
        """
        threat = self.threat
        if attacked is not None and attacked < len(x):
            there = (torch.arange(len(x), device=x.device) < attacked).to(x.dtype)
            threat = threat.within(self.eps * there)
        return threat.around(x)


class _Passed:
    """The examples as the pass with gradients saw them, and where they may go from there."""

    def __init__(self, x: Tensor, region: Constraint, images: Tensor, eps: float) -> None:
        self.x = x.detach().requires_grad_()
        self.region, self.images, self.eps = region, images, eps

    def ahead(self) -> Tensor:
        """See :meth:`AdversarialStep.ahead`."""
        if self.x.grad is None:
            raise RuntimeError(
                "ahead() finds no gradient at the examples: call loss.backward() first; if it was "
                "called, the model detaches its input"
            )
        set_ = self.region.bind(self.images.detach())
        v, gradient = self.x.detach().flatten(1), self.x.grad.flatten(1)
        # a gradient scaler may let a pass overflow, and skips the parameters' step then
        broken = ~torch.isfinite(gradient).all(1, keepdim=True)
        direction = set_.descent_direction(-gradient, v)
        there = torch.where(broken, v, set_.project(v + self.eps * direction))
        return there.reshape(self.x.shape)


class _Adversary:
    """The objective of the inner problem, minus what the adversary maximises.

    Attributes:
        first: the first output it saw, that of where the search started. None before.
    """

    def __init__(self, maximised: Callable[[Tensor], Tensor]) -> None:
        self.maximised = maximised
        self.first: Tensor | None = None

    def __call__(self, output: Tensor) -> Tensor:
        if self.first is None:
            self.first = output.detach()
        return -self.maximised(output)


class _RandomIterate:
    """A callback that keeps one iterate of the loop, drawn beforehand."""

    def __init__(self, iterations: int, generator: torch.Generator | None) -> None:
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(iterations, (), generator=generator, device=device)
        self.chosen = int(drawn)

    def __call__(self, progress: Progress) -> None:
        if progress.iteration <= self.chosen:  # the loop may end before it
            self.x, self.z = progress.v.detach(), progress.z.detach()


def _correct(output: Tensor, labels: Tensor) -> Tensor:
    return output.detach().argmax(1) == likeliest(labels)
