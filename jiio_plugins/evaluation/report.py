"""What an evaluation found: intervals, one line an attack, the frozen report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jiio_plugins.utils.files import plain, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Interval(NamedTuple):
    """A share, or a difference of shares, with its 95 % confidence interval.

    Attributes:
        value: the estimate, a share of 1 and not in percent.
        low: lower end of the interval, likewise.
        high: upper end, likewise.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's 95 % score interval of a binomial share.

    ``(p + z²/2m ± z √(p(1 − p)/m + z²/4m²)) / (1 + z²/m)`` with z = 1.96 and m trials. It never
    leaves [0, 1], nor has length 0.

    Args:
        successes: how often it was so.
        trials: m, how often it was tried.

    Raises:
        ValueError: no trials, or more successes than trials.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), recommended in Brown, Cai and DasGupta, Stat.
    Sci. 16 (2001).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"wilson needs 0 <= successes <= trials, got {successes} of {trials}")
    p, z2n = successes / trials, _Z * _Z / trials
    centre = (p + z2n / 2) / (1 + z2n)
    half = math.sqrt(z2n * (p * (1 - p) + z2n / 4)) / (1 + z2n)
    # the ends 0 and 1 are exact in the formula, not in floating point
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(p, low, high)


def paired_shares(a: Sequence[bool], b: Sequence[bool]) -> Interval:
    """``share(a) − share(b)`` for two yes/no answers about the same samples, 95 % interval.

    Newcombe's square-and-add interval of Wilson limits, which uses how the answers go together. It
    is far shorter than that of independent samples when both models fail on the same images.

    Args:
        a: one answer per sample.
        b: the other, for the same samples in the same order.

    Raises:
        ValueError: lengths differ or are 0.

    Source: Newcombe, Statistics in Medicine 17 (1998) 2635, method 10.
    """
    n = len(a)
    if n != len(b) or not n:
        raise ValueError(f"paired samples must be as many on both sides, got {n} and {len(b)}")
    both = sum(p and q for p, q in zip(a, b, strict=True))
    ones, twos = sum(a), sum(b)
    neither = n - ones - twos + both
    p, q = wilson(ones, n), wilson(twos, n)
    margins = ones * (n - ones) * twos * (n - twos)
    phi = 0.0  # correlation of the answers, with a continuity correction where it is positive
    if margins:
        cross = both * neither - (ones - both) * (twos - both)
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins)

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    difference = p.value - q.value
    return Interval(
        difference,
        difference - reach(p.value - p.low, q.high - q.value),
        difference + reach(p.high - p.value, q.value - q.low),
    )


def paired_difference(
    a: RobustnessReport | Sequence[RobustnessReport],
    b: RobustnessReport | Sequence[RobustnessReport],
    *,
    clean: bool = False,
) -> Interval:
    """Robust accuracy of ``a`` minus that of ``b`` on the same images, with a 95 % interval.

    Args:
        a: a report, or one for each of several training seeds.
        b: likewise, as many, in the same order of seeds.
        clean: compare clean accuracy instead.

    Returns:
        For one report each, :func:`paired_shares`. For several, the mean over seeds and images. Its
        interval is ``mean ± z s/√m`` over the m images' means of the seeds' differences. It takes
        the images as the sample, so it speaks of these seeds, not of seeds to come.

    Raises:
        ValueError: the reports judge other images, another ball or another number of seeds.
    """
    left = [a] if isinstance(a, RobustnessReport) else list(a)
    right = [b] if isinstance(b, RobustnessReport) else list(b)
    if len(left) != len(right) or not left:
        raise ValueError(f"need as many reports on both sides, got {len(left)} and {len(right)}")
    keys = {(r.fingerprint, r.norm, r.eps) for r in (*left, *right)}
    if len(keys) > 1:
        raise ValueError(
            "a paired difference needs the same images and the same ball on both sides, got "
            + ", ".join(sorted(f"images {k}, L{n:g} {e:g}" for k, n, e in keys))
        )
    name = "correct" if clean else "robust"
    if len(left) == 1:
        return paired_shares(getattr(left[0], name), getattr(right[0], name))
    stack = [
        torch.tensor(getattr(p, name)).double() - torch.tensor(getattr(q, name)).double()
        for p, q in zip(left, right, strict=True)
    ]
    per_image = torch.stack(stack).mean(0)
    mean = float(per_image.mean())
    n = len(per_image)
    # one half image each way, so that no difference at all does not claim certainty
    spread = float(per_image.square().sum()) + 1 - (n + 1) * mean * mean
    half = _Z * math.sqrt(max(spread, 0.0)) / n
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class AttackResult:
    """One attack of a suite.

    Attributes:
        name: as in :class:`Attack`.
        gradient: likewise.
        attacked: samples it was given (none that had been broken, if those are skipped).
        broken: of these, samples for which it found a verified adversarial example.
        alone: accuracy under this attack by itself. None where samples were skipped.
        together: accuracy after this attack and all before it.
        loss: mean verified cross-entropy of its images. None if it was given none. Where they fail,
            torchattacks' APGD and Square return the image they were given.
        f_evals: evaluations of f per attacked sample, without the judging.
        vjps: vector-Jacobian products, likewise. Those of a layer that has a solver of its own, see
            :func:`jiio_plugins.count_evaluations`, are not in it.
        seconds: likewise.
    """

    name: str
    gradient: str
    attacked: int
    broken: int
    alone: Interval | None
    together: Interval
    loss: float | None
    f_evals: float
    vjps: float
    seconds: float


