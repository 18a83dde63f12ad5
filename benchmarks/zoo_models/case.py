"""What the zoo's models have in common: an attack on each, and a training that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

from jiio_plugins import Box, Constraint, Intersection, L2Ball, attack_objective
from jiio_plugins.data import load_digits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Objective = Callable[[Tensor], Tensor]
    Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A trained model and an attack on it.

    Attributes:
        name: of the kind.
        model: in eval mode. It holds one equilibrium layer.
        x: where the attack starts, ``(rows, ...)``.
        objective: of the model's output, minimised, ``(rows,)``: minus the loss.
        eps: radius of the L2 ball around x that it stays in, in units of x.
        constraint: that ball, within the pixel box where x is an image.
        labels: true classes, integers ``(rows,)``. None where the model is no classifier.
    """

    name: str
    model: nn.Module
    x: Tensor
    objective: Objective
    eps: float
    constraint: Constraint
    labels: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """How the models come to their weights.

    Args:
        cache: folder of trained weights. What it lacks is trained and put there. None: always
            train, and keep nothing.
        steps: of every training, instead of each model's own. None: its own.
    """

    cache: Path | None = None
    steps: int | None = None

    def fit(
        self,
        name: str,
        model: nn.Module,
        loss: Loss,
        *,
        steps: int,
        lr: float = 2e-3,
        batch: int = 64,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Adam on the digits with a cosine schedule, or the weights of an earlier run.

        The model is in eval mode afterwards.

        Args:
            name: of the file in the cache.
            model: whose parameters are trained.
            loss: ``loss(model, images, labels) -> scalar``.
            steps: of Adam.
            lr: learning rate to start with.
            batch: images a step.
            after_step: called after each of them, such as a projection.
        """
        steps = self.steps or steps
        path = self.cache / f"{name}-{steps}.safetensors" if self.cache else None
        if path is not None and path.exists():
            model.load_state_dict(load_file(path))
            model.eval()
            return
        # what is drawn afterwards must not depend on whether there was anything to train
        with torch.random.fork_rng(devices=()):
            self._train(name, model, loss, steps, lr, batch, after_step)
        model.eval()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)

    def _train(
        self,
        name: str,
        model: nn.Module,
        loss: Loss,
        steps: int,
        lr: float,
        batch: int,
        after_step: Callable[[], None] | None,
    ) -> None:
        images, labels = load_digits("train")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        bar = trange(steps, desc=f"training {name}", leave=False, disable=self.steps is not None)
        for _ in bar:
            rows = torch.randint(len(images), (batch,))
            value = loss(model, images[rows], labels[rows])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if after_step is not None:
                after_step()
            bar.set_postfix(loss=f"{value.item():.3f}")


def classification(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(model(images), labels)


def attack_on_digits(name: str, model: nn.Module, samples: int, eps: float) -> Case:
    """The largest cross-entropy of test images within an L2 ball and the pixel box.

    Args:
        name: of the kind.
        model: images ``(rows, 1, 8, 8)`` -> logits ``(rows, 10)``.
        samples: images, at most 500.
        eps: radius, in units of pixels that go from 0 to 1.
    """
    images, labels = (t[:samples] for t in load_digits("test"))
    inside = Intersection(L2Ball(eps), Box(0.0, 1.0))
    objective = attack_objective("cross-entropy", labels)
    return Case(name, model, images, objective, eps, inside, labels)
