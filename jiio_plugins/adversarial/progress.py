"""How far a training has come: what its steps have seen, and what was judged of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jiio_plugins.adversarial.judged import corrected

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jiio_plugins.adversarial.judged import Metrics
    from jiio_plugins.adversarial.step import AdversarialStep

_SHOWN = ("clean", "robust", "unverified")
_SEEN = ("loss", "residual", "seen_clean", "seen_robust")


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        classes: of the model's logits, once rows of a step have been judged.
    """

    epoch: int = 0
    step: int = 0
    waited: int = 0
    stopped: bool = False
    history: list[Metrics] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    judged: Metrics = field(default_factory=dict)
    classes: int = 0
    said: list[str] = field(default_factory=list)

    def add(self, step: AdversarialStep, loss: float, judged: dict[str, Tensor]) -> None:
        """One step has been made, and some of its rows have been judged."""
        self.step += 1
        size = len(step.solution.x)
        self._sum("loss", size * loss, size)
        rows = {"residual": step.residual, "seen_robust": step.robust, "seen_clean": step.clean}
        for name, t in {**rows, **judged}.items():
            if t is not None:
                self._sum(name, float(t.sum()), len(t))
        if judged:
            self.classes = step.output.shape[1]
            means = corrected(self.means())
            self.judged = {name: means[name] for name in _SHOWN}

    def _sum(self, name: str, total: float, count: int) -> None:
        before = self.sums.get(name, [0.0, 0])
        self.sums[name] = [before[0] + total, before[1] + count]

    def count(self, name: str) -> int:
        """Rows of which something is known in this epoch."""
        return int(self.sums.get(name, [0.0, 0])[1])

    def means(self) -> Metrics:
        """Of the epoch so far."""
        return {name: total / count for name, (total, count) in self.sums.items()}

    def forget_judged(self) -> None:
        """Of the epoch so far, as the model has learnt since."""
        self.sums = {name: self.sums[name] for name in _SEEN if name in self.sums}

    def shown(self) -> Metrics:
        """For the bar: the epoch so far or the last one, then what was judged last."""
        means = self.means() or self.history[-1]
        return {**{name: means[name] for name in _SEEN if name in means}, **self.judged}

    def wait(self, value: float, model: nn.Module, patience: int) -> None:
        """Keep the weights if they are the best so far, or stop when none was for too long."""
        if self.best is None or value > self.best["value"]:
            weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            self.best, self.waited = {"value": value, "model": weights}, 0
        else:
            self.waited += 1
        self.stopped = self.waited >= patience
