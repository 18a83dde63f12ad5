"""Fitting latents of held-out images: JIIO against Adam and L-BFGS, in one run.

    python benchmarks/generative.py --data DIR [--images 16] [--out out/benchmark-generative]
    python benchmarks/generative.py --data DIR --generator fashion-mnist-spatial

Same decoder, same Fashion-MNIST test images, all from the zero latent, minimising the squared error
of each image by

* Adam with a full solve of state and adjoint at every step (cold, relative tolerance 1e-3), over
  learning rates;
* the same warm-started, over learning rates, tolerances and caps of {1, 2, 5} inner steps;
* L-BFGS with full solves and a line search, one image at a time;
* Adam through an unrolled decoder;
* JIIO over step sizes and memories, and with the paper's Anderson mixing in place of ours.

Every iterate is judged by a converged solve (1e-4) that no method had a part in and that is not
counted. The target of each image is what the best cold Adam run reaches on it, plus ``slack``. A
method's cost is, image by image, what it had spent in f evaluations and VJPs when it first met the
target; images that never do are counted at the whole run and named. The mean error of the batch
against the mean target is reported beside it, with seconds.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from adam import NestedAdam
from torch import Tensor
from tqdm import tqdm

from jiio_plugins import Anderson, Implicit, Joint, Unrolled, count_evaluations
from jiio_plugins.data import load_fashion_mnist
from jiio_plugins.generative import default_step_size, load_generator
from jiio_plugins.joint import Problem, Variable
from jiio_plugins.models import MDEQDecoder, load_pretrained
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jiio_plugins.methods import Method

RATES = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass
class Args:
    """Benchmark of latent fits."""

    data: Path = Path("data")
    """folder of Fashion-MNIST"""
    generator: str = "fashion-mnist-generator"
    """a shipped one"""
    run: Path | None = None
    """folder of a train-generator run instead"""
    images: int = 16
    adam_steps: int = 60
    joint_steps: int = 60
    slack: float = 0.02
    out: Path = Path("out/benchmark-generative")
    threads: int = 1


@dataclass
class History:
    """Iterates of one run with what had been spent on each sample by then."""

    latents: list[Tensor] = field(default_factory=list)
    f_evals: list[Tensor] = field(default_factory=list)
    vjps: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)

    def add(self, v: Tensor, f_evals: Tensor, vjps: Tensor) -> None:
        self.latents.append(v.detach().clone())
        self.f_evals.append(f_evals.clone())
        self.vjps.append(vjps.clone())
        self.seconds.append(time.perf_counter() - self.begin)


@dataclass
class Row:
    """One method at one setting, and what it took to reach the target."""

    family: str
    name: str
    f_evals: float
    vjps: float
    missed: int
    batch_cost: float | None
    batch_seconds: float | None
    error: float

    @property
    def cost(self) -> float:
        return self.f_evals + self.vjps


class Fits:
    """The decoder, the images and the methods."""

    def __init__(self, decoder: MDEQDecoder, images: Tensor) -> None:
        self.decoder, self.images = decoder, images
        self.rows = len(images)
        for p in decoder.parameters():
            p.requires_grad_(False)

    def objective(self, made: Tensor) -> Tensor:
        return (made - self.images).square().flatten(1).sum(1)

    def problem(self) -> Problem:
        start = self.decoder.zeros(self.rows)
        return Problem(Variable(self.decoder, start), self.objective, share_start=True)

    def run(self, method: Method) -> History:
        problem, history = self.problem(), History()
        method.run(problem, callback=lambda at: history.add(at.v, problem.f_evals, problem.vjps))
        return history

    def joint(self, step_size: float, steps: int, **settings: Any) -> History:
        return self.run(Joint(max_iter=steps, step_size=step_size, tol=0.0, **settings))

    def adam(
        self, rate: float, steps: int, tol: float, cap: int = 60, warm: bool = False
    ) -> History:
        """Adam on gradients from solves to ``tol``; costs at their least, as in ``Nested``."""
        solver = Anderson(max_iter=cap, tol=tol)
        return self.run(
            NestedAdam(solver=solver, warm_start=warm, warmup=5, max_iter=steps, step_size=rate)
        )

    def through_the_model(self, rows: slice, make: Callable[[Tensor], Any], steps: int) -> History:
        """Any torch optimiser on ``decoder(w)``, with the gradient the layer carries."""
        w = self.decoder.zeros(len(self.images[rows])).requires_grad_()
        optimizer, history = make(w), History()
        with count_evaluations() as counter:

            def closure() -> Tensor:
                at = w.detach().clone()
                optimizer.zero_grad()
                error = (self.decoder(w) - self.images[rows]).square().sum()
                error.backward()
                n = len(w)
                history.add(
                    at.flatten(1),
                    torch.full((n,), counter.f_evals / n),
                    torch.full((n,), counter.vjps / n),
                )
                return error

            for _ in range(steps):
                optimizer.step(closure)
        return history

    def lbfgs(self, steps: int) -> History:
        """One image at a time: a batch would share one line search."""
        layer = self.decoder.equilibrium
        own = layer.solver, layer.adjoint
        layer.solver, layer.adjoint = Anderson(max_iter=60, tol=1e-3), Implicit()
        runs = [
            self.through_the_model(
                slice(i, i + 1),
                lambda w: torch.optim.LBFGS(
                    [w], lr=1, max_iter=steps, max_eval=2 * steps, line_search_fn="strong_wolfe"
                ),
                1,
            )
            for i in range(self.rows)
        ]
        layer.solver, layer.adjoint = own
        longest = max(len(r.latents) for r in runs)
        joined = History()
        for k in range(longest):
            at = [min(k, len(r.latents) - 1) for r in runs]
            pairs = list(zip(runs, at, strict=True))
            joined.latents.append(torch.cat([r.latents[j] for r, j in pairs]))
            joined.f_evals.append(torch.cat([r.f_evals[j] for r, j in pairs]))
            joined.vjps.append(torch.cat([r.vjps[j] for r, j in pairs]))
            joined.seconds.append(sum(r.seconds[j] for r, j in pairs))
        return joined

    def unrolled(self, rate: float, depth: int, steps: int) -> History:
        """VJPs are as many as f evaluations: the graph of all of them is gone back through."""
        layer = self.decoder.equilibrium
        own, layer.adjoint = layer.adjoint, Unrolled(steps=depth)
        history = self.through_the_model(
            slice(None), lambda w: torch.optim.Adam([w], lr=rate), steps
        )
        layer.adjoint = own
        history.vjps = [f.clone() for f in history.f_evals]
        return history

    @torch.no_grad()
    def errors(self, history: History) -> Tensor:
        """Mean squared error of every iterate by a converged solve, ``(iterates, rows)``."""
        layer = self.decoder.equilibrium
        own, layer.solver = layer.solver, Anderson(max_iter=200, tol=1e-4)
        out = [
            (self.decoder(v.reshape(-1, *self.decoder.latent_shape)) - self.images)
            .square()
            .flatten(1)
            .mean(1)
            for v in history.latents
        ]
        layer.solver = own
        return torch.stack(out)


def judge(family: str, name: str, history: History, errors: Tensor, target: Tensor) -> Row:
    met = errors <= target
    reached = met.any(0)
    at = torch.where(reached, met.float().argmax(0), len(errors) - 1)
    column = torch.arange(len(target))
    f = torch.stack(history.f_evals)[at, column]
    vjps = torch.stack(history.vjps)[at, column]
    below = (errors.mean(1) <= target.mean()).nonzero()
    cost = seconds = None
    if len(below):
        k = int(below[0])
        cost = float((history.f_evals[k] + history.vjps[k]).mean())
        seconds = history.seconds[k]
    return Row(
        family,
        name,
        float(f.mean()),
        float(vjps.mean()),
        int((~reached).sum()),
        cost,
        seconds,
        float(errors[-1].mean()),
    )


def methods(fits: Fits, args: Args) -> Iterator[tuple[str, str, Callable[[], History]]]:
    """Family, setting and run of everything but cold Adam."""
    for rate, cap, tol in itertools.product(RATES[1:], (1, 2, 5), (1e-2, 1e-1)):
        if cap == 1 and tol > 1e-2:
            continue  # a cap of one leaves the tolerance without effect
        name = f"rate {rate:g}, cap {cap}, tol {tol:g}"

        def warm(r: float = rate, c: int = cap, t: float = tol) -> History:
            return fits.adam(r, 2 * args.adam_steps, t, c, warm=True)

        yield "Adam, warm", name, warm
    yield "L-BFGS, full solves", "strong Wolfe", lambda: fits.lbfgs(args.adam_steps)
    for rate, depth in itertools.product((0.1, 0.2), (8, 16)):

        def unrolled(r: float = rate, d: int = depth) -> History:
            return fits.unrolled(r, d, args.adam_steps)

        yield "Adam, unrolled", f"rate {rate:g}, depth {depth}", unrolled
    default = default_step_size(fits.decoder)
    settings: list[dict[str, Any]] = [{"acceleration": memory} for memory in (5, 10, 20)]
    settings.append({"mixing": "anderson"})
    for share, setting in itertools.product((0.5, 0.7, 1.0, 1.4), settings):
        step = share * default

        def joint(at: float = step, chosen: dict[str, Any] = setting) -> History:
            return fits.joint(at, args.joint_steps, **chosen)

        family = "JIIO, Anderson mixing" if "mixing" in setting else "JIIO"
        yield family, f"step {step:.2g}, memory {setting.get('acceleration', 10)}", joint


def main(args: Args) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    shipped: Any = load_pretrained(args.generator)
    decoder = load_generator(args.run) if args.run else shipped
    images, _ = load_fashion_mnist(args.data, "test")
    fits = Fits(decoder, images[: args.images])
    cold = []
    for rate in tqdm(RATES, desc="Adam, cold"):
        history = fits.adam(rate, args.adam_steps, 1e-3)
        cold.append((f"rate {rate:g}, tol 0.001", history, fits.errors(history)))
    best = min((errors for _, _, errors in cold), key=lambda e: float(e[-1].mean()))
    target = best[-1] * (1 + args.slack)
    rows = [judge("Adam, cold", name, h, e, target) for name, h, e in cold]
    for family, name, run in tqdm(list(methods(fits, args)), desc="the others"):
        history = run()
        rows.append(judge(family, name, history, fits.errors(history), target))
    show(rows, target, args)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "images": args.images,
        "threads": args.threads,
        "torch": torch.__version__,
        "target": target.tolist(),
        "rows": [asdict(r) for r in rows],
    }
    write_json(args.out / "results.json", record)


def show(rows: list[Row], target: Tensor, args: Args) -> None:
    print(
        f"{args.images} test images, mean target {float(target.mean()):.5f}; per image: cost when "
        "it meets its own target; batch: when the mean error meets the mean target"
    )
    print(
        f"{'':22} {'':28} {'f':>6} {'VJP':>6} {'f+VJP':>7} {'missed':>6} {'batch':>7} "
        f"{'seconds':>8} {'error':>8}"
    )
    for r in rows:
        batch = "-" if r.batch_cost is None else f"{r.batch_cost:.0f}"
        seconds = "-" if r.batch_seconds is None else f"{r.batch_seconds:.2f}"
        print(
            f"{r.family:22} {r.name:28} {r.f_evals:6.0f} {r.vjps:6.0f} {r.cost:7.0f} "
            f"{r.missed:6d} {batch:>7} {seconds:>8} {r.error:8.5f}"
        )
    reached = [r for r in rows if r.batch_cost is not None]
    ours = [r for r in reached if r.family == "JIIO"]
    if not ours:
        print("JIIO did not reach the target")
        return
    best = min(ours, key=lambda r: r.batch_cost or 0)
    for family in dict.fromkeys(r.family for r in rows):
        peers = [r for r in reached if r.family == family]
        if family == "JIIO" or not peers:
            continue
        peer = min(peers, key=lambda r: r.batch_cost or 0)
        quick = min(r.batch_seconds or 0 for r in peers)
        assert peer.batch_cost
        assert best.batch_cost
        assert best.batch_seconds
        print(
            f"JIIO ({best.name}) takes 1/{peer.batch_cost / best.batch_cost:.1f} of the f+VJP and "
            f"1/{quick / best.batch_seconds:.1f} of the seconds of {family} ({peer.name})"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
