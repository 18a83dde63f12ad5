"""A training loop around :class:`jiio_plugins.adversarial.AdversarialTraining`.

Progress, validation, early stopping, and checkpoints that resume exactly. What is random in a step
is drawn from the seed, the epoch and the step's number alone, so a resumed training needs no other
state than the weights, the optimiser, the scheduler and the global random states.
"""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ReduceLROnPlateau

from jiio_plugins.adversarial.carried import Carried, carry
from jiio_plugins.adversarial.judged import corrected, finished, judged_rows, validate
from jiio_plugins.adversarial.progress import Progress
from jiio_plugins.adversarial.watch import Watch
from jiio_plugins.joint.guard import flags_kept
from jiio_plugins.utils.checkpoint import TrainingState
from jiio_plugins.utils.checks import check_counts
from jiio_plugins.utils.console import progress_bar
from jiio_plugins.utils.files import owning, understood
from jiio_plugins.utils.randomness import seeded_generator, set_random_states
from jiio_plugins.utils.signals import Interrupted, Stop

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from jiio_plugins.adversarial.batches import Batches
    from jiio_plugins.adversarial.judged import Metrics
    from jiio_plugins.adversarial.step import AdversarialStep, AdversarialTraining

_SHARE = 10  # of an epoch's images that part is judged, at most
_EARLY = 10  # that part of the first epoch has passed when a batch is judged
_FINISHED = 8  # times as many are judged when the training has ended
_FINISHED_SHARE = 5  # or that part of all images that it has drawn
StepInterval = Literal["epoch", "step"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How :func:`fit_adversarially` trains.

    Args:
        epochs: of the whole training, those before a resume included.
        validation_batch: validation images judged together.
        restart_every: epochs from one search that starts as ``training`` says to the next. In
            between, each search takes up the image where the last one for the same sample ended,
            which is hard already, one step on (:meth:`AdversarialStep.ahead`), and is short. As
            many images as there are samples are kept, so samples must be the same in every epoch,
            not augmented.
        carried: the step of those searches. None: ``training.carried()``. The progress then shows
            no clean accuracy.
        scheduler_interval: when the scheduler steps.
        max_grad_norm: clip the gradient's norm. None: do not.
        patience: stop after so many epochs without a better robust validation accuracy, and put the
            best weights back. None: train to the end and keep the last.
        checkpoint: file to write after each epoch.
        checkpoint_every: and after so many steps.
        resume: go on from ``checkpoint`` where it exists. Without it a file that is there is an
            error, never overwritten.
        judged: images of the last batches of each epoch, and of one batch early in the first, that
            are judged by solves: as they are, and at the examples that the steps have found. The
            progress tells what that makes of clean and robust accuracy. It is at most a tenth of
            the epoch's images, as each takes about as long as a step on it. When the training has
            ended eight times as many are searched and judged anew, at most an epoch's and a fifth
            of all that were drawn. 0: none are.
        seed: of everything random in the steps.
        verbose: show a progress bar: loss, relative residual of z and what the steps see, then what
            was judged last.

    Raises:
        TypeError, ValueError: bad settings. The message says what is accepted.
    """

    epochs: int
    validation_batch: int = 128
    restart_every: int = 1
    carried: AdversarialTraining | None = None
    scheduler_interval: StepInterval = "epoch"
    max_grad_norm: float | None = None
    patience: int | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    seed: int = 0
    judged: int = 128
    verbose: bool = True

    def __post_init__(self) -> None:
        counts = ("epochs", "validation_batch", "restart_every", "patience", "checkpoint_every")
        check_counts(self, **{n: 1 for n in counts if getattr(self, n) is not None}, judged=0)
        if self.carried is not None and self.restart_every == 1:
            raise ValueError(
                "carried= is the step between restarts: it needs restart_every above 1"
            )
        if self.scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f"scheduler_interval must be 'epoch' or 'step', got {self.scheduler_interval!r}"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.checkpoint is None and self.checkpoint_every is not None:
            raise ValueError("checkpoint_every needs checkpoint=, the file to write")
        if self.checkpoint is None and self.resume:
            raise ValueError("resume=True needs checkpoint=, the file to resume from")


def fit_adversarially(
    model: nn.Module,
    training: AdversarialTraining,
    optimizer: Optimizer,
    batches: Batches,
    settings: FitSettings,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    scheduler: Any = None,
    wrapped: nn.Module | None = None,
) -> list[Metrics]:
    """Train ``model`` in place. Its train/eval flags come back as they were.

    Args:
        model: see :class:`jiio_plugins.adversarial.AdversarialTraining`.
        training: the step.
        optimizer: of the model's parameters.
        batches: the data: :class:`TensorBatches`, or something of one's own like :class:`Batches`.
        settings: epochs, checkpoints and the rest.
        validation: images and labels judged after each epoch: clean accuracy by ``model(x)``, and
            robust accuracy by ``model(x')`` at the examples the training's own search finds.
        scheduler: any of torch's, of this optimiser. ``ReduceLROnPlateau`` gets the validation's
            robust accuracy with mode "max", the training loss with mode "min".
        wrapped: see :class:`jiio_plugins.adversarial.AdversarialTraining`.

    Returns:
        One dict per epoch. "loss", "residual" and "seen_robust" are means over its steps, by the
        state that the search ends in, and so is "seen_clean", by the state that it starts with,
        where it starts at the images. "clean" and "robust" are the last two, corrected by how much
        judging changes them on the images that are judged. "unverified" is the share of those for
        which solves did not converge, "astray" that of examples on which search and solve disagree.
        With validation "validation_clean", "validation_robust" and "validation_unverified". The
        last epoch's has "final_clean", "final_robust" and "final_unverified" besides, where batches
        can be drawn again: what :func:`validate` makes of training images, with the weights that
        are left.

    Raises:
        FileExistsError: ``checkpoint`` is there and ``resume`` is not set.
        BlockingIOError: another training writes ``checkpoint``.
        TypeError: batches that cannot be drawn again, or no scheduler of torch's.
        ValueError: bad arguments, or a checkpoint of another training.
        FloatingPointError: the loss became NaN or Inf. The last checkpoint is whole.
        OSError: a checkpoint could not be written. The one before is kept.
        Interrupted: SIGINT or SIGTERM arrived, with ``checkpoint`` given. The step was finished and
            a checkpoint written, or all of them were. A second signal does not wait for that.

    Warns:
        RuntimeWarning: once each. Judged images differ from what the search saw, do not converge,
            or are classified better with an attack than without. Validation falls far below its
            best. z was left far from its fixed points in an epoch. The finished model could not be
            judged.
    """
    if not hasattr(batches, "epoch") or not hasattr(batches, "__len__"):
        raise TypeError(
            "batches must have epoch(index, skip), so that a training can be resumed: give "
            "TensorBatches(x, y, batch_size), or a class like it around a loader, got "
            f"{type(batches).__name__}"
        )
    if settings.patience is not None and validation is None:
        raise ValueError("early stopping (patience=) needs validation data to judge by")
    _check_optimizer(optimizer, scheduler, model)
    kept = carry(training, batches, settings.restart_every, settings.carried)
    same = _common(training, batches, settings, kept)
    state = TrainingState(model, optimizer, scheduler, same)
    run = _Run(state, training, batches, settings, kept, wrapped)
    stop = Stop()
    with ExitStack() as stack:
        if settings.checkpoint is not None:
            stack.enter_context(owning(settings.checkpoint))
            stack.enter_context(stop)
        run.begin()
        stack.enter_context(flags_kept(model))
        bar = stack.enter_context(run.bar())
        while run.progress.epoch < settings.epochs and not run.progress.stopped:
            model.train()
            for x, y in batches.epoch(run.progress.epoch, run.progress.step):
                run.make_step(x, y)
                bar.set_postfix(_rounded(run.progress.shown()), refresh=False)
                bar.update()
                if stop.number is not None:
                    run.save()
                    raise Interrupted(
                        stop.number,
                        f"epoch {run.progress.epoch + 1}, step {run.progress.step} is done, and in "
                        f"{settings.checkpoint}. Go on with resume=True",
                    )
            run.end_epoch(validation)
        if run.progress.best is not None:
            model.load_state_dict(run.progress.best["model"])
        if stop.number is None:
            bar.set_postfix(_rounded({**run.progress.shown(), **run.finish()}))
        if stop.number is not None:
            raise Interrupted(stop.number, f"all epochs are done, and in {settings.checkpoint}")
    optimizer.zero_grad()
    return run.progress.history


def _rounded(metrics: Metrics) -> dict[str, str]:
    return {name: f"{value:.3g}" for name, value in metrics.items()}


def _check_optimizer(optimizer: Optimizer, scheduler: Any, model: nn.Module) -> None:
    own = {id(p) for p in model.parameters()}
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


def _common(
    training: AdversarialTraining, batches: Batches, settings: FitSettings, kept: Carried | None
) -> dict[str, Any]:
    """What a resumed training must have in common with the one before."""
    names = ("max_grad_norm", "scheduler_interval", "restart_every", "seed")
    same = {**training.settings(), **{name: getattr(settings, name) for name in names}}
    same["batches an epoch"] = len(batches)
    if kept is not None:
        own = kept.search.settings().items()
        same.update({f"{name} of carried searches": value for name, value in own})
    if settings.checkpoint is not None and hasattr(batches, "settings"):
        same.update(batches.settings())
    return same


@dataclass
class _Run:
    """A training, and all that it needs."""

    state: TrainingState
    training: AdversarialTraining
    batches: Batches
    settings: FitSettings
    kept: Carried | None
    wrapped: nn.Module | None
    progress: Progress = field(default_factory=Progress)

    def begin(self) -> None:
        """Take up the checkpoint, or make sure that none is overwritten."""
        path = self.settings.checkpoint
        if path is None or not Path(path).exists():
            return
        if not self.settings.resume:
            raise FileExistsError(
                f"{path} exists: resume=True goes on from it; to start afresh give another "
                "file or delete it"
            )
        progress, random = self.state.load(path)
        with understood(path):
            carried = progress.pop("carried", None)
            if self.kept is not None:
                self.kept.load(carried)
            self.progress = Progress(**progress)
        skip = getattr(self.batches, "skip", None)
        if skip is not None:
            skip(self._done())
        set_random_states(random)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.settings.checkpoint is not None:
            carried = {} if self.kept is None else {"carried": self.kept.state()}
            self.state.save(self.settings.checkpoint, {**vars(self.progress), **carried})

    def make_step(self, x: Tensor, y: Tensor) -> None:
        """Search, move the parameters, and note what was seen."""
        at, settings = self.progress, self.settings
        step = self._search(x, y)
        judged = self._judge(step, x, y)
        self.state.optimizer.zero_grad()
        step.loss.backward()
        if settings.max_grad_norm is not None:
            clip_grad_norm_(self.state.model.parameters(), settings.max_grad_norm)
        loss = float(step.loss.detach())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} in epoch {at.epoch + 1}, step {at.step + 1}: lower "
                "the learning rate, or keep the cell easy to solve with jacobian_weight"
            )
        self.state.optimizer.step()
        self._advance("step", {"loss": loss})
        if self.kept is not None:
            self.kept.keep(at.epoch, at.step, step.ahead(), len(step.robust))
        if at.step == len(self.batches) // 2:  # what was judged early is old by the end
            at.forget_judged()
        at.add(step, loss, judged)
        if settings.checkpoint_every is not None and at.step % settings.checkpoint_every == 0:
            self.save()

    def end_epoch(self, validation: tuple[Tensor, Tensor] | None) -> None:
        """Judge, decide whether to stop, and write the checkpoint."""
        at, settings, model = self.progress, self.settings, self.state.model
        means, count = at.means(), at.count("astray")
        metrics = corrected(means)
        if validation is not None:
            size = settings.validation_batch
            judged = validate(model, self.training, *validation, batch_size=size)
            metrics.update({f"validation_{name}": value for name, value in judged.items()})
        at.history.append(metrics)
        at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
        if settings.patience is not None:
            at.wait(metrics["validation_robust"], model, settings.patience)
        self._advance("epoch", metrics)
        self.save()
        watch = Watch(at.said)
        watch.residual(at.epoch, metrics["residual"])
        if count:
            watch.judged(at.epoch, means, count)
        if validation is not None:
            watch.validation(at.history, len(validation[0]))

    def finish(self) -> Metrics:
        """Judge the model that the training has ended with, and note it with the last epoch."""
        at, model, steps = self.progress, self.state.model, len(self.batches)
        if not at.classes or hasattr(self.batches, "skip"):  # those cannot be drawn again
            return {}
        try:
            drawn = iter(self.batches.epoch(at.epoch - 1))
            first = next(drawn)
            all_drawn = at.epoch * steps * len(first[0])
            most = min(_FINISHED * self.settings.judged, math.ceil(all_drawn / _FINISHED_SHARE))
            images = chain([first], drawn)
            found, count = finished(model, self.training, images, at.classes, most)
        except Exception as error:
            warnings.warn(
                f"the training has ended, but its model could not be judged: {error!r}",
                RuntimeWarning,
                stacklevel=3,
            )
            return {}
        at.history[-1].update({f"final_{name}": value for name, value in found.items()})
        if count:
            Watch(at.said).judged(at.epoch, found, count)
        return found

    def bar(self) -> Any:
        """A bar over all steps."""
        return progress_bar(
            total=self.settings.epochs * len(self.batches),
            initial=self._done(),
            desc="adversarial training",
            disable=not self.settings.verbose,
        )

    def _done(self) -> int:
        return self.progress.epoch * len(self.batches) + self.progress.step

    def _judge(self, step: AdversarialStep, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Rows of a step by solves: before its update, early in the training and as epochs end."""
        at, steps = self.progress, len(self.batches)
        most = min(self.settings.judged, math.ceil(steps * len(x) / _SHARE))
        ending = (steps - at.step - 1) * len(x) < most
        early = at.epoch == 0 and at.step == steps // _EARLY
        if not (ending or early):
            return {}
        rows = judged_rows(self.state.model, step, x, y, max(0, most - at.count("astray")))
        if rows and not ending:
            means = {name: float(t.double().mean()) for name, t in rows.items()}
            Watch(at.said).judged(1, means, len(rows["astray"]))
        return rows

    def _search(self, x: Tensor, y: Tensor) -> AdversarialStep:
        at, kept = self.progress, self.kept
        generator = seeded_generator(x.device, self.settings.seed, at.epoch, at.step)
        start = None if kept is None else kept.start(at.epoch, at.step, x, generator)
        training = self.training if kept is None or start is None else kept.search
        return training(
            self.state.model,
            x,
            y,
            wrapped=self.wrapped,
            generator=generator,
            start=start,
            ahead=kept is not None,
        )

    def _advance(self, interval: StepInterval, metrics: Metrics) -> None:
        scheduler = self.state.scheduler
        if scheduler is None or interval != self.settings.scheduler_interval:
            return
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        elif scheduler.mode == "max":
            scheduler.step(metrics.get("validation_robust", metrics.get("robust", 0.0)))
        else:
            scheduler.step(metrics["loss"])