@dataclass(frozen=True)
class Finding:
    """Something that smells of gradient obfuscation, or of an evaluation that cannot be trusted.

    Attributes:
        kind: "disagreement", "inexact-solve", "inexact-gradient", "steps", "large-eps",
            "gradient-kind", "black-box" or "unverified". The guide says what each means.
        message: what was measured, and what to do.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class RobustnessReport:
    """The outcome of :func:`robust_accuracy`. A sample is robust if no example *breaks* it.

    An example breaks its sample if the model's own answer is wrong and the answer of an independent
    solve, which converged, is wrong too. A sample misclassified as it is, is broken.

    Attributes:
        eps: ε of the ball, in the units of the images.
        norm: of the ball, 1, 2 or inf.
        images: number of samples.
        tolerance: relative residual of the independent solves.
        skip_broken: whether an attack was spared the samples that earlier ones had broken.
        clean: accuracy without attack.
        accuracy: robust accuracy, the whole suite together: the smallest of the next three. It is
            an upper bound where samples are ``unverified``.
        agreed_accuracy: share of samples that nothing broke.
        model_accuracy: share of samples on which the model's own answer was never wrong.
        converged_accuracy: share on which that of the independent solve was never wrong.
        attacks: one line each.
        left_out: attacks that could not run on such images or so many classes, or that raised an
            error, name -> why.
        unverified: samples with an example whose independent solve did not converge.
        warnings: see :class:`Finding`. There is none for a sound model.
        checks: what the warnings rest on, name -> figure.
        correct: per sample, whether it is not broken as it is.
        robust: per sample, whether nothing broke it.
        broken_by: per sample, the attack that broke it, "clean" or None.
        worst_loss: per sample, the highest verified cross-entropy met.
        seconds: of everything, the judging and the checks included.
        fingerprint: of images and labels.
        worst: the images of the worst case, as x. They are left out of the JSON.
    """

    eps: float
    norm: float
    images: int
    tolerance: float
    skip_broken: bool
    clean: Interval
    accuracy: Interval
    agreed_accuracy: Interval
    model_accuracy: Interval
    converged_accuracy: Interval
    attacks: tuple[AttackResult, ...]
    left_out: dict[str, str]
    unverified: int
    warnings: tuple[Finding, ...]
    checks: dict[str, Any]
    correct: tuple[bool, ...]
    robust: tuple[bool, ...]
    broken_by: tuple[str | None, ...]
    worst_loss: tuple[float, ...]
    seconds: float
    fingerprint: str
    worst: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, in JSON's types. L∞ is the string "inf", and NaN is None."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "worst"}

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON.

        Raises:
            OSError: it could not be written. An older file is kept.
        """
        write_json(path, self.to_dict(), indent=2)

    def __str__(self) -> str:
        head = (
            f"{self.images} images, L{self.norm:g} ball of radius {self.eps:g}; verified by "
            f"independent solves to {self.tolerance:g}; 95 % intervals\n"
            f"{'attack':>22} {'attacked':>8} {'broken':>6} {'accuracy so far':>21} "
            f"{'loss':>7} {'f':>8} {'VJP':>8} {'seconds':>8}\n"
            f"{'clean':>22} {self.images:8d} {self.images - sum(self.correct):6d} "
            f"{self.clean!s:>21}"
        )
        lines = [
            f"{a.name:>22} {a.attacked:8d} {a.broken:6d} {a.together!s:>21} "
            f"{'–' if a.loss is None else f'{a.loss:.3f}':>7} "
            f"{a.f_evals:8.1f} {a.vjps:8.1f} {a.seconds:8.3f}"
            for a in self.attacks
        ]
        bound = "at most " if self.unverified else ""
        tail = [
            f"robust accuracy {bound}{self.accuracy}; by the model's own answers alone "
            f"{100 * self.model_accuracy.value:.1f} %, by converged solves alone "
            f"{100 * self.converged_accuracy.value:.1f} %, where both must be wrong "
            f"{100 * self.agreed_accuracy.value:.1f} %; "
            f"{self.unverified} samples with an unconverged verification; {self.seconds:.0f} s"
        ]
        tail += [f"left out ({name}): {why}" for name, why in self.left_out.items()]
        uncounted = [
            a.name for a in self.attacks if a.gradient == "own" and a.attacked and not a.vjps
        ]
        if uncounted:
            tail.append(
                f"no VJPs are known of {', '.join(uncounted)}: the model's layers run a backward "
                "pass of their own, which is not counted. Their seconds are whole"
            )
        tail += [f"warning ({w.kind}): {w.message}" for w in self.warnings]
        if not self.warnings:
            tail.append("no warning")
        return "\n".join([head, *lines, *tail])


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return dict(zip(value._fields, map(_plain, value), strict=True))
    if isinstance(value, (AttackResult, Finding)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return plain(value)
