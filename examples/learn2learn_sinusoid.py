"""Fit a sinusoid from ten points: a regression DEQ meta-trained with JIIO in learn2learn.

    python examples/learn2learn_sinusoid.py [--iterations 300] [--out sinusoid.png]

The plot shows three sinusoids that training never saw, before and after adaptation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from torch.nn.functional import mse_loss
from tqdm import tqdm

from jiio_learn2learn import JIIOLearner
from jiio_learn2learn.data import sinusoid_taskset
from jiio_plugins.data import Sinusoids
from jiio_plugins.models import SinusoidDEQ

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass
class Args:
    """Sinusoid regression."""

    iterations: int = 300
    shots: int = 10
    meta_batch_size: int = 4
    meta_lr: float = 5e-3
    out: Path = Path("sinusoid.png")


def main(args: Args) -> None:
    random.seed(0)
    torch.manual_seed(0)
    tasks = sinusoid_taskset(Sinusoids(tasks=2000), samples=2 * args.shots)
    model = SinusoidDEQ()
    maml = JIIOLearner(
        model, lr=0.2, adapt=["context", "head.weight", "head.bias"], reg=0.2, iters=200, memory=20
    )
    opt = torch.optim.Adam(maml.parameters(), args.meta_lr)
    bar = tqdm(range(args.iterations), desc="meta-training")
    recent = 0.0
    for iteration in bar:
        opt.zero_grad()
        for _ in range(args.meta_batch_size):
            x, y = tasks.sample()
            learner = maml.clone()
            learner.adapt(mse_loss(learner(x[: args.shots]), y[: args.shots]))
            error = mse_loss(learner(x[args.shots :]), y[args.shots :])
            (error / args.meta_batch_size).backward()
            weight = 0.02 if iteration else 1.0
            recent += weight * (error.item() - recent)
        torch.nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        opt.step()
        bar.set_postfix(error=f"{recent:.3f}")

    unseen = Sinusoids(tasks=100, seed=1)
    grid = torch.linspace(-5, 5, 200)[:, None]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    errors: list[tuple[float, float]] = []
    for task in range(len(unseen.x)):
        x, y = unseen.x[task, : args.shots], unseen.y[task, : args.shots]
        truth = unseen.curve(task)(grid)
        learner = maml.clone()
        before = learner(grid).detach()
        learner.adapt(mse_loss(learner(x), y))
        after = learner(grid).detach()
        errors.append((mse_loss(before, truth).item(), mse_loss(after, truth).item()))
        if task < len(axes):
            axis = axes[task]
            axis.plot(grid, truth, color="0.6", label="sinusoid")
            axis.plot(grid, before, "--", label="before adaptation")
            axis.plot(grid, after, label="after adaptation")
            axis.plot(x, y, "k.", label="support points")
            axis.set(xlabel="x", title=f"amplitude {unseen.amplitude[task]:.1f}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(args.out, dpi=150)
    before_mean, after_mean = torch.tensor(errors).mean(0).tolist()
    print(
        f"mean squared error on {len(errors)} unseen sinusoids: before {before_mean:.3f}, after "
        f"{after_mean:.3f}; plot in {args.out}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
