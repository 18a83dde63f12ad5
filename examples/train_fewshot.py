"""Meta-train a few-shot DEQ with JIIO; on several processes with torchrun.

    python examples/train_fewshot.py --steps 1000 --out fewshot
    torchrun --nproc-per-node 2 examples/train_fewshot.py --steps 1000 --out fewshot

A run that was stopped goes on where its last checkpoint was, to the same weights: every step draws
its tasks from a generator of its own. The tasks of a step are shared out over the processes, whose
gradients are averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from jiio_learn2learn import JIIOLearner
from jiio_plugins.data import ClassImages, load_glyphs, load_omniglot, sample_tasks
from jiio_plugins.models import MDEQFewShot
from jiio_plugins.utils import TrainingState, launch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Args:
    """Meta-training."""

    out: Path = Path("fewshot")
    """folder of checkpoint, weights and TensorBoard's log"""
    steps: int = 1000
    tasks: int = 8
    """tasks of a meta-step, all processes together"""
    ways: int = 5
    shots: int = 1
    queries: int = 3
    adapt: tuple[str, ...] = ("context", "head.weight", "head.bias")
    """parameters that a task adapts; the head's two alone are cheaper, with --reg 0.03 --lr 0.5"""
    lr: float = 0.4
    """of the adaptation"""
    reg: float = 0.5
    iters: int = 80
    first_order: bool = False
    meta_lr: float = 3e-3
    paper_size: bool = False
    omniglot: Path | None = None
    """torchvision's root, in place of the glyphs"""
    fonts: Path | None = None
    """a folder of fonts, in place of the DejaVu faces"""
    cache: Path | None = None
    checkpoint_every: int = 50
    stop_after: int | None = None
    """end this run after so many steps; start it again to go on"""
    test_tasks: int = 100
    device: str = "auto"
    seed: int = 0


def load(args: Args, split: str) -> ClassImages:
    if args.omniglot is not None:
        return load_omniglot(args.omniglot, split, cache=args.cache)
    return load_glyphs(split, fonts=args.fonts, cache=args.cache)


def task_error(maml: JIIOLearner, task: Any) -> tuple[torch.Tensor, float]:
    """Adapt to one task; query loss and accuracy."""
    x, y, x_query, y_query = task
    learner = maml.clone()
    learner.adapt(cross_entropy(learner(x), y, reduction="sum"))
    logits = learner(x_query)
    right = float((logits.argmax(1) == y_query).double().mean())
    return cross_entropy(logits, y_query), right


def average_gradients(fabric: Fabric, parameters: list[torch.nn.Parameter]) -> None:
    """One message for all of them."""
    if fabric.world_size == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    mean = fabric.all_reduce(flat, reduce_op="mean")
    for p, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.reshape(p.shape).clone()


def main(args: Args) -> None:
    fabric = launch(args.device)
    if args.tasks % fabric.world_size:
        raise SystemExit(
            f"--tasks {args.tasks} cannot be shared out evenly over {fabric.world_size} processes"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if fabric.is_global_zero:
        load(args, "train")  # one process renders, the others read the cache
    fabric.barrier()
    data = load(args, "train")

    torch.manual_seed(args.seed)  # the same first weights everywhere
    build = MDEQFewShot.paper if args.paper_size else MDEQFewShot
    model = build(ways=args.ways).to(fabric.device)
    maml = JIIOLearner(
        model,
        lr=args.lr,
        adapt=args.adapt,
        reg=args.reg,
        iters=args.iters,
        memory=20,
        first_order=args.first_order,
    )
    parameters = list(maml.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.meta_lr)

    path = args.out / "checkpoint.pt"
    begin = 0
    state = TrainingState(model, optimizer, None, {})
    if path.is_file():
        progress, _ = state.load(path)
        begin = progress["step"]
    log = SummaryWriter(args.out) if fabric.is_global_zero else None
    own = args.tasks // fabric.world_size
    end = args.steps if args.stop_after is None else min(args.steps, begin + args.stop_after)
    bar = tqdm(
        range(begin, end),
        initial=begin,
        total=args.steps,
        desc="meta-training",
        disable=not fabric.is_global_zero,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * args.meta_lr * (1 + math.cos(math.pi * step / args.steps))
        # every process draws all tasks of the step and takes its share
        generator = torch.Generator().manual_seed(args.seed + 1_000_003 * step)
        tasks = sample_tasks(
            data,
            args.tasks,
            ways=args.ways,
            shots=args.shots,
            queries=args.queries,
            generator=generator,
        ).to(fabric.device)
        optimizer.zero_grad()
        loss = right = 0.0
        for k in range(fabric.global_rank * own, (fabric.global_rank + 1) * own):
            error, correct = task_error(maml, [t[k] for t in tasks])
            (error / own).backward()
            loss, right = loss + error.item() / own, right + correct / own
        average_gradients(fabric, parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        loss, right = fabric.all_reduce(torch.tensor([loss, right]), reduce_op="mean").tolist()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{right:.3f}")
        if log is not None:
            log.add_scalar("loss", loss, step)
            log.add_scalar("accuracy", right, step)
            if (step + 1) % args.checkpoint_every == 0 or step + 1 == end:
                state.save(path, {"step": step + 1})
    weights = torch.nn.utils.parameters_to_vector(parameters).detach()
    if not torch.equal(fabric.broadcast(weights), weights):
        raise RuntimeError("the processes' weights have drifted apart")
    if log is None:
        return
    log.close()
    if end < args.steps:
        print(f"stopped after step {end} of {args.steps}; run it again to go on")
        return
    save_file(model.state_dict(), args.out / "fewshot.safetensors")
    generator = torch.Generator().manual_seed(args.seed)
    tasks = sample_tasks(
        load(args, "test"),
        args.test_tasks,
        ways=args.ways,
        shots=args.shots,
        queries=5,
        generator=generator,
    ).to(fabric.device)
    total = 0.0
    for k in tqdm(range(args.test_tasks), desc="test tasks"):
        total += task_error(maml, [t[k] for t in tasks])[1]
    print(
        f"accuracy on {args.test_tasks} tasks of unseen classes: "
        f"{100 * total / max(1, args.test_tasks):.1f} %; weights in {args.out}/fewshot.safetensors"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
