"""The training loop, on one process or on several."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jiio_plugins.data.images import Images, load_images, to_unit
from jiio_plugins.generative import files
from jiio_plugins.generative.config import CONFIG, TrainConfig, config_of
from jiio_plugins.generative.latents import fit, fit_latents
from jiio_plugins.generative.pace import Every, duration, open_logger
from jiio_plugins.generative.pictures import PICTURES, write_pictures
from jiio_plugins.generative.step import Encoder, TrainingStep
from jiio_plugins.utils.checkpoint import TrainingState, fingerprint
from jiio_plugins.utils.console import note, progress_bar
from jiio_plugins.utils.distributed import launch
from jiio_plugins.utils.files import owning, understood
from jiio_plugins.utils.signals import Interrupted, Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lightning_fabric import Fabric

    from jiio_plugins.generative.step import StepResult
    from jiio_plugins.methods.base import Method
    from jiio_plugins.models.decoder import MDEQDecoder

_ENOUGH = 20  # held-out fits, the worst of which says what is far from the data
_RESUMABLE = (  # by what a resumed run may differ
    "out",
    "resume",
    "epochs",
    "steps",
    "folder",
    "accelerator",
    "checkpoint_every",
    "checkpoint_seconds",
    "pictures_every",
    "pictures_seconds",
    "loggers",
)


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        out: its folder.
        decoder: with averaged weights.
        steps: that were done.
        psnr: mean of held-out fits, in dB (peak 1).
    """

    out: Path
    decoder: MDEQDecoder
    steps: int
    psnr: float


def train(
    config: TrainConfig,
    *,
    method: Method | None = None,
    on_step: Callable[[int, StepResult], None] | None = None,
) -> Trained:
    """Train a generator by fitting latents inside the step, and write the run's folder.

    Minimises ``mean_i min_w ‖G(w) − y_i‖² + λ‖w‖²`` over the weights of G. What is random in a
    step depends on (seed, step, process) alone, so resuming needs no random state.

    Args:
        config: everything there is to choose, the same as the command line of
            ``jiio train-generator``.
        method: what fits the latents instead of :class:`jiio_plugins.Joint`, such as a
            :class:`jiio_plugins.Nested` to compare with.
        on_step: called after every step with its number and result.

    Returns:
        A :class:`Trained`.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        BlockingIOError: another process is at work on this run.
        FileNotFoundError, ValueError: bad data or checkpoint. The message says what to do.
        FloatingPointError: loss or weights became NaN or Inf. The last checkpoint is from before.
        OSError: a checkpoint could not be written. The one before is kept.
        Interrupted: SIGINT or SIGTERM arrived. The step was finished and a checkpoint written.

    Source: Gurumurthy, Bai, Manchester and Kolter (NeurIPS 2021), section 4.1.
    """
    fabric = launch(config.accelerator, precision=config.precision)
    if config.resume:
        config_of(config.out)
    with _owning(config.out) if fabric.is_global_zero else nullcontext():
        config = _settle(config, fabric)
        images = load_images(config.data, config.folder, config.resize, without=config.out)
        if fabric.is_global_zero:
            _report(images, config, fabric)
        run = _Run(config, images, fabric, method)
        if config.resume:
            run.load()
        run.record()
        run.loop(on_step)
        return run.finish()


def _owning(out: Path) -> AbstractContextManager[None]:
    """The folder of a run has one writer."""
    names = (files.CHECKPOINT, CONFIG, files.GENERATOR, files.LATENTS, *PICTURES)
    return owning(*(out / name for name in names))


def _settle(config: TrainConfig, fabric: Fabric) -> TrainConfig:
    """See that the folder is fresh, or take the settings of the run that is there."""
    if config.resume:
        saved = TrainConfig.read(config_of(config.out))
        given = config.given()
        for name, value in given.items():
            if name not in _RESUMABLE and value != getattr(saved, name):
                raise ValueError(
                    f"{name} was {getattr(saved, name)!r} and cannot be {value!r} in a resumed "
                    f"run: leave it out, or start afresh with another --out"
                )
        config = replace(saved, **{k: v for k, v in given.items() if k in _RESUMABLE})
    elif config.out.exists() and any(
        p.suffix not in (".tmp", ".lock") for p in config.out.iterdir()
    ):
        raise FileExistsError(
            f"{config.out} exists and is not empty: choose another --out, or go on with --resume"
        )
    fabric.barrier()
    if config.batch_size % fabric.world_size:
        raise ValueError(
            f"batch_size {config.batch_size} must be divisible by {fabric.world_size} processes"
        )
    return config


