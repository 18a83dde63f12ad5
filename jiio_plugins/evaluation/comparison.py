"""Attacks side by side: strength beside cost, on the same images in the same ball.

Accuracy and cross-entropy are judged by a converged solve (relative residual 1e-5, from the layers'
initial state) that no attack had a part in. f evaluations and VJPs are sums over samples divided by
samples, with everything an attack used to choose its answer. An attack of the engine verifies its
answer once more, and the f evaluations of that stand in a column of their own. Seconds leave all
judgement out.

A price is also told in gradients of the model: what one solve and one adjoint solve take, both from
scratch to a relative residual of 1e-3, at the images as they are.
"""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins import plots
from jiio_plugins.attacks import attack
from jiio_plugins.equilibrium.counting import count_evaluations
from jiio_plugins.equilibrium.solvers import Anderson
from jiio_plugins.joint.guard import guarded
from jiio_plugins.methods.nested import Nested
from jiio_plugins.threat_model import ThreatModel
from jiio_plugins.utils.files import write_json
from jiio_plugins.verification import judge

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from jiio_plugins.evaluation.attack import Run

VERIFY = Anderson(max_iter=300, tol=1e-5)
_GRADIENT = Nested(max_iter=1, solver=Anderson(max_iter=300, tol=1e-3))
SWEEP = "nested, warm"  # a family of many settings, of which the front is shown


