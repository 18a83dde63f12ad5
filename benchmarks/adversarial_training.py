"""Adversarial training with JIIO against PGD training, in one run.

    python benchmarks/adversarial_training.py [--data-dir DIR] [--out out/benchmark-training]

It measures, on the shipped digits and Fashion-MNIST classifiers under an L2 ball within the box,

* the cosine between JIIO's training gradient, as it is and refined, and the one from solves to 1e-5
  at the same adversarial images, over batches of test images;
* one training step of each method on the same model and batch, in turn, ``--repeats`` times, on
  the shipped weights and, after the trainings, on those that the reference was trained to:
  CPU seconds (medians, one thread), f evaluations and VJPs per sample with everything in them
  ("JIIO, N iterations" is without the adjoint's warm-up and, where it does not say so, with ω 1.5;
  "step 4": the first step on x is of 4 ε, not of 2; "adjoint 2": warmed up in so many
  iterations);
* trainings of the same number of epochs from the same shipped weights and the same seeds (order of
  the images, penalty), and their robust accuracy by ``jiio_plugins.evaluation.robust_accuracy``,
  with paired differences to a PGD training and 95 % intervals over the test images.

"cold" solves for z and for μ from scratch in each of its 20 steps, both to relative residual 1e-3.
"warm" starts both solves where the last ones ended and stops at a tolerance or after a cap. All
methods take their parameter gradient from where the search ended, as JIIO does; only "cold" solves
on to 1e-3; "settled" evaluates f three times more at the last image. All use the same Jacobian
penalty, on digits none.

"carried": in the first epoch a search as the others; from the second on it starts at the image
where the last one for the same sample ended, one step on, and is short ("two": two iterations with
one evaluation of f in each). PGD can be given that as well: it is there in the same lengths.

Whatever is done is kept in ``--out``: run the command again and it goes on.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from records import read
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from jiio_plugins import (
    Anderson,
    Box,
    Implicit,
    Intersection,
    Joint,
    L2Ball,
    Nested,
    attack_objective,
    count_evaluations,
    envelope_loss,
    joint_solution,
)
from jiio_plugins.adversarial import (
    CARRIED_METHOD,
    CARRIED_REFINE,
    TRAINING_METHOD,
    AdversarialTraining,
    FitSettings,
    TensorBatches,
    fit_adversarially,
)
from jiio_plugins.data import load_labelled
from jiio_plugins.evaluation import (
    RobustnessReport,
    default_suite,
    paired_difference,
    robust_accuracy,
)
from jiio_plugins.models import load_pretrained
from jiio_plugins.utils import write_json

PGD_20, PGD_10 = "PGD-20 warm, tol 0.1, cap 2", "PGD-10 warm, tol 0.1, cap 2"
LONG, MIDDLE, CHEAP, CHEAPEST = (f"PGD-{n} warm, cap 1" for n in (15, 12, 10, 5))
SHORT = "PGD-8 warm, tol 0.1, cap 2"
DEFAULT = "JIIO, default"
RELAXED = "JIIO, 10 iterations, ω 1.2"
SHORT_JOINT = tuple(
    f"JIIO, 4 iterations, {warm_up}ω 1.2, step 4" for warm_up in ("", "adjoint 1, ", "adjoint 2, ")
)
LONG_STEPS = {n: f"PGD-{n} warm, cap 1, step 4" for n in (6, 7, 8)}
SETTLED = {n: f"PGD-{n} warm, cap 1, step 4, settled" for n in (3, 4, 5)}
SETTLED_JOINT = "JIIO, 3 iterations, adjoint 2, ω 1.2, step 4, settled"
CARRIED, CARRIED_TWO = "JIIO, carried", "JIIO, carried, two"
CARRIED_PGD = {n: f"PGD, carried, {n} warm, tol 0.1, cap 2" for n in (3, 4)}
CARRIED_PGD_ONE = {n: f"PGD, carried, {n} warm, cap 1" for n in (2, 3)}
SUITE = ("JIIO", "PGD nested, tight")
REFINE = (0, 5, 8, 12, 100)


@dataclass
class Args:
    """Benchmark of adversarial training."""

    data_dir: Path = Path("data")
    """folder of Fashion-MNIST: torchvision's root, or Debian's"""
    out: Path = Path("out/benchmark-training")
    data: tuple[Literal["digits", "fashion-mnist"], ...] = ("digits", "fashion-mnist")
    seeds: int = 3
    repeats: int = 5
    """times each step is measured"""
    gradient_batches: int = 10
    """batches over which gradients are compared"""
    batch_size: int = 50
    digits_epochs: int = 20
    digits_penalty: float = 0.0
    """weight of the Jacobian penalty on digits"""
    fashion_epochs: int = 1
    fashion_penalty: float = 6.0
    fashion_train: int = 5000
    """training images of Fashion-MNIST"""
    fashion_test: int = 1000
    suite: Literal["engine", "full"] = "engine"
    """engine: JIIO and tight nested PGD; full: DLR, APGD, Square and others too"""
    methods: tuple[str, ...] = ()
    """the trainings to make, by the names that are printed; none given: all of them"""
    reference: str = PGD_10
    """what differences are taken to"""
    train: bool = True
    """train and judge; otherwise only the steps are measured"""


@dataclass
class Setting:
    """One data set: shipped classifier, ball, optimiser."""

    name: str
    eps: float
    lr: float
    jacobian_weight: float
    epochs: int
    methods: tuple[str, ...]

    def training(self, name: str) -> AdversarialTraining:
        base = AdversarialTraining(
            norm=2,
            eps=self.eps,
            lower=0.0,
            upper=1.0,
            jacobian_weight=self.jacobian_weight,
            jacobian_power=0,
        )
        method, refine = METHODS[name]
        return replace(base, method=method, refine=refine)

    def carried(self, name: str) -> AdversarialTraining | None:
        """The step that takes up earlier searches; None where there is none."""
        if name not in CARRIED_METHODS:
            return None
        method, refine = CARRIED_METHODS[name]
        return replace(self.training(name), method=method, refine=refine)


def joint(
    iterations: int, relaxation: float = 1.5, step: float | None = None, adjoint: int = 0
) -> Joint:
    """The first step on x is of ``step`` ε."""
    return Joint(
        max_iter=iterations,
        warmup=TRAINING_METHOD.warmup,
        adjoint_warmup=adjoint,
        relaxation=relaxation,
        step_size=step,
    )


def warm(steps: int, cap: int, tol: float = 1e-1, step: float | None = None) -> Nested:
    return Nested(
        max_iter=steps,
        warm_start=True,
        warmup=TRAINING_METHOD.warmup,
        step_size=step,
        solver=Anderson(max_iter=cap, tol=tol),
    )


METHODS: dict[str, tuple[Joint | Nested, Any]] = {
    DEFAULT: (TRAINING_METHOD, 0),
    **{f"JIIO, {n} iterations": (joint(n), 0) for n in (5, 8, 10, 15)},
    RELAXED: (joint(10, 1.2), 0),
    **{name: (joint(4, 1.2, step=4.0, adjoint=n), 0) for n, name in enumerate(SHORT_JOINT)},
    **{name: (warm(n, 1, step=4.0), 0) for n, name in LONG_STEPS.items()},
    "PGD-20 cold, tol 1e-3": (
        Nested(max_iter=20, solver=Anderson(tol=1e-3)),
        Anderson(tol=1e-3),
    ),
    CHEAPEST: (warm(5, 1), 0),
    CHEAP: (warm(10, 1), 0),
    MIDDLE: (warm(12, 1), 0),
    LONG: (warm(15, 1), 0),
    SETTLED_JOINT: (joint(3, 1.2, step=4.0, adjoint=2), (3, 0)),
    **{name: (warm(n, 1, step=4.0), (3, 0)) for n, name in SETTLED.items()},
    CARRIED: (TRAINING_METHOD, 0),
    CARRIED_TWO: (joint(3, 1.2, step=4.0, adjoint=2), (3, 0)),
    **{name: (warm(8, 2), 0) for name in CARRIED_PGD.values()},
    **{name: (warm(4, 1, step=4.0), (3, 0)) for name in CARRIED_PGD_ONE.values()},
    "PGD-20 warm, cap 1": (warm(20, 1), 0),
    SHORT: (warm(8, 2), 0),
    PGD_10: (warm(10, 2), 0),
    PGD_20: (warm(20, 2), 0),
    "PGD-10 warm, tol 0.1, cap 5": (warm(10, 5), 0),
    "PGD-20 warm, tol 0.1, cap 5": (warm(20, 5), 0),
    "PGD-20 warm, tol 0.01": (warm(20, 30, 1e-2), 0),
}


CARRIED_METHODS: dict[str, tuple[Joint | Nested, Any]] = {
    CARRIED: (CARRIED_METHOD, CARRIED_REFINE),
    CARRIED_TWO: (
        replace(CARRIED_METHOD, max_iter=2, state_steps=1, warmup=2, adjoint_warmup=1),
        CARRIED_REFINE,
    ),
    **{
        name: (
            replace(warm(n, 2, step=1.0), warmup=CARRIED_METHOD.warmup, final_step_size=1.0),
            CARRIED_REFINE,
        )
        for n, name in CARRIED_PGD.items()
    },
    **{
        name: (replace(warm(n, 1, step=1.0), warmup=2, final_step_size=1.0), CARRIED_REFINE)
        for n, name in CARRIED_PGD_ONE.items()
    },
}


def settings(args: Args) -> dict[str, Setting]:
    own = (DEFAULT, *(f"JIIO, {n} iterations" for n in (10, 8, 5, 15)))
    return {
        "digits": Setting(
            "digits",
            0.6,
            5e-3,
            args.digits_penalty,
            args.digits_epochs,
            (
                *own,
                RELAXED,
                CARRIED,
                PGD_20,
                PGD_10,
                SHORT,
                LONG,
                MIDDLE,
                CHEAP,
                CHEAPEST,
                *CARRIED_PGD.values(),
            ),
        ),
        "fashion-mnist": Setting(
            "fashion-mnist",
            1.0,
            2e-3,
            args.fashion_penalty,
            args.fashion_epochs,
            (
                *own,
                *SHORT_JOINT,
                SETTLED_JOINT,
                CARRIED,
                CARRIED_TWO,
                PGD_10,
                CHEAP,
                CHEAPEST,
                *LONG_STEPS.values(),
                *SETTLED.values(),
                *CARRIED_PGD.values(),
                *CARRIED_PGD_ONE.values(),
            ),
        ),
    }


def load(args: Args, name: str, split: str) -> tuple[Tensor, Tensor]:
    x, y, _ = load_labelled(name, split, args.data_dir)
    if name == "digits":
        return x, y
    count = args.fashion_train if split == "train" else args.fashion_test
    return x[:count], y[:count]


class Store:
    """Results so far, on disk after every one."""

    def __init__(self, args: Args) -> None:
        self.path = args.out / "results.json"
        args.out.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "args": {k: v for k, v in asdict(args).items() if not isinstance(v, Path)},
        }
        if self.path.is_file():
            self.content = read(self.path)

    def get(self, key: str) -> Any:
        return self.content.get(key)

    def put(self, key: str, value: Any) -> None:
        self.content[key] = value
        write_json(self.path, self.content)


def measure_steps(args: Args, setting: Setting, store: Store, weights: Path | None = None) -> None:
    """CPU seconds and counts of one step, all methods in turn on the shipped or given weights."""
    key = f"{setting.name} / steps" + (f" / {weights.stem}" if weights else "")
    if store.get(key) is None:
        x, y = (t[: args.batch_size] for t in load(args, setting.name, "train"))
        model = load_pretrained(setting.name)
        if weights is not None:
            model.load_state_dict(load_file(weights))
        seconds: dict[str, list[float]] = {name: [] for name in METHODS}
        counts = {}
        # what carried steps take up: images that a search on this model has found
        found = setting.training(DEFAULT)(model, x, y).solution.x
        for _ in tqdm(range(args.repeats), desc=key):
            for name in METHODS:
                with count_evaluations() as counter:
                    begin = time.process_time()
                    carried = setting.carried(name)
                    if carried is None:
                        step = setting.training(name)(model, x, y)
                    else:
                        step = carried(model, x, y, start=found, ahead=True)
                    step.loss.backward()
                    if carried is not None:
                        step.ahead()
                    seconds[name].append(time.process_time() - begin)
                counts[name] = {
                    "f": counter.f_evals / len(x),
                    "vjp": counter.vjps / len(x),
                    "loss": float(step.loss.detach()),
                }
                model.zero_grad()
        rows = {
            name: {**counts[name], "seconds": statistics.median(seconds[name])} for name in METHODS
        }
        store.put(key, rows)
    rows = store.get(key)
    where = weights.stem if weights else f"{setting.name}, the shipped weights"
    print(f"\n{where}, one step of {args.batch_size} images, L2 {setting.eps}")
    width = max(map(len, rows))
    print(f"{'':{width}}{'CPU s':>8}{'f':>8}{'VJP':>8}{'loss':>8}   JIIO's seconds / these")
    for name, row in rows.items():
        ratio = rows[DEFAULT]["seconds"] / row["seconds"]
        print(
            f"{name:{width}}{row['seconds']:8.3f}{row['f']:8.1f}{row['vjp']:8.1f}{row['loss']:8.3f}"
            f"   {ratio:.3f}"
        )


def measure_gradients(args: Args, setting: Setting, store: Store) -> None:
    """Cosines to the exact training gradient at the images that the default search ended at."""
    key = f"{setting.name} / gradients"
    if store.get(key) is None:
        images, labels = load(args, setting.name, "test")
        model = load_pretrained(setting.name)
        layer: Any = model.equilibrium
        step = setting.training(DEFAULT)
        cosines: dict[str, list[float]] = {f"refine={k}": [] for k in REFINE}
        size = args.batch_size
        for start in tqdm(range(0, args.gradient_batches * size, size), desc=key):
            x, y = images[start : start + size], labels[start : start + size]
            objective = attack_objective("cross-entropy", y)
            found = joint_solution(
                model,
                x,
                objective,
                method=step.method,
                constraint=Intersection(L2Ball(setting.eps), Box(0.0, 1.0)),
            )
            own = layer.solver, layer.adjoint
            layer.solver = Anderson(max_iter=300, tol=1e-6)
            layer.adjoint = Implicit(solver=Anderson(max_iter=300, tol=1e-5))
            exact = flat_gradient(model, objective(model(found.x)).mean())
            layer.solver, layer.adjoint = own
            for k in REFINE:
                mine = flat_gradient(model, envelope_loss(model, found, objective, refine=k))
                cosines[f"refine={k}"].append(float(cosine_similarity(mine, exact, dim=0)))
        store.put(key, cosines)
    print(f"\n{setting.name}, cosine to the exact gradient: median (lowest)")
    for name, values in store.get(key).items():
        median = statistics.median(values)
        print(f"{name:12} {median:.5f} ({min(values):.5f}) over {len(values)} batches")


def flat_gradient(model: torch.nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def kept_weights(args: Args, setting: Setting, name: str, seed: int) -> Path:
    """Where the weights of a training are kept."""
    return args.out / f"{setting.name}-{name.replace(' ', '_')}-seed_{seed}.safetensors"


def train(args: Args, setting: Setting, name: str, seed: int, store: Store) -> RobustnessReport:
    """Train one model and judge it."""
    key = f"{setting.name} / {name} / seed {seed}"
    weights = kept_weights(args, setting, name, seed)
    kept = weights.with_suffix(".pt")
    if kept.is_file():
        return _report(torch.load(kept, weights_only=True))
    x, y = load(args, setting.name, "train")
    torch.manual_seed(seed)
    model = load_pretrained(setting.name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=1e-3)
    batches = TensorBatches(x, y, args.batch_size, seed=seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.lr, total_steps=setting.epochs * len(batches)
    )
    fit_settings = FitSettings(
        epochs=setting.epochs,
        seed=seed,
        scheduler_interval="step",
        judged=0,
        max_grad_norm=1.0,
        carried=setting.carried(name),
        restart_every=setting.epochs if name in CARRIED_METHODS else 1,
    )
    training = setting.training(name)
    begin = time.process_time()
    with count_evaluations() as counter:
        history = fit_adversarially(
            model, training, optimizer, batches, fit_settings, scheduler=schedule
        )
    seconds = time.process_time() - begin
    steps = setting.epochs * len(batches)
    f_evals, vjps = (n / len(x) / setting.epochs for n in (counter.f_evals, counter.vjps))
    save_file(model.state_dict(), weights)
    ball: dict[str, Any] = {"eps": setting.eps, "norm": 2}
    suite = default_suite(**ball)
    if args.suite == "engine":
        suite = tuple(a for a in suite if a.name in SUITE)
    report = robust_accuracy(
        model, *load(args, setting.name, "test"), suite, batch_size=250, audit=0, **ball
    )
    store.put(
        key,
        {
            "seconds a step": seconds / steps,
            "steps": steps,
            "history": history,
            "f": f_evals,
            "vjp": vjps,
            "report": report.to_dict(),
        },
    )
    small = {**report.to_dict(), "worst_loss": []}
    torch.save(small, kept)
    print(
        f"{key}: clean {report.clean}, robust {report.accuracy}; a step {seconds / steps:.3f} "
        f"CPU s, {f_evals:.1f} f + {vjps:.1f} VJP; residual {history[-1]['residual']:.3f}"
    )
    return report


def _report(saved: dict[str, Any]) -> RobustnessReport:
    """Enough of a stored report for paired differences."""
    unused = {"attacks": (), "warnings": (), "worst": torch.zeros(0)}
    return RobustnessReport(**{**saved, **unused})


def compare(
    args: Args, setting: Setting, reports: dict[str, list[RobustnessReport]], store: Store
) -> None:
    """Paired differences to the reference, over the seeds that both have."""
    reference = reports.get(args.reference, [])
    gaps: dict[str, dict[str, Any]] = {}
    for name, own in reports.items():
        count = min(len(own), len(reference))
        if name == args.reference or not count:
            continue
        for what, clean in (("robust", False), ("clean", True)):
            gap = paired_difference(own[:count], reference[:count], clean=clean)
            print(f"{setting.name}: {name} minus {args.reference}, {what}: {gap}, {count} seeds")
            gaps.setdefault(name, {})[what] = gap
    store.put(f"{setting.name} / differences", gaps)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    store = Store(args)
    chosen = [settings(args)[name] for name in args.data]
    known = {name for setting in chosen for name in setting.methods}
    if unknown := set(args.methods) - known:
        raise SystemExit(f"no training is called {sorted(unknown)}; there are {sorted(known)}")
    if short := [s.name for s in chosen if s.epochs < 2 and set(args.methods) & {*CARRIED_METHODS}]:
        raise SystemExit(f"carried searches need two epochs at least: {', '.join(short)}")
    for setting in chosen:
        measure_gradients(args, setting, store)
        measure_steps(args, setting, store)
        if not args.train:
            continue
        names = [n for n in setting.methods if not args.methods or n in args.methods]
        if setting.epochs < 2:
            names = [n for n in names if n not in CARRIED_METHODS]
        reports: dict[str, list[RobustnessReport]] = {name: [] for name in names}
        for seed in range(args.seeds):
            for name in names:
                reports[name].append(train(args, setting, name, seed, store))
            compare(args, setting, reports, store)
        trained = kept_weights(args, setting, args.reference, 0)
        if trained.is_file():
            measure_steps(args, setting, store, trained)


if __name__ == "__main__":
    main(tyro.cli(Args))