def _report(images: Images, config: TrainConfig, fabric: Fabric) -> None:
    for path in images.skipped:
        note(f"skipped, not readable: {path}")
    count = f", {len(images.skipped)} files skipped" if images.skipped else ""
    note(
        f"{len(images.train)} training and {len(images.held_out)} held-out images "
        f"{tuple(images.shape)}{count}; {fabric.world_size} × {fabric.device}; run: {config.out}"
    )


class _Run:
    """Model, averages, optimiser, latent table and the number of steps done."""

    def __init__(
        self, config: TrainConfig, images: Images, fabric: Fabric, method: Method | None
    ) -> None:
        self.config, self.images, self.fabric = config, images, fabric
        self.model = config.model.for_images(images.shape)
        encoder = None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch's own touches the GPUs too
            decoder = self.model.build(images.shape)
            if config.latents == "encoder":
                encoder = Encoder(decoder.image_shape, decoder.latent_shape)
        step = TrainingStep(decoder, encoder, config, method)
        optimizer = torch.optim.AdamW(
            step.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.ema = AveragedModel(decoder.to(fabric.device), multi_avg_fn=self._average)
        self.ema.eval()
        self.optimizer: Any
        self.wrapped, self.optimizer = fabric.setup(step, optimizer)
        self.inner = step
        # each process has its own images, and their latents
        self.mine = torch.arange(fabric.global_rank, len(images.train), fabric.world_size)
        self.table = torch.zeros(len(self.mine), *decoder.latent_shape)
        self.batch = min(config.batch_size // fabric.world_size, len(self.mine))
        self.per_epoch = max(1, len(images.train) // (self.batch * fabric.world_size))
        self.total = config.epochs * self.per_epoch
        if config.steps is not None:
            self.total = min(self.total, config.steps)
        self.planned = config.epochs * self.per_epoch
        self.done = 0
        self.psnr = self.lowest = math.nan
        self.loggers: list[Any] = []
        self.data = fingerprint(images.train)
        given = json.loads(config.to_json()).items()
        own = {*_RESUMABLE, "checksum", "jiio_plugins"}  # of this call, not of the training
        same = {name: value for name, value in given if name not in own}
        same["set of training images"] = f"{len(images.train)}, fingerprint {self.data}"
        self.state = TrainingState(step, optimizer, None, same)

    def _average(self, averaged: Any, current: Any, count: Any) -> None:
        """An exponential average that is short at first: pictures of the start are none of it."""
        decay = min(self.config.ema_decay, (1 + self.done) / (10 + self.done))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def record(self) -> None:
        """Open the loggers, and write the settings where they are new."""
        if not self.fabric.is_global_zero:
            return
        names = self.config.loggers
        self.loggers = [open_logger(name, self.config.out, self.done) for name in names]
        path = self.config.out / CONFIG
        known = TrainConfig.read(path) if path.is_file() else None
        if known != replace(self.config, resume=False):
            self.config.out.mkdir(parents=True, exist_ok=True)
            files.save_config(path, self.config)

    def loop(self, on_step: Callable[[int, StepResult], None] | None) -> None:
        """Train until the last step."""
        config, rank_zero = self.config, self.fabric.is_global_zero
        # several processes would have to agree on the step to stop after
        stop = Stop()
        with (
            stop if self.fabric.world_size == 1 else nullcontext(),
            progress_bar(
                total=self.total, initial=self.done, desc="training", disable=not rank_zero
            ) as bar,
        ):
            checkpoint = Every(config.checkpoint_every, config.checkpoint_seconds)
            pictures = Every(config.pictures_every, config.pictures_seconds)
            first, clock, seen = self.done + 1, time.perf_counter(), 0
            for rows in self._batches():
                result = self._step(rows)
                seen += len(rows) * self.fabric.world_size
                if on_step is not None:
                    on_step(self.done, result)
                bar.update()
                if self.done == first and rank_zero:
                    self._estimate(time.perf_counter() - clock)
                if self.done % 10 == 0 or self.done == self.total or self.done <= 3:
                    rate, clock, seen = seen / (time.perf_counter() - clock), time.perf_counter(), 0
                    self._log(result, rate, bar)
                save, draw = self._agreed(checkpoint.due(self.done), pictures.due(self.done))
                if save:
                    with checkpoint.doing():
                        self.save()
                if stop.number is not None:
                    self.save()
                    raise Interrupted(
                        stop.number,
                        f"step {self.done} of {self.total} is done, and in the checkpoint. Go on "
                        "with the same command and --resume",
                    )
                if draw and rank_zero:
                    with pictures.doing():
                        self._pictures(16)

    def _agreed(self, *due: bool) -> tuple[bool, ...]:
        """What the first process decides, whose clock is not that of the others."""
        if self.fabric.world_size == 1:
            return due
        return self.fabric.broadcast(due)

    def _estimate(self, seconds: float) -> None:
        """Say after the first step how long the others will take."""
        left = self.total - self.done
        note(
            f"the first step took {seconds:.1f} s: {left} more take about "
            f"{duration(left * seconds)}. --steps or --epochs makes it shorter, also with --resume"
        )

    def _batches(self) -> Iterator[Tensor]:
        """Rows of this process's images. The order of an epoch depends on (seed, epoch) alone."""
        while self.done < self.total:
            epoch, first = divmod(self.done, self.per_epoch)
            order = torch.randperm(len(self.mine), generator=self._random(epoch, device="cpu"))
            for k in range(first, self.per_epoch):
                if self.done >= self.total:
                    return
                yield order[k * self.batch : (k + 1) * self.batch]

    def _random(self, *key: int, device: Any) -> torch.Generator:
        """A generator for (seed, process, key)."""
        seed = 0
        for part in (self.config.seed, self.fabric.global_rank, len(key), *key):
            seed = (seed * 1_000_003 + part) % 2**63
        return torch.Generator(device).manual_seed(seed)

    def _step(self, rows: Tensor) -> StepResult:
        device, config = self.fabric.device, self.config
        images = to_unit(self.images.train[self.mine[rows]].to(device))
        start = self.table[rows]
        if config.latents != "table":
            start = torch.zeros_like(start)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * _schedule(self.done, self.planned)
        self.wrapped.train()
        probes = self._random(self.done, 1, device=device)
        result: StepResult = self.wrapped(images, start.to(device), probes)
        self.optimizer.zero_grad()
        self.fabric.backward(result.loss)
        self.fabric.clip_gradients(
            self.wrapped, self.optimizer, max_norm=config.grad_clip, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.ema.update_parameters(self.inner.decoder)
        self.table[rows] = result.latents.detach().cpu()
        self.done += 1
        return result

    def _log(self, result: StepResult, rate: float, bar: Any) -> None:
        loss = float(result.loss.detach())
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        if not self.fabric.is_global_zero:
            return
        values = {
            "loss": loss,
            "PSNR": _psnr(float(result.mse.mean())),
            "residual": float(result.z_residual.mean()),
            "adjoint": float(result.costate_residual.mean()),
            "images/s": rate,
        }
        bar.set_postfix_str(
            f"loss {loss:.4f}, PSNR {values['PSNR']:.2f} dB, residual {values['residual']:.0e}, "
            f"adjoint {values['adjoint']:.0e}, {rate:.0f} images/s"
        )
        self._to_loggers({f"train/{name}": value for name, value in values.items()})

    def _to_loggers(self, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(values, self.done)

    def _diverged(self, what: str) -> FloatingPointError:
        there = (self.config.out / files.CHECKPOINT).is_file()
        kept = "The last checkpoint is from before" if there else "There is no checkpoint yet"
        return FloatingPointError(
            f"{what} at step {self.done}: lower lr, or raise jacobian_weight. {kept}"
        )

    @property
    def averaged(self) -> MDEQDecoder:
        """The decoder with averaged weights."""
        return cast("MDEQDecoder", self.ema.module)

    def _pictures(self, images: int) -> None:
        """Fit so many held-out images with the averaged weights, and draw them."""
        config = self.config
        held_out = to_unit(self.images.held_out[:images].to(self.fabric.device))
        fitted = fit(self.averaged, held_out, latent_penalty=config.latent_penalty)
        self.psnr = float(fitted.psnr.mean())
        if len(held_out) >= _ENOUGH:
            self.lowest = float(fitted.psnr.min())
        visited = self.table[self.table.flatten(1).any(1)][-config.latents_kept :]
        write_pictures(
            config.out, self.averaged, held_out, fitted, visited.to(self.fabric.device), config.seed
        )
        self._to_loggers({"held-out/PSNR": self.psnr})
        note(f"step {self.done}: held-out fits {self.psnr:.2f} dB, pictures in {config.out}")

    # Checkpoints --------------------------------------------------------------------------------

    def save(self) -> None:
        """Write checkpoint and generator. The table is gathered from all processes."""
        tensors = [*self.inner.state_dict().values(), *self.ema.state_dict().values()]
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise self._diverged("the weights hold NaN or Inf")
        table = self._gathered()
        if self.fabric.is_global_zero:
            progress = {"step": self.done, "ema": self.ema.state_dict(), "table": table}
            self.state.save(self.config.out / files.CHECKPOINT, progress)
            self._save_generator()
        self.fabric.barrier()

    def _save_generator(self) -> None:
        known = {} if math.isnan(self.lowest) else {"lowest_psnr": self.lowest}
        path = self.config.out / files.GENERATOR
        files.save_generator(path, self.averaged, self.model, step=self.done, **known)

    def _gathered(self) -> Tensor:
        """The latents of all training images, in their order."""
        world = self.fabric.world_size
        if world == 1:
            return self.table
        longest = math.ceil(len(self.images.train) / world)
        padded = torch.zeros(longest, *self.table.shape[1:])
        padded[: len(self.table)] = self.table
        shards = self.fabric.all_gather(padded.to(self.fabric.device)).cpu()  # type: ignore[union-attr]
        return shards.transpose(0, 1).reshape(-1, *self.table.shape[1:])[: len(self.images.train)]

    def load(self) -> None:
        """Go on from the checkpoint, or from the beginning if the run never had one."""
        if self.fabric.is_global_zero and self.total < self.planned:
            note(
                f"the run ends after its --steps {self.total}, before its --epochs "
                f"{self.config.epochs} do, of {self.planned} steps: with --steps None it does all"
            )
        path = self.config.out / files.CHECKPOINT
        if not path.is_file() and not (self.config.out / files.GENERATOR).exists():
            if self.fabric.is_global_zero:
                note(f"{self.config.out} has no checkpoint yet: from the first step")
            return
        progress, _ = self.state.load(path)
        with understood(path):
            self.ema.load_state_dict(progress["ema"])
            self.table = progress["table"][self.mine].clone()
            self.done = progress["step"]

    def finish(self) -> Trained:
        """Last checkpoint, pictures, and latents of training images to sample from."""
        self.save()
        out, config = self.config.out, self.config
        if self.fabric.is_global_zero:
            self._pictures(32)
            self._save_generator()  # which now says how well it fits
            some = self.images.train[: config.latents_kept]
            latents = fit_latents(
                self.averaged, some, latent_penalty=config.latent_penalty, desc="final latents"
            )
            files.save_latents(out / files.LATENTS, latents, step=self.done, images=self.data)
            for logger in self.loggers:
                logger.finalize("success")
            print(f"{self.done} steps, held-out fits {self.psnr:.2f} dB, written to {out}")
        self.fabric.barrier()
        return Trained(out, self.averaged, self.done, self.psnr)


def _schedule(step: int, total: int) -> float:
    """Linear warm-up over 2 %, then a cosine down to a twentieth."""
    warm = max(1, total // 50)
    if step < warm:
        return (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, total - warm))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))


def _psnr(mse: float) -> float:
    return -10 * math.log10(max(mse, 1e-12))