@dataclass
class Row:
    """One attack at one setting.

    Attributes:
        method: name of the row.
        family: what the row is a setting of: a line or a kind of point in the plot.
        accuracy, loss: by the converged solve. The loss is the mean cross-entropy.
        f_evals, vjps: per image.
        verification: f + VJP per image with which an attack of the engine judged itself, on top of
            ``f_evals`` and ``vjps``. 0 where there was no verification, or where it chose the
            answer and is among these.
        seconds, all_seconds: for all images, the median and each run.
        judge_residual: the largest relative residual of the converged solve.
        setting: name -> value.
    """

    method: str
    family: str
    accuracy: float = 0.0
    loss: float = 0.0
    f_evals: float = 0.0
    vjps: float = 0.0
    verification: float = 0.0
    seconds: float = 0.0
    judge_residual: float = 0.0
    all_seconds: list[float] = field(default_factory=list)
    setting: dict[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """F evaluations and VJPs together, per image."""
        return self.f_evals + self.vjps

    def as_strong_as(self, other: Row) -> bool:
        """Accuracy within a point of the other's or lower, loss at least 97 % of it."""
        return self.accuracy <= other.accuracy + 0.01 and self.loss >= 0.97 * other.loss


class Comparison:
    """Attacks on the same images in the same ball within the pixel box [0, 1].

    Args:
        model: returns logits ``(batch, classes)`` and has an equilibrium layer. It is attacked in
            eval mode with constant parameters, and left as it was.
        x: images ``(batch, ...)`` within [0, 1].
        y: true classes ``(batch,)``.
        norm: 1, 2 or inf.
        eps: radius in the units of x.

    Raises:
        ValueError: no images, images outside of the box, labels out of range, another norm, no
            equilibrium layer.

    Attributes:
        threat: the ball and the box.
        gradient: evaluations of f, and VJPs, that one gradient of the model takes, per image.
        rows: the images as they are, then what was measured.

    Example:
        >>> from jiio_plugins.evaluation import quick_suite
        >>> comparison = Comparison(model, x, y, norm=2, eps=0.5)
        >>> for attack in quick_suite(norm=2, eps=0.5):
        ...     x_adv = comparison.measure(Row(attack.name, attack.name), attack.run)
        >>> [row.method for row in comparison.rows]
        ['clean', 'JIIO', 'PGD', 'JIIO, DLR']
    """

    FILES = ("results.json", "curve.png")  # that :meth:`save` writes

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, norm: float, eps: float) -> None:
        if not len(x):
            raise ValueError("x holds no images: there is nothing to compare")
        self.model, self.x, self.y = model, x, y
        self.threat = ThreatModel(norm=norm, eps=eps, lower=0.0, upper=1.0)
        self.threat.check_clean(x)
        self.norm, self.eps = self.threat.norm, eps
        self.rows = [Row("clean", "clean")]
        self._judge(self.rows[0], x)
        self.gradient = self._one_gradient()

    def _one_gradient(self) -> tuple[float, float]:
        with guarded(self.model), count_evaluations() as counter:
            settings = {**vars(self.threat), "method": _GRADIENT, "verify": False}
            attack(self.model, self.x, self.y, **settings)
        return counter.f_evals / len(self.x), counter.vjps / len(self.x)

    def gradients(self, cost: float) -> float:
        """A cost, f evaluations and VJPs per image, in gradients of the model."""
        return cost / sum(self.gradient)

    def _judge(self, row: Row, x: Tensor) -> None:
        with guarded(self.model):
            verdict = judge(self.model, x, self.y, VERIFY)
        row.accuracy = float((~verdict.tight_wrong).double().mean())
        row.loss = float(verdict.loss.mean())
        row.judge_residual = float(verdict.tight_residual.max())

    def measure(self, row: Row, run: Run) -> Tensor:
        """Run an attack and fill in its row. A row measured again gets one more time.

        Args:
            row: with method and family. It joins :attr:`rows`.
            run: ``run(model, x, y) -> x_adv``.

        Returns:
            The images it found.

        Raises:
            TypeError, ValueError: anything but images within ball and box. The message names the
                attack.
        """
        # an attack may change what it is given in place
        with count_evaluations() as counter, guarded(self.model, randomness=True):
            begin = time.perf_counter()
            found = run(self.model, self.x.clone(), self.y.clone())
            if self.x.is_cuda:
                torch.cuda.synchronize()
            # an attack of the engine judges itself before it returns; others do not
            seconds = time.perf_counter() - begin - counter.verification_seconds
        found = self.threat.check(row.method, found, self.x)
        if not row.all_seconds:
            row.f_evals, row.vjps = counter.f_evals / len(found), counter.vjps / len(found)
            spent = counter.verification_f_evals + counter.verification_vjps
            row.verification = spent / len(found)
            self._judge(row, found)
            self.rows.append(row)
        row.all_seconds.append(seconds)
        row.seconds = statistics.median(row.all_seconds)
        return found

    @property
    def compared(self) -> list[Row]:
        """All rows but those of the sweep."""
        return [r for r in self.rows if r.family != SWEEP]

    @property
    def sweep(self) -> list[Row]:
        """The rows of the sweep."""
        return [r for r in self.rows if r.family == SWEEP]

    def against(self, reference: Row) -> dict[str, Any]:
        """JIIO's cheapest row that is as strong as the reference, printed. Empty if there is none.

        Args:
            reference: a row of another family.
        """
        equal = [r for r in self.rows if r.family.startswith("JIIO") and r.as_strong_as(reference)]
        if not equal:
            print(f"no JIIO run is as strong as: {reference.method}")
            return {}
        r = min(equal, key=lambda row: row.cost)
        cost, seconds = reference.cost / r.cost, reference.seconds / r.seconds
        print(
            f"{r.method} is as strong as [{reference.method}] (accuracy within 1 point or lower, "
            f"loss at least 97 %): f+VJP 1/{cost:.1f}, seconds 1/{seconds:.1f}"
        )
        alone, verified = self.gradients(r.cost), self.gradients(r.cost + r.verification)
        print(f"    the whole attack for {alone:.2f} gradients, with verification {verified:.2f}")
        prices = {"gradients": alone, "gradients, verified": verified}
        return {"jiio": r.method, "f+VJP": cost, "seconds": seconds, **prices}

    def to_dict(self) -> dict[str, Any]:
        """Everything measured and what seconds depend on, for JSON."""
        return {
            "norm": f"{self.norm:g}",
            "eps": self.eps,
            "images": len(self.x),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "gradient": dict(zip(("f", "VJP"), self.gradient, strict=True)),
            "rows": [asdict(r) for r in self.compared],
            "warm": [asdict(r) for r in self.sweep],
        }

    def __str__(self) -> str:
        shown = [*self.compared, *front(self.sweep)]
        width = max(len(r.method) for r in shown)
        ball = f"L{self.norm:g} ball of radius {self.eps:g}".replace("inf", "∞")
        lines = [
            f"{len(self.x)} images, {ball} within [0, 1], {torch.get_num_threads()} threads; "
            "accuracy and loss by converged solves",
            "one gradient of the model, a solve and an adjoint solve from scratch to 1e-3, takes "
            "{:.1f} f and {:.1f} VJPs".format(*self.gradient),
            f"{'':{width}} {'accuracy':>9} {'loss':>7} {'f':>7} {'VJP':>7} {'f+VJP':>7} "
            f"{'verification':>12} {'gradients':>9} {'verified':>8} {'seconds':>8} "
            f"{'judged at':>9}",
        ]
        lines += [
            f"{r.method:{width}} {100 * r.accuracy:7.2f} % {r.loss:7.3f} {r.f_evals:7.1f} "
            f"{r.vjps:7.1f} {r.cost:7.1f} {f'{r.verification:.1f}' if r.verification else '':>12} "
            f"{self.gradients(r.cost):9.2f} {self.gradients(r.cost + r.verification):8.2f} "
            f"{r.seconds:8.2f} {r.judge_residual:9.0e}"
            for r in shown
        ]
        return "\n".join(lines)

    def save(
        self,
        folder: Path,
        title: str,
        about: Mapping[str, Any],
        curves: Collection[str] = ("JIIO",),
    ) -> dict[str, Any]:
        """Write ``results.json`` and ``curve.png``.

        Args:
            folder: where to, made if it is not there.
            title: of the plot.
            about: what else is to stand in the JSON.
            curves: as in :meth:`plot`.

        Returns:
            What the JSON holds, and the paths of both files.
        """
        results, curve = (folder / name for name in self.FILES)
        record = {**about, **self.to_dict()}
        write_json(results, record)
        self.plot(curve, title, curves)
        print(f"numbers and plot: {results}, {curve}")
        return {**record, "files": [results, curve]}

    def plot(self, path: Path, title: str, curves: Collection[str] = ("JIIO",)) -> None:
        """Draw loss against cost.

        Args:
            path: PNG to write.
            title: of the plot.
            curves: families drawn as lines, the others are points. "clean" is a line if it is
                among them, and left out otherwise.
        """
        families = dict.fromkeys(r.family for r in self.compared[1:])
        lines, styles = {}, {}
        for family, marker in zip(families, itertools.cycle("osD^v*")):
            lines[family] = _points([r for r in self.compared if r.family == family])
            styles[family] = marker + "-" * (family in curves)
        figure = plots.curves(
            lines,
            styles=styles,
            log="x",
            xlabel="f evaluations + VJPs per image",
            ylabel="cross-entropy, verified",
            title=title,
        )
        axes = figure.axes[0]
        if self.sweep:
            axes.scatter(*_points(self.sweep), s=8, color="0.75", zorder=0)
            axes.plot(*_points(front(self.sweep)), color="0.5", label=SWEEP, zorder=0)
        if "clean" in curves:
            axes.axhline(self.rows[0].loss, color="grey", linestyle=":", label="clean")
        axes.set_xticks([20, 50, 100, 200, 500, 1000])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()  # their labels print over each other
        axes.legend()
        plots.save(path, figure)


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [r.cost for r in rows], [r.loss for r in rows]


def front(rows: Iterable[Row]) -> list[Row]:
    """Rows that no other row beats in both cost and loss, cheapest first."""
    out: list[Row] = []
    for row in sorted((r for r in rows if math.isfinite(r.loss)), key=lambda r: (r.cost, -r.loss)):
        if not out or row.loss > out[-1].loss:
            out.append(row)
    return out


def cost_at(loss: float, rows: Iterable[Row]) -> float | None:
    """Cost at which the front reaches ``loss``, linear between its points. None beyond its end."""
    points = front(rows)
    if not points or points[-1].loss < loss:
        return None
    for before, after in itertools.pairwise(points):
        if before.loss < loss <= after.loss:
            share = (loss - before.loss) / (after.loss - before.loss)
            return before.cost + share * (after.cost - before.cost)
    return points[0].cost
