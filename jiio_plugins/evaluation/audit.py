"""Signs that accuracy under attack is high because the attacks fail, not because the model holds.

Two kinds. The *passive* ones are read off what a suite has found. The *active* ones are a
controlled experiment on a few samples. It takes the same projected gradient steps from the same
start, and varies nothing but the gradient, the number of steps or the radius.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jiio_plugins.attacks import attack, is_adversarial
from jiio_plugins.equilibrium.adjoints import Implicit
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.evaluation.report import Finding, paired_shares, wilson
from jiio_plugins.joint.modes import layers_as
from jiio_plugins.losses import attack_objective
from jiio_plugins.methods.backpropagated import (
    Backpropagated,
    through_intermediate,
    through_unrolled,
)
from jiio_plugins.methods.joint import Joint
from jiio_plugins.utils.console import progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jiio_plugins.equilibrium.solvers import Solver
    from jiio_plugins.evaluation.attack import Attack
    from jiio_plugins.solution import Solution
    from jiio_plugins.threat_model import ThreatModel
    from jiio_plugins.verification import Verdict

Found = tuple[dict[str, Any], list[Finding]]

_DIFFER = 0.02  # share of samples on which model and converged solve may give different losses
_RESIDUAL = 1e-2  # relative residual, in the median, at which a model has not reached its state
_COSINE = 0.95  # between the model's own input gradient and the exact one, in the median
_EXTRA = 0.02  # share of samples that another kind of gradient may break besides, lower 95 % bound
_LOSS = 0.1  # share of the rise in loss by which another kind of gradient may be better
_ROUNDING = 1e3  # times the dtype's precision: answers nearer than this are one
_STEPS = (1, 3, 10)


def passive(
    history: Mapping[str, Verdict],
    suite: Sequence[Attack],
    attempts: Mapping[str, tuple[Tensor, Tensor]],
    undecided: int = 0,
    random: bool = False,
) -> Found:
    """What the suite's own results tell.

    Args:
        history: the judge's verdicts, "clean" and by attack.
        suite: the attacks that were run.
        attempts: by attack, the indices of the samples it was given, and which of them it broke.
        undecided: samples that count as robust but hang on an unverified example.
        random: whether the model answers anew at each call, see :func:`is_random`. No solver
            settings help then.

    Returns:
        What was measured, name -> figure, and the findings.
    """
    found = []
    differ = torch.cat([v.differ for v in history.values()])
    residual = torch.cat([v.residual for v in history.values()])
    unconverged = torch.cat([~v.converged for v in history.values()])
    share, middle = float(differ.double().mean()), float(residual.median())
    checks: dict[str, Any] = {
        "disagreement": share,
        "own_residual_median": middle,
        "own_residual_max": float(residual.max()),
        "unconverged_solves": int(unconverged.sum()),
        "undecided": undecided,
        "random": random,
    }
    if random:
        found.append(
            Finding(
                "random",
                "the model gives two answers to two calls with the same images, so that neither "
                "its own answer nor a converged solve can be relied on. Take what is random out of "
                "it (dropout that is always on, noise in cell, encoder or head, a random "
                "initial_state), or draw it from a generator of a fixed seed at each call",
            )
        )
    elif share > _DIFFER:
        found.append(
            Finding(
                "disagreement",
                f"on {100 * share:.0f} % of the judged images the model's own answer differs from "
                "that of a converged solve (loss by more than 1 %, or right against wrong): what "
                "looks robust may be the solver's error. Tighten the solver of the model's "
                "Equilibrium layers, and judge again",
            )
        )
    if not (random or middle <= _RESIDUAL):
        found.append(
            Finding(
                "inexact-solve",
                f"the model stops at a relative residual of {middle:.2g} in the median (largest "
                f"{float(residual.max()):.2g}): it is not at its fixed point, and gradients taken "
                "there are not its gradients. Raise max_iter or lower tol",
            )
        )
    if undecided and not random:
        found.append(
            Finding(
                "unverified",
                f"{undecided} samples count as robust only because the verification of an example "
                "that may break them did not converge: the accuracy is an upper bound. Raise "
                "max_iter of verify=, or use float64",
            )
        )
    for kinds, against, kind, words in (
        (
            ("unrolled", "intermediate"),
            ("implicit", "own"),
            "gradient-kind",
            "gradients through unrolled or intermediate states",
        ),
        (
            ("none",),
            ("implicit", "own", "unrolled", "intermediate"),
            "black-box",
            "attacks that use no gradient",
        ),
    ):
        extra, asked = _only_broken_by(kinds, against, suite, attempts)
        if not asked:
            continue
        checks[f"only_broken_by_{kind}"] = [extra, asked]
        if wilson(extra, asked).low > _EXTRA:
            found.append(
                Finding(
                    kind,
                    f"{words} broke {extra} of {asked} images that withstood all attacks of the "
                    f"kinds {', '.join(against)} they were given to: those gradients are masked. "
                    "Trust the accuracy of the whole suite only, and attack harder",
                )
            )
    return checks, found


@torch.no_grad()
def is_random(model: nn.Module, x: Tensor) -> bool:
    """Whether a second call gives another answer, by more than rounding.

    Args:
        model: returns a tensor.
        x: images ``(rows, ...)``.
    """
    one, two = model(x), model(x)
    size: Tensor = one.abs().max().nan_to_num()
    return bool(((two - one).abs() > _ROUNDING * torch.finfo(one.dtype).eps * size).any())


def _only_broken_by(
    kinds: Sequence[str],
    against: Sequence[str],
    suite: Sequence[Attack],
    attempts: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[int, int]:
    """Samples of both sides that only ``kinds`` broke, and samples that either side was given."""
    tried: dict[bool, set[int]] = {True: set(), False: set()}
    broke: dict[bool, set[int]] = {True: set(), False: set()}
    for a in suite:
        if a.name in attempts and a.gradient in (*kinds, *against):
            rows, broken = attempts[a.name]
            tried[a.gradient in kinds].update(rows.tolist())
            broke[a.gradient in kinds].update(rows[broken].tolist())
    return len((broke[True] & tried[False]) - broke[False]), len(tried[False] | tried[True])


def active(
    model: nn.Module, x: Tensor, y: Tensor, verify: Solver, threat: ThreatModel, progress: bool
) -> Found:
    """The controlled experiment.

    Args:
        model: returns logits ``(rows, classes)``.
        x: correctly classified images, ``(rows, ...)``. Fewer than 8 are not audited.
        y: their classes, ``(rows,)``.
        verify: solver of the independent solves.
        threat: of the attacks.
        progress: show a bar.

    Returns:
        What was measured, name -> figure, and the findings.
    """
    if len(x) < 8:
        return {"audit": f"skipped: only {len(x)} correctly classified samples"}, []
    checks: dict[str, Any] = {"audited": len(x)}
    warnings: list[Finding] = []
    with progress_bar(total=8, desc="audit", unit="test", disable=not progress) as bar:

        def search(method: Any, within: ThreatModel = threat) -> Solution:
            bar.update()
            return attack(model, x, y, **vars(within), method=method, verify=verify)

        bar.update()
        cosine = _gradient_cosine(model, x, y, verify)
        checks["gradient_cosine_median"] = cosine
        if not cosine >= _COSINE:
            warnings.append(
                Finding(
                    "inexact-gradient",
                    f"the model's own input gradient has a cosine of {cosine:.2f} (median) to the "
                    "exact one at the fixed point: attacks that use the model's backward pass "
                    "follow a wrong direction. Judge it with adjoint=Implicit() and a tight solver "
                    "(layers_as does it from outside)",
                )
            )
        if threat.eps == 0:
            return checks, warnings
        paths = {k: search(Backpropagated(max_iter=k)) for k in _STEPS}
        checks["loss_by_steps"] = {k: _mean_loss(s) for k, s in paths.items()}
        warnings += _steps(paths)
        steps = _STEPS[-1]
        others = {
            "exact": search(
                Backpropagated(
                    views=(Implicit(),), solver=Anderson(max_iter=200, tol=1e-5), max_iter=steps
                )
            ),
            "unrolled": search(through_unrolled(max_iter=steps)),
            "intermediate": search(through_intermediate(max_iter=steps)),
        }
        own = paths[steps]
        checks["accuracy_by_gradient"] = {
            name: 1 - float(is_adversarial(s, y).double().mean())
            for name, s in {"own": own, **others}.items()
        }
        checks["loss_by_gradient"] = {n: _mean_loss(s) for n, s in {"own": own, **others}.items()}
        warnings += _kinds(own, others, model, x, y)
        if threat.span < math.inf:
            anything = threat.within(threat.span, math.inf)
            survivors = ~is_adversarial(search(Joint(max_iter=20), anything), y)
            checks["accuracy_at_large_eps"] = float(survivors.double().mean())
            if bool(survivors.any()):
                warnings.append(
                    Finding(
                        "large-eps",
                        f"{int(survivors.sum())} of {len(x)} images withstand an attack that may "
                        "change every pixel to anything: the attack fails, the model does not "
                        "hold. Its gradients are masked, or model and converged solve disagree",
                    )
                )
    return checks, warnings


def _mean_loss(solution: Solution) -> float:
    assert solution.value is not None
    return float(-solution.value.double().mean())


def _gradient_cosine(model: nn.Module, x: Tensor, y: Tensor, verify: Solver) -> float:
    """Median cosine of ``∇_x`` margin by the model's backward pass and by exact solves.

    The margin's gradient, because that of the cross-entropy vanishes where the model is sure.
    """
    margin = attack_objective("margin", y)

    def gradient() -> Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            total = margin(model(leaf)).sum()
        if not total.requires_grad:  # no gradient at all is as wrong as it gets
            return torch.zeros_like(x).flatten(1)
        return torch.autograd.grad(total, leaf)[0].flatten(1)

    own = gradient()
    with layers_as(solver=verify, adjoint=Implicit()):
        exact = gradient()
    return float(cosine_similarity(own, exact, dim=1).nan_to_num(0.0).median())


def _steps(paths: Mapping[int, Solution]) -> list[Finding]:
    one, many = paths[_STEPS[0]].value, paths[_STEPS[-1]].value
    assert one is not None
    assert many is not None
    # counted, not averaged: a few images of high loss would hide what happens to the others
    rose = int((-many > -one + 1e-3 * one.abs()).sum())
    if 2 * rose > len(one):
        return []
    return [
        Finding(
            "steps",
            f"{_STEPS[-1]} gradient steps reach a higher loss than {_STEPS[0]} on only {rose} of "
            f"{len(one)} images: more steps do not strengthen the attack, so the gradients lead "
            "nowhere",
        )
    ]


def _paired(a: Solution, b: Solution) -> tuple[float, float]:
    """How much higher b's loss is in the mean, and its standard error."""
    assert a.value is not None
    assert b.value is not None
    difference = (a.value - b.value).double()
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


def _kinds(
    own: Solution, others: Mapping[str, Solution], model: nn.Module, x: Tensor, y: Tensor
) -> list[Finding]:
    with torch.no_grad():
        start = -attack_objective("cross-entropy", y)(model(x)).double().mean()
    rise = _mean_loss(own) - float(start)
    own_broke = is_adversarial(own, y).tolist()
    better = []
    for name, other in others.items():
        more = paired_shares(is_adversarial(other, y).tolist(), own_broke)
        gain, error = _paired(own, other)
        if more.low > 0 or gain > max(2 * error, _LOSS * max(rise, 0.0)):
            better.append(
                f"{name} gradients break {100 * more.value:.0f} points more images and reach a "
                f"loss {gain:.2g} higher"
            )
    if not better:
        return []
    return [
        Finding(
            "gradient-kind",
            f"with the same {_STEPS[-1]} steps as the model's own gradients, {'; '.join(better)}: "
            "its backward pass hides the direction",
        )
    ]
