"""A training loop around :class:`jiio_plugins.adversarial.AdversarialTraining`.

Progress, validation, early stopping, and checkpoints that resume exactly. What is random in a step
is drawn from the seed, the epoch and the step's number alone, so a resumed training needs no other
state than the weights, the optimiser, the scheduler and the global random states.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from jiio_plugins.adversarial.carried import Carried, carry
from jiio_plugins.envelope import joint_solution
from jiio_plugins.utils.checkpoint import TrainingState
from jiio_plugins.utils.randomness import seeded_generator, set_random_states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from jiio_plugins.adversarial.batches import Batches
    from jiio_plugins.adversarial.step import AdversarialStep, AdversarialTraining


Interval = Literal["epoch", "step"]


_LOOSE = 0.1  # mean relative residual of z; trainings that ended well stay below 0.03


Metrics = dict[str, float]


def fit_adversarially(
    model: nn.Module,
    training: AdversarialTraining,
    optimizer: Optimizer,
    batches: Batches,
    *,
    epochs: int,
    validation: tuple[Tensor, Tensor] | None = None,
    validation_batch: int = 128,
    wrapped: nn.Module | None = None,
    restart_every: int = 1,
    carried: AdversarialTraining | None = None,
    scheduler: Any = None,
    scheduler_interval: Interval = "epoch",
    max_grad_norm: float | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    seed: int = 0,
    verbose: bool = True,
) -> list[Metrics]:
    """Train ``model`` in place; its train/eval flags come back as they were.

    Args:
        model: see :class:`jiio_plugins.adversarial.AdversarialTraining`.
        training: the step.
        optimizer: of the model's parameters.
        batches: the data: :class:`TensorBatches`, or something of one's own like :class:`Batches`.
        epochs: of the whole training, those before a resume included.
        validation: images and labels judged after each epoch: clean accuracy by ``model(x)``, and
            robust accuracy by ``model(x')`` at the examples the training's own search finds.
        validation_batch: images judged together.
        wrapped: see :class:`jiio_plugins.adversarial.AdversarialTraining`.
        restart_every: epochs from one search that starts as ``training`` says to the next. In
            between, each search takes up the image where the last one for the same sample ended,
            which is hard already, one step on (:meth:`AdversarialStep.ahead`), and is short. As
            many images as there are samples are kept, so samples must be the same in every epoch,
            not augmented.
        carried: the step of those searches; None: ``training.carried()``. The progress then shows
            no clean accuracy.
        scheduler: any of torch's, of this optimiser; ``ReduceLROnPlateau`` gets the validation's
            robust accuracy with mode "max", the training loss with mode "min".
        scheduler_interval: when it steps.
        max_grad_norm: clip the gradient's norm; None: do not.
        patience: stop after so many epochs without a better robust validation accuracy, and put the
            best weights back; None: train to the end and keep the last.
        checkpoint: file to write after each epoch.
        checkpoint_every: and after so many steps.
        resume: go on from ``checkpoint`` where it exists. Without it a file that is there is an
            error, never overwritten.
        seed: of everything random in the steps.
        verbose: show a progress bar: loss, clean and robust accuracy, relative residual of z.

    Returns:
        One dict per epoch: "loss", "robust", "residual", "clean" where the steps saw it, with
        validation "validation_clean" and "validation_robust".

    Raises:
        FileExistsError: ``checkpoint`` is there and ``resume`` is not set.
        ValueError: bad arguments, or a checkpoint of another training.
        FloatingPointError: the loss became NaN or Inf; the last checkpoint is whole.

    Warns:
        RuntimeWarning: z was left far from its fixed points in an epoch.
    """
    if not hasattr(batches, "epoch") or not hasattr(batches, "__len__"):
        raise TypeError(
            "batches must have epoch(index, skip), so that a training can be resumed: give "
            "TensorBatches(x, y, batch_size), or a class like it around a loader, got "
            f"{type(batches).__name__}"
        )
    rules: dict[str, Any] = {
        "max_grad_norm": max_grad_norm,
        "scheduler_interval": scheduler_interval,
        "restart_every": restart_every,
    }
    kept = carry(training, batches, restart_every, carried)
    if kept is not None:
        own = kept.search.settings().items()
        rules.update({f"{name} of carried searches": value for name, value in own})
    run = _Run(model, training, optimizer, batches, scheduler, checkpoint, seed, rules, kept)
    _check(run, epochs, patience, validation, scheduler_interval, checkpoint_every, max_grad_norm)
    run.begin(resume)
    with _flags_restored(model), run.bar(epochs, verbose) as bar:
        for epoch in range(run.epoch, epochs):
            if run.stopped:
                break
            model.train()
            for x, y in batches.epoch(epoch, run.step):
                generator = seeded_generator(x.device, seed, epoch, run.step)
                start = None if kept is None else kept.start(epoch, run.step, x, generator)
                search = training if kept is None or start is None else kept.search
                step = search(
                    model,
                    x,
                    y,
                    wrapped=wrapped,
                    generator=generator,
                    start=start,
                    ahead=kept is not None,
                )
                optimizer.zero_grad()
                step.loss.backward()
                if max_grad_norm is not None:
                    clip_grad_norm_(model.parameters(), max_grad_norm)
                loss = float(step.loss.detach())
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss is {loss} in epoch {epoch + 1}, step {run.step + 1}: "
                        "lower the learning rate, or keep the cell easy to solve with "
                        "jacobian_weight"
                    )
                optimizer.step()
                if scheduler is not None and scheduler_interval == "step":
                    _advance(scheduler, {"loss": loss})
                if kept is not None:
                    kept.keep(epoch, run.step, step.ahead(), len(step.robust))
                run.take_in(step, loss)
                bar.update()
                bar.set_postfix({k: f"{v:.3g}" for k, v in run.means().items()}, refresh=False)
                if checkpoint_every is not None and run.step % checkpoint_every == 0:
                    run.save()
            run.end_epoch(validation, validation_batch, patience)
            if scheduler is not None and scheduler_interval == "epoch":
                _advance(scheduler, run.history[-1])
            run.save()
            _warn_if_loose(run)
        if run.best is not None:
            model.load_state_dict(run.best["model"])
    optimizer.zero_grad()
    return run.history


class _Run:
    """How far a training has come."""

    def __init__(
        self,
        model: nn.Module,
        training: AdversarialTraining,
        optimizer: Optimizer,
        batches: Batches,
        scheduler: Any,
        checkpoint: str | Path | None,
        seed: int,
        rules: dict[str, Any],
        kept: Carried | None = None,
    ) -> None:
        self.model, self.training, self.batches = model, training, batches
        self.kept = kept
        self.path = None if checkpoint is None else Path(checkpoint)
        settings = {**training.settings(), **rules, "batches an epoch": len(batches), "seed": seed}
        if self.path is not None and hasattr(batches, "settings"):
            settings.update(batches.settings())
        self.trained = TrainingState(model, optimizer, scheduler, settings)
        self.epoch = self.step = self.waited = 0
        self.stopped = False
        self.history: list[Metrics] = []
        self.sums: dict[str, list[float]] = {}
        self.best: dict[str, Any] | None = None

    def begin(self, resume: bool) -> None:
        """Take up the checkpoint, or make sure that none is overwritten."""
        if self.path is None:
            if resume:
                raise ValueError("resume=True needs checkpoint=, the file to resume from")
            return
        if not self.path.exists():
            return
        if not resume:
            raise FileExistsError(
                f"{self.path} exists: resume=True goes on from it; to start afresh give another "
                "file or delete it"
            )
        progress, random = self.trained.load(self.path)
        carried = progress.pop("carried", None)
        if self.kept is not None:
            self.kept.load(carried)
        for name, value in progress.items():
            setattr(self, name, value)
        skip = getattr(self.batches, "skip", None)
        if skip is not None:
            skip(self.epoch * len(self.batches) + self.step)
        set_random_states(random)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.path is not None:
            names = ("epoch", "step", "waited", "stopped", "history", "sums", "best")
            progress = {name: getattr(self, name) for name in names}
            if self.kept is not None:
                progress["carried"] = self.kept.state()
            self.trained.save(self.path, progress)

    def take_in(self, step: AdversarialStep, loss: float) -> None:
        """One step has been made."""
        self.step += 1
        rows = {"robust": step.robust.float(), "residual": step.residual}
        if step.clean is not None:
            rows["clean"] = step.clean.float()
        values = {name: (float(t.sum()), len(t)) for name, t in rows.items()}
        size = len(step.solution.x)
        for name, (total, count) in {"loss": (size * loss, size), **values}.items():
            before = self.sums.get(name, [0.0, 0])
            self.sums[name] = [before[0] + total, before[1] + count]

    def means(self) -> Metrics:
        """Of the epoch so far."""
        return {name: total / count for name, (total, count) in self.sums.items()}

    def end_epoch(
        self, validation: tuple[Tensor, Tensor] | None, batch_size: int, patience: int | None
    ) -> None:
        """Judge, note, and decide whether to stop."""
        metrics = self.means()
        if validation is not None:
            judged = judge(self.model, self.training, *validation, batch_size=batch_size)
            metrics.update({f"validation_{name}": value for name, value in judged.items()})
        self.history.append(metrics)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        if patience is None:
            return
        value = metrics["validation_robust"]
        if self.best is None or value > self.best["value"]:
            weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.best, self.waited = {"value": value, "model": weights}, 0
        else:
            self.waited += 1
        self.stopped = self.waited >= patience

    def bar(self, epochs: int, verbose: bool) -> Any:
        """A bar over all steps."""
        done = self.epoch * len(self.batches) + self.step
        return tqdm(
            total=epochs * len(self.batches),
            initial=done,
            desc="adversarial training",
            disable=not verbose,
        )


def _warn_if_loose(run: _Run) -> None:
    residual = run.history[-1].get("residual", 0.0)
    if not residual <= _LOOSE:
        warnings.warn(
            f"in epoch {run.epoch} the search left z at a mean relative residual of {residual:.2g} "
            f"(fine: below {_LOOSE}). It lags behind the images, so the search is weaker than it "
            "looks and the model may learn to classify before it has converged. Set or raise "
            "jacobian_weight, take more iterations, or lower the learning rate",
            RuntimeWarning,
            stacklevel=3,
        )


def judge(
    model: nn.Module, training: AdversarialTraining, x: Tensor, y: Tensor, *, batch_size: int = 128
) -> Metrics:
    """Clean and robust accuracy in eval mode, with the solver the model carries.

    Robust means: against the training's own search from the image. For figures to report use
    ``jiio_plugins.evaluation``.
    """
    right = {"clean": 0, "robust": 0}
    with _flags_restored(model):
        model.eval()
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            found = joint_solution(
                model,
                images,
                training.adversary(labels),
                method=training.method,
                constraint=training.region(images),
            )
            with torch.no_grad():
                for name, seen in (("clean", images), ("robust", found.x)):
                    right[name] += int((model(seen).argmax(1) == labels).sum())
    return {name: count / len(x) for name, count in right.items()}


def _advance(scheduler: Any, metrics: Metrics) -> None:
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()
    elif scheduler.mode == "max":
        scheduler.step(metrics.get("validation_robust", metrics.get("robust", 0.0)))
    else:
        scheduler.step(metrics["loss"])


@contextmanager
def _flags_restored(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _check(
    run: _Run,
    epochs: int,
    patience: int | None,
    validation: tuple[Tensor, Tensor] | None,
    interval: str,
    checkpoint_every: int | None,
    max_grad_norm: float | None,
) -> None:
    if epochs < 1:
        raise ValueError(f"the number of epochs must be at least 1, got {epochs}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    if patience is not None and validation is None:
        raise ValueError("early stopping (patience=) needs validation data to judge by")
    if interval not in ("epoch", "step"):
        raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {interval!r}")
    if checkpoint_every is not None and (checkpoint_every < 1 or run.path is None):
        raise ValueError(
            f"checkpoint_every must be at least 1 and needs checkpoint=, got {checkpoint_every}"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
    optimizer, scheduler = run.trained.optimizer, run.trained.scheduler
    own = {id(p) for p in run.model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer holds none of the model's parameters: build it from them")
    if scheduler is None:
        return
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
        raise TypeError(
            f"scheduler must be one of torch.optim.lr_scheduler's, got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            "the scheduler was built for another optimizer, so it would change nothing here: build "
            "it from the one that trains"
        )
