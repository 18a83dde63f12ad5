"""``robust_accuracy``: a suite of attacks, judged by something else than themselves."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from jiio_plugins.equilibrium.counting import count_evaluations
from jiio_plugins.equilibrium.layer import wants_whole_batch
from jiio_plugins.equilibrium.solvers import Anderson, Solver, check_solver
from jiio_plugins.equilibrium.some_rows import REFUSALS, warn_of_refusal
from jiio_plugins.evaluation import audit as auditing
from jiio_plugins.evaluation.attack import Attack, Run
from jiio_plugins.evaluation.report import AttackResult, Interval, RobustnessReport, wilson
from jiio_plugins.joint.guard import guarded
from jiio_plugins.joint.inputs import check_input, unwrap
from jiio_plugins.threat_model import ThreatModel
from jiio_plugins.utils.checkpoint import fingerprint
from jiio_plugins.utils.console import note, progress_bar
from jiio_plugins.verification import Verdict, judge


def robust_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack | Run] | Mapping[str, Run],
    *,
    eps: float,
    norm: float,
    lower: float | Tensor | None = 0.0,
    upper: float | Tensor | None = 1.0,
    batch_size: int = 128,
    verify: Solver | None = None,
    known: Tensor | None = None,
    skip_broken: bool = True,
    audit: int = 48,
    progress: bool = True,
) -> RobustnessReport:
    """Accuracy under the worst verified case of a suite of attacks, per sample.

    ``mean_i min_a [x_a,i does not break i]`` over samples i and attacks a, with
    ``‖x_a,i − x_i‖_p ≤ ε`` and ``lower ≤ x_a,i ≤ upper``. An example breaks its sample if the
    model's own answer is wrong and so is that of an independent solve, started from the layers'
    initial state, which converged. A misclassified sample counts as broken and is never attacked.
    The report has the accuracy by either answer alone too, and its headline is the smallest.
    Nothing of the model, nor the global random generators, is changed.

    Args:
        model: returns logits ``(rows, classes)``. It has an equilibrium layer.
        x: images ``(rows, ...)``, finite, inside the box.
        y: true classes, integers ``(rows,)``.
        attacks: :class:`Attack` values, callables ``(model, x, y) -> x_adv`` or a dict name ->
            callable. :func:`default_suite` has a strong selection.
        eps: radius of the ball in the units of x.
        norm: 1, 2 or inf.
        lower: least pixel value, a number or a tensor that broadcasts over the batch. None: no
            bound.
        upper: largest pixel value, likewise.
        batch_size: samples an attack gets at a time. A model that wants all rows of its batch
            (``whole_batch=True`` of its layer, or it refuses a single image) gets just these
            batches, those that are broken already among them.
        verify: solver of the independent solves. None: Anderson to relative residual 1e-5 (1e-9 in
            float64) within 300 evaluations.
        known: images that may be adversarial, shape of x, judged before any attack is run: of a
            smaller radius (``report.worst``), or of another model.
        skip_broken: do not give an attack what earlier ones have broken. The worst case is the
            same, and much cheaper. But then only the first attack's own accuracy is known.
        audit: number of samples on which model and gradients are audited (see
            :mod:`jiio_plugins.evaluation.audit`). 0 switches it off, and with it the warnings that
            rest on it.
        progress: show progress bars.

    Returns:
        A :class:`RobustnessReport`, to ``print``, or to ``save`` as JSON.

    Raises:
        TypeError, ValueError: bad input, no equilibrium layer, no attack that can run, or one that
            returns anything but images within ball and box. The message names the attack.
        Exception: what an attack raised, if no other ran. Where others did it is left out, with a
            warning, and the report says so.

    Source: Croce and Hein (ICML 2020) for the worst case over a suite. Carlini et al., "On
    Evaluating Adversarial Robustness" (2019) for the checks.
    """
    begin = time.perf_counter()
    model = unwrap(model)
    suite = _as_suite(attacks)
    threat = ThreatModel(norm=norm, eps=float(eps), lower=lower, upper=upper)
    _check_arguments(x, y, threat, batch_size, verify, audit)
    if known is not None and (not isinstance(known, Tensor) or known.shape != x.shape):
        got = tuple(known.shape) if isinstance(known, Tensor) else type(known).__name__
        raise ValueError(f"known must hold images of the shape of x, {tuple(x.shape)}, got {got}")
    if verify is None:
        verify = Anderson(max_iter=300, tol=1e-9 if x.dtype == torch.float64 else 1e-5)
    x, y = x.detach(), y.long()
    # another library's code may seed global generators, and leave flags behind
    with guarded(model, randomness=True):
        state = _State(model, x, y, verify, batch_size)
        left_out = _left_out(suite, x, state.classes)
        suite = [attack for attack in suite if attack.name not in left_out]
        given = [] if known is None else [Attack("known", lambda model, x, y: x)]
        results: list[AttackResult] = []
        failed: dict[str, str] = {}
        for attack in given + suite:
            rows = state.still_to_attack(skip_broken)
            examples = known if attack in given else None
            try:
                results.append(_run(attack, state, rows, threat, skip_broken, progress, examples))
            except _AttackError as failure:
                failed[attack.name] = failure.why
                if len(failed) == len(suite):
                    raise failure.error from None
        _warn_of(failed)
        left_out |= failed
        suite = [attack for attack in suite if attack.name not in failed]
        undecided = int((state.doubtful & ~state.broken).sum())
        random = auditing.is_random(model, x[:batch_size])
        checks, findings = auditing.passive(state.history, suite, state.attempts, undecided, random)
        if audit and random:
            checks["audit"] = "skipped: the model is random, and its gradients are too"
        elif audit:
            chosen = state.to_audit(audit)
            more, found = auditing.active(model, x[chosen], y[chosen], verify, threat, progress)
            checks, findings = {**checks, **more}, findings + found
    n = len(x)
    shares = [_share(~wrong) for wrong in (state.broken, state.model_wrong, state.tight_wrong)]
    return RobustnessReport(
        eps=float(eps),
        norm=threat.norm,
        images=n,
        tolerance=verify.tol,
        skip_broken=skip_broken,
        clean=_share(state.correct),
        accuracy=min(shares),
        agreed_accuracy=shares[0],
        model_accuracy=shares[1],
        converged_accuracy=shares[2],
        attacks=tuple(results),
        left_out=left_out,
        unverified=int(state.unverified.sum()),
        warnings=tuple(findings),
        checks=checks,
        correct=tuple(state.correct.tolist()),
        robust=tuple((~state.broken).tolist()),
        broken_by=tuple(state.broken_by),
        worst_loss=tuple(state.worst_loss.tolist()),
        seconds=time.perf_counter() - begin,
        fingerprint=fingerprint(x, y),
        worst=state.worst,
    )


class _State:
    """The worst case so far. Every tensor has one entry per sample.

    Attributes:
        classes: of the model.
        whole: whether the model wants the batches that ``batch_size`` cuts, and no part of them. A
            layer says so, or the model has refused the first image alone.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, verify: Solver, batch_size: int
    ) -> None:
        self.model, self.x, self.y, self.verify = model, x, y, verify
        self.batch_size = batch_size
        self.worst = x.clone()
        parts = [
            judge(model, x[rows], y[rows], verify) for rows in self.batches(torch.arange(len(x)))
        ]
        clean = Verdict.join(parts)
        self.correct = ~clean.broken
        self.broken = clean.broken.clone()
        self.model_wrong, self.tight_wrong = clean.model_wrong.clone(), clean.tight_wrong.clone()
        self.unverified, self.doubtful = ~clean.converged, clean.doubtful.clone()
        self.worst_loss = torch.where(clean.converged, clean.loss, -torch.inf)
        self.broken_by: list[str | None] = ["clean" if b else None for b in self.broken.tolist()]
        self.history = {"clean": clean}
        self.attempts: dict[str, tuple[Tensor, Tensor]] = {}
        # only now: a model may keep what belongs to the first batch that it sees
        self.whole = wants_whole_batch(model)
        self.classes = self._classes()

    @torch.no_grad()
    def _classes(self) -> int:
        if not self.whole:
            try:
                return int(self.model(self.x[:1]).shape[1])
            except REFUSALS as error:
                warn_of_refusal("the model", error, stacklevel=5)
                self.whole = True
        return int(self.model(self.x[: self.batch_size]).shape[1])

    def still_to_attack(self, skip_broken: bool) -> Tensor:
        """Indices of the samples that the next attack gets."""
        rows = self.correct & ~(self.broken & skip_broken)
        return (rows | self.whole).nonzero().squeeze(1)

    def to_audit(self, most: int) -> Tensor:
        """Indices of the samples that are audited."""
        if self.whole:
            return self.batches(torch.arange(len(self.x)))[0]
        return self.correct.nonzero().squeeze(1)[:most]

    def batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Sample indices, split."""
        parts: tuple[Tensor, ...] = rows.to(self.x.device).split(self.batch_size)
        return parts

    def take(self, rows: Tensor, found: Tensor, verdict: Verdict, name: str) -> None:
        """Take in one batch of examples."""
        self.model_wrong[rows] |= verdict.model_wrong
        self.tight_wrong[rows] |= verdict.tight_wrong & verdict.converged
        self.unverified[rows] |= ~verdict.converged
        self.doubtful[rows] |= verdict.doubtful
        new = verdict.broken & ~self.broken[rows]
        # a broken case beats any unbroken one, and among equals the higher loss, if it is verified
        same = verdict.broken == self.broken[rows]
        higher = verdict.converged & (verdict.loss > self.worst_loss[rows])
        better = new | (same & higher)
        at = rows[better]
        self.worst[at] = found[better]
        self.worst_loss[at] = verdict.loss[better]
        self.broken[rows] |= verdict.broken
        for i in rows[new].tolist():
            self.broken_by[i] = name


def _run(
    attack: Attack,
    state: _State,
    rows: Tensor,
    threat: ThreatModel,
    skip: bool,
    progress: bool,
    known: Tensor | None,
) -> AttackResult:
    verdicts, f_evals, vjps, seconds = [], 0.0, 0.0, 0.0
    shown = progress and len(rows) > 0
    if progress and not shown:
        note(f"{attack.name}: no image is left to attack")
    with progress_bar(total=len(rows), desc=attack.name, unit="img", disable=not shown) as bar:
        for batch in state.batches(rows) if len(rows) else ():
            x, y = state.x[batch], state.y[batch]
            with count_evaluations() as counter, guarded(state.model, randomness=True):
                start = time.perf_counter()
                try:
                    if known is None:
                        found = attack.run(state.model, x.clone(), y.clone())
                    else:
                        found = known[batch]
                except Exception as error:
                    error.add_note(
                        f"raised by the attack {attack.name!r}, images {int(batch[0])} … "
                        f"{int(batch[-1])}"
                    )
                    raise _AttackError(error) from error
                # an attack of the engine judges itself before it returns, others do not
                seconds += time.perf_counter() - start - counter.verification_seconds
            f_evals, vjps = f_evals + counter.f_evals, vjps + counter.vjps
            found = threat.check(attack.name, found, x)
            verdicts.append(judge(state.model, found, y, state.verify))
            state.take(batch, found, verdicts[-1], attack.name)
            bar.update(len(batch))
            bar.set_postfix_str(f"accuracy {100 * float((~state.broken).double().mean()):.1f} %")
    n, total = max(1, len(rows)), len(state.x)
    broken = 0
    if verdicts:
        verdict = Verdict.join(verdicts)
        state.history[attack.name] = verdict
        beaten = verdict.broken & state.correct[rows]
        state.attempts[attack.name] = (rows, beaten)
        broken = int(beaten.sum())
    # one that was given every correctly classified sample knows its own accuracy
    complete = not skip or len(rows) >= int(state.correct.sum())
    return AttackResult(
        name=attack.name,
        gradient=attack.gradient,
        attacked=len(rows),
        broken=broken,
        alone=wilson(int(state.correct.sum()) - broken, total) if complete else None,
        together=_share(~state.broken),
        loss=float(verdict.loss.double().mean()) if verdicts else None,
        f_evals=f_evals / n,
        vjps=vjps / n,
        seconds=seconds / n,
    )


def _share(flags: Tensor) -> Interval:
    return wilson(int(flags.sum()), len(flags))


def _left_out(suite: Sequence[Attack], x: Tensor, classes: int) -> dict[str, str]:
    """The attacks that cannot run on such images and so many classes, name -> why."""
    reasons = {attack.name: attack.unfit(x, classes) for attack in suite}
    left_out = {name: why for name, why in reasons.items() if why is not None}
    if len(left_out) == len(suite):
        listed = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ValueError(f"none of the attacks can run on these images and this model: {listed}")
    return left_out


class _AttackError(Exception):
    """An attack raised ``error``."""

    def __init__(self, error: Exception) -> None:
        said = str(error).partition("\n")[0]
        self.error, self.why = error, f"it raised {type(error).__name__}: {said}"


def _warn_of(failed: Mapping[str, str]) -> None:
    for name, why in failed.items():
        warnings.warn(
            f"the attack {name!r} was left out, {why}. The accuracy is what the others left",
            stacklevel=3,
        )


def _as_suite(attacks: Sequence[Attack | Run] | Mapping[str, Run]) -> list[Attack]:
    if isinstance(attacks, Mapping):
        suite = [Attack(name, run) for name, run in attacks.items()]
    elif isinstance(attacks, (Attack, str)) or not isinstance(attacks, Sequence):
        raise TypeError(f"attacks must be a list of attacks or a dict of them, got {attacks!r}")
    else:
        suite = [
            a if isinstance(a, Attack) else Attack(getattr(a, "__name__", type(a).__name__), a)
            for a in attacks
        ]
    names = [a.name for a in suite]
    if not names:
        raise ValueError("attacks is empty: there is no robust accuracy without an attack")
    twice = sorted(
        {name for name in names if names.count(name) > 1} | ({"clean", "known"} & set(names))
    )
    if twice:
        raise ValueError(
            f"every attack needs a name of its own, other than 'clean' and 'known'; got "
            f"{', '.join(names)}: pass a dict or Attack(name, run)"
        )
    return suite


def _check_arguments(
    x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int, verify: Solver | None, audit: int
) -> None:
    check_input(x)
    if not len(x):
        raise ValueError("x holds no images: there is nothing to judge")
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of classes, got {type(y).__name__}")
    if y.ndim == 2 and len(y) == len(x):
        raise ValueError(
            f"y must hold class indices, shape ({len(x)},), got shape {tuple(y.shape)}; for "
            "one-hot labels give y.argmax(1)"
        )
    if y.dtype.is_floating_point or y.dtype == torch.bool:
        raise TypeError(f"y must hold integer classes, got {y.dtype}")
    if y.shape != (len(x),):
        raise ValueError(f"y must hold one class per image ({len(x)},), got {tuple(y.shape)}")
    eps = float(threat.eps)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    for name, bound in (("lower", threat.lower), ("upper", threat.upper)):
        shape = torch.as_tensor(0.0 if bound is None else bound).shape
        if torch.broadcast_shapes(shape, x[:1].shape) != x[:1].shape:
            raise ValueError(
                f"{name} must be a number or broadcast over the batch, as shape "
                f"{(1, *x.shape[1:])} does, got {tuple(shape)}"
            )
    threat.check_clean(x)
    if batch_size < 1 or audit < 0:
        raise ValueError(
            f"batch_size must be at least 1 and audit not negative, got {batch_size} and {audit}"
        )
    check_solver(verify, "verify")
