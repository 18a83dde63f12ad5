"""JIIO against nested gradient descent, MAML and ANIL on glyph tasks, 5-way 1-shot, in one run.

    python benchmarks/meta_learning.py [--minutes 8] [--out out/benchmark-meta]

1. *Training*: the same backbone (``MDEQFewShot``, small size), the same stream of tasks, the same
   optimiser, the same time (of one CPU core, which a busy machine does not distort). Judged on
   tasks from scripts that training never saw. Each method's result is written as it comes; a
   further run continues after the last one.
2. *Adaptation*: f evaluations and VJPs a sample until a task's v is, and stays, within a relative
   1e-3 of its optimum, ``‖v − v*‖ ≤ 1e-3 ‖v* − v0‖``, on unseen tasks and with the weights that
   JIIO was trained to. The optimum comes from L-BFGS in float64 with solves to 1e-10; its gradient
   norm is printed. Every method stops per task; rates, inner caps and JIIO's memory are swept.
3. *Overhead*: CPU seconds of ``JIIOLearner.adapt`` with 50 iterations against those of 50 bare
   passes of model, loss and VJP, in turn.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import learn2learn as l2l
import torch
import tyro
from records import keep_settings, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from jiio_learn2learn import JIIOLearner
from jiio_plugins import Anderson, Joint, Nested, Unrolled
from jiio_plugins.data import ClassImages, Tasks, load_glyphs, sample_tasks
from jiio_plugins.equilibrium import jacobian_penalty
from jiio_plugins.implicit import attach
from jiio_plugins.joint import ParameterVariable, Problem, layer_mode
from jiio_plugins.models import MDEQFewShot
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jiio_plugins.methods import Progress

ADAPT = ("context", "head.weight", "head.bias")  # what JIIO and nested descent adapt
HEAD = ("weight", "bias")  # what JIIO adapts of a head alone, and ANIL
WAYS = 5
PENALISED = ("jiio", "nested first-order")
DISTANCE = 1e-3
RATES = (0.05, 0.1, 0.2)  # at 0.2 and above plain descent hardly arrives
JOINT_RATES = (0.4, 0.8)
CAPS = (1, 2, 5, 30)
MEMORIES = (5, 10, 20)
BUDGET = 4000.0  # f + VJP a sample at which a run that has not arrived is ended


@dataclass
class Args:
    """Benchmark of meta-learning."""

    out: Path = Path("out/benchmark-meta")
    cache: Path | None = None
    """folder for the rendered glyphs; None: the user's cache"""
    minutes: float = 8.0
    """training time of each method, CPU minutes"""
    methods: tuple[str, ...] = ("jiio", "jiio head", "nested first-order", "maml unrolled", "anil")
    parts: tuple[str, ...] = ("training", "adaptation", "overhead")
    meta_lr: float = 3e-3
    meta_batch: int = 8
    reg: float = 0.1
    """of JIIO and nested descent in training"""
    adaptation_reg: float = 0.5
    """of the comparison of adaptation, whose tasks must have an optimum that L-BFGS can reach"""
    head_reg: float = 0.03
    """of JIIO where the head alone is adapted"""
    penalty: float = 4.0
    """weight of the Jacobian penalty where the equilibrium is adapted, in every second meta-step"""
    anil_lr: float = 0.4
    """of ANIL's steps on the head"""
    test_tasks: int = 600
    judge_on: Literal["test", "validation"] = "test"
    """scripts that the trained models are judged on; settings were chosen on those of validation"""
    tasks: int = 8
    """tasks of the comparison of adaptation"""
    repeats: int = 3
    """times the compared rows are run for their seconds"""
    seed: int = 0


# Training ----------------------------------------------------------------------------------------


def backbone(seed: int, **settings: Any) -> MDEQFewShot:
    torch.manual_seed(seed)
    solver = Anderson(max_iter=30, tol=1e-3)
    return MDEQFewShot(ways=WAYS, context=32, **{"solver": solver, **settings})


class Learner:
    """A method under comparison; ``logits(tasks)`` adapts to the support sets, answers the queries.

    What can be done for several tasks at once is: JIIO and nested descent solve them side by side,
    ANIL computes all features in one pass. MAML has other weights in each task.
    """

    def __init__(self, name: str, args: Args) -> None:
        self.name, self.args, self.steps = name, args, 0
        self.model = backbone(args.seed)
        if name == "maml unrolled":
            self.model.equilibrium.adjoint = Unrolled(steps=10)
            self.learner: Any = l2l.algorithms.MAML(self.model, lr=0.1, allow_unused=True)
        elif name == "anil":
            self.learner = l2l.algorithms.MAML(self.model.head, lr=args.anil_lr)

    def logits(self, tasks: Tasks) -> Tensor:
        """``(tasks, queries, ways)``."""
        if self.name == "jiio":
            return self._answers(self._jiio(tasks), tasks.x_query, self.model, ADAPT)
        if self.name == "nested first-order":
            return self._answers(self._nested(tasks), tasks.x_query, self.model, ADAPT)
        both = torch.cat([tasks.x_support, tasks.x_query], dim=1)
        if self.name == "maml unrolled":
            return torch.stack([self._steps(x, y, 3) for x, y in self._with_labels(both, tasks)])
        # the head alone: the features do not change
        features = self.model.features(both.flatten(0, 1)).unflatten(0, both.shape[:2])
        if self.name == "anil":
            return torch.stack(
                [self._steps(f, y, 5) for f, y in self._with_labels(features, tasks)]
            )
        support, query = features.split([tasks.y_support.shape[1], tasks.y_query.shape[1]], dim=1)
        return self._answers(self._head(support, tasks.y_support), query, self.model.head, HEAD)

    def _with_labels(self, both: Tensor, tasks: Tasks) -> Any:
        return zip(both, tasks.y_support, strict=True)

    def _steps(self, both: Tensor, y: Tensor, steps: int) -> Tensor:
        """learn2learn's loop: some steps on the support set, then the query set."""
        clone = self.learner.clone()
        for _ in range(steps):
            clone.adapt(cross_entropy(clone(both[: len(y)]), y, reduction="sum"))
        out: Tensor = clone(both[len(y) :])
        return out

    def _jiio(self, tasks: Tasks) -> Tensor:
        """The joint solution, with its implicit gradient; training needs neither to the end."""
        setting = Setting(self.model, tasks.x_support, tasks.y_support, self.args.reg)
        training = self.model.training
        method = Joint(
            max_iter=6 if training else 25,
            step_size=0.4,
            tol=1e-2 if training else 1e-3,
            mixing="anderson",
        )
        with setting.frozen():
            problem = setting.problem()
            result = method.run(problem)
        if not training:
            return result.v
        step = torch.full((1, 1), 0.4)
        solver = Anderson(max_iter=4, memory=4, tol=5e-2)
        return attach(problem, result, step, solver=solver)[0]

    def _head(self, features: Tensor, labels: Tensor) -> Tensor:
        """The optimum of the head alone, for features that do not change, and its gradient."""
        setting = Setting(self.model.head, features, labels, self.args.head_reg, HEAD)
        method = Joint(max_iter=10 if self.model.training else 50, step_size=0.2, tol=1e-3)
        with setting.frozen():
            problem = setting.problem()
            result = method.run(problem)
        if not self.model.training:
            return result.v
        step, solver = torch.full((1, 1), 0.2), Anderson(max_iter=10, memory=10, tol=1e-2)
        return attach(problem, result, step, solver=solver)[0]

    def _nested(self, tasks: Tasks) -> Tensor:
        """Ten steps, each with full solves of state and adjoint; v − v0 is held constant."""
        setting = Setting(self.model, tasks.x_support, tasks.y_support, self.args.reg)
        tight = Anderson(max_iter=30, tol=1e-3)
        with setting.frozen():
            problem = setting.problem()
            result = Nested(max_iter=10, step_size=0.4, solver=tight).run(problem)
        return (result.v - problem.v_start) + setting.anchor()

    def _answers(self, v: Tensor, x: Tensor, model: nn.Module, names: Sequence[str]) -> Tensor:
        """``model`` on the query sets ``x`` ``(tasks, queries, ...)``, at each task's v."""
        rows = split_variables(model, v.repeat_interleave(x.shape[1], dim=0), names)
        out: Tensor = functional_call(model, rows, (x.flatten(0, 1),))
        return out.unflatten(0, x.shape[:2])


def split_variables(model: nn.Module, v: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Rows of v as the parameters they are made of."""
    like = dict(model.named_parameters())
    parts = v.split([like[n].numel() for n in names], dim=1)
    return {n: t.reshape(len(v), *like[n].shape[1:]) for n, t in zip(names, parts, strict=True)}


def train(name: str, args: Args, data: ClassImages) -> Learner:
    learner = Learner(name, args)
    parameters = list(learner.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.meta_lr)
    generator = torch.Generator().manual_seed(args.seed)
    seen: dict[str, Any] = {}
    learner.model.equilibrium.register_forward_hook(
        lambda _, injection, z: seen.update(injection=injection, z=z)
    )
    bar = tqdm(total=round(60 * args.minutes), desc=name, unit="s")
    begin, recent = time.process_time(), 0.0
    while (elapsed := time.process_time() - begin) < 60 * args.minutes:
        for group in optimizer.param_groups:  # to zero at the end, whatever a step costs
            group["lr"] = args.meta_lr * (1 - elapsed / (60 * args.minutes))
        tasks = sample_tasks(data, args.meta_batch, ways=WAYS, queries=3, generator=generator)
        logits = learner.logits(tasks)
        optimizer.zero_grad()
        with warnings.catch_warnings():  # JIIO's gradient is inexact on purpose, and says so
            warnings.simplefilter("ignore")
            loss = cross_entropy(logits.flatten(0, 1), tasks.y_query.flatten())
            if name in PENALISED and learner.steps % 2 == 0:  # the last call is that of the queries
                penalty = jacobian_penalty(
                    learner.model.equilibrium.cell, seen["z"], *seen["injection"]
                )
                loss = loss + args.penalty * penalty
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        right = float((logits.argmax(2) == tasks.y_query).double().mean())
        recent = 0.95 * recent + 0.05 * right if learner.steps else right
        learner.steps += 1
        bar.set_postfix(steps=learner.steps, accuracy=f"{recent:.3f}", refresh=False)
        bar.update(int(elapsed) - bar.n)
    bar.close()
    return learner


def judge(learner: Learner, tasks: Tasks) -> dict[str, float]:
    """Accuracy per task on the query sets: mean and 95 % interval."""
    learner.model.equilibrium.solver = Anderson(max_iter=200, tol=1e-4)
    learner.model.eval()
    accuracy: list[float] = []
    for start in tqdm(range(0, len(tasks.y_query), 10), desc="test"):
        some = Tasks(*(t[start : start + 10] for t in tasks))
        right = learner.logits(some).detach().argmax(2) == some.y_query
        accuracy += right.double().mean(1).tolist()
    half = 1.96 * statistics.stdev(accuracy) / math.sqrt(len(accuracy))
    return {"accuracy": statistics.mean(accuracy), "half_width": half}


def part_training(args: Args, results: dict[str, Any]) -> None:
    data = load_glyphs("train", cache=args.cache)
    test = sample_tasks(
        load_glyphs(args.judge_on, cache=args.cache),
        args.test_tasks,
        ways=WAYS,
        queries=5,
        generator=torch.Generator().manual_seed(args.seed + 1),
    )
    done = results.setdefault("training", {})
    for name in args.methods:
        if name in done:
            continue
        learner = train(name, args, data)
        save_file(learner.model.state_dict(), args.out / f"{name.replace(' ', '-')}.safetensors")
        done[name] = {
            **judge(learner, test),
            "steps": learner.steps,
            "minutes": args.minutes,
            "tasks": args.test_tasks,
        }
        save(args, results)
    print(f"\ntrained for {args.minutes} minutes each, {args.test_tasks} tasks of unseen scripts")
    for name, row in done.items():
        print(
            f"{name:20} {100 * row['accuracy']:6.2f} ± {100 * row['half_width']:.2f} %   "
            f"{row['steps']} meta-steps"
        )


# Adaptation --------------------------------------------------------------------------------------


class WithVariables(nn.Module):
    """The model; its output carries v along, for the proximal term."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(self.model.named_parameters())
        v = torch.cat([parameters[n].flatten(1).expand(len(x), -1) for n in self.names], dim=1)
        return self.model(x), v


class Setting:
    """Some tasks side by side: ``min_v Σ CE + reg/2 ‖v − v0‖²`` for each.

    Args:
        model: with an equilibrium, or a head alone.
        x: support sets, ``(tasks, rows, ...)``.
        y: their labels, ``(tasks, rows)``.
        reg: of the proximal term.
        names: of the parameters that are v.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, reg: float, names: Sequence[str] = ADAPT
    ) -> None:
        self.x, self.reg, self.names = x.flatten(0, 1), reg, names
        self.count, self.rows = y.shape
        self.groups = torch.arange(self.count).repeat_interleave(self.rows)
        self.labels = y.flatten()
        self.model = WithVariables(model, names)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights are constants inside the block."""
        parameters = list(self.model.parameters())
        for p in parameters:
            p.requires_grad_(False)
        yield
        for p in parameters:
            p.requires_grad_(True)

    def anchor(self) -> Tensor:
        """v0 ``(1, d)``, live."""
        parameters = dict(self.model.model.named_parameters())
        return torch.cat([parameters[n].reshape(1, -1) for n in self.names], dim=1)

    def problem(self, dtype: torch.dtype = torch.float32, start: Tensor | None = None) -> Problem:
        model = self.model.to(dtype)
        x = self.x.to(dtype)
        variable = ParameterVariable(model, x, [f"model.{n}" for n in self.names], self.groups)

        def objective(output: tuple[Tensor, Tensor]) -> Tensor:
            logits, v = output
            proximal = 0.5 * self.reg * (v - self.anchor()).square().sum(1) / self.rows
            return cross_entropy(logits, self.labels, reduction="none") + proximal

        fixed = () if self.names == HEAD else None  # there is no equilibrium in a head
        return Problem(variable, objective, start=start, fixed=fixed)


class Arrived(Exception):  # noqa: N818, it is no error
    """Every task has arrived, or too much was paid."""


@dataclass
class Row:
    """One method at one setting: mean cost a sample, over tasks, up to arrival.

    A task that had not arrived when the run ended counts with what it had cost by then.
    """

    family: str
    setting: dict[str, float]
    arrived: int
    f_evals: float
    vjps: float
    seconds: float = math.nan

    @property
    def cost(self) -> float:
        return self.f_evals + self.vjps


def optimum(setting: Setting) -> tuple[Tensor, float]:
    """v* of each task and the largest gradient norm there; nothing of ``Joint`` is in it.

    Some tasks have several optima. The one meant is the one that gradient descent leads to: the
    nested loop with tight solves comes first, then L-BFGS.
    """
    tight = Anderson(max_iter=500, tol=1e-10, memory=8)

    def gradient(v: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        # one step of length 0 of the nested loop: its callback sees the exact gradient
        method = Nested(max_iter=1, step_size=0.0, solver=tight)

        def look(progress: Progress) -> None:
            kept.extend((progress.loss, progress.gradient))

        with setting.frozen():
            problem = setting.problem(torch.float64, v)
            method.run(problem, callback=look)
        return problem.groups.sum(kept[0]).sum(), kept[1]

    near = Nested(max_iter=80, step_size=0.3, warm_start=True, solver=Anderson(tol=1e-4))
    with setting.frozen():
        v = near.run(setting.problem(torch.float64)).v.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v],
        max_iter=150,
        max_eval=150,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-15,
    )

    def closure() -> Tensor:
        loss, v.grad = gradient(v.detach())
        return loss

    optimizer.step(closure)
    end = gradient(v.detach())[1].norm(dim=1).max()
    return v.detach(), float(end)


def arrive(setting: Setting, method: Joint | Nested, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which tasks arrive for good, and f evaluations and VJPs a sample paid by then."""
    problem = setting.problem()
    scale = (goal - problem.v_start).norm(dim=1)
    away: list[Tensor] = []
    paid = [torch.zeros(2, problem.rows)]  # entry k: before the pass at v_k

    def look(progress: Progress) -> None:
        away.append((progress.v - goal).norm(dim=1) > DISTANCE * scale)
        paid.append(torch.stack([problem.f_evals, problem.vjps]))
        settled = len(away) >= 5 and not torch.stack(away[-5:]).any()
        if settled or float(paid[-1].sum(0).mean()) > BUDGET:
            raise Arrived

    with setting.frozen(), contextlib.suppress(Arrived):
        method.run(problem, callback=look)
    outside = torch.stack(away)
    k = torch.arange(len(outside))[:, None]
    first = torch.where(outside, k, -1).amax(0) + 1  # from here on a task is inside
    arrived = first < len(outside)
    costs = torch.stack(paid)[:-1].reshape(len(outside), 2, setting.count, setting.rows).mean(3)
    at = costs[first.clamp(max=len(outside) - 1), :, torch.arange(setting.count)]
    return arrived, at[:, 0], at[:, 1]


def candidates() -> list[tuple[str, dict[str, float], Joint | Nested]]:
    out: list[tuple[str, dict[str, float], Joint | Nested]] = []
    for rate, memory in itertools.product(JOINT_RATES, MEMORIES):
        settings = {"rate": rate, "memory": memory}
        joint = Joint(max_iter=2000, step_size=rate, acceleration=memory, tol=0.0)
        out.append(("joint", settings, replace(joint, mixing="anderson")))
        out.append(("joint, quasi-Newton", settings, joint))
    for rate, cap in itertools.product(RATES, CAPS):
        warm = Nested(
            max_iter=2000, step_size=rate, warm_start=True, solver=Anderson(max_iter=cap, tol=1e-4)
        )
        out.append(("nested warm", {"rate": rate, "cap": cap}, warm))
    for rate in RATES:
        cold = Nested(max_iter=2000, step_size=rate, solver=Anderson(max_iter=50, tol=1e-4))
        out.append(("nested cold", {"rate": rate}, cold))
    return out


def part_adaptation(args: Args, results: dict[str, Any]) -> None:
    model = backbone(args.seed)
    weights = args.out / "jiio.safetensors"
    if weights.is_file():
        model.load_state_dict(load_file(weights))
    model.eval()
    tasks = sample_tasks(
        load_glyphs("test", cache=args.cache),
        args.tasks,
        ways=WAYS,
        generator=torch.Generator().manual_seed(args.seed + 2),
    )
    setting = Setting(model, tasks.x_support, tasks.y_support, args.adaptation_reg)
    goal, gradient = optimum(setting)
    goal = goal.float()
    rows: list[Row] = []
    methods: dict[int, Joint | Nested] = {}
    for family, swept, method in tqdm(candidates(), desc="sweep"):
        arrived, f_evals, vjps = arrive(setting, method, goal)
        rows.append(
            Row(family, swept, int(arrived.sum()), float(f_evals.mean()), float(vjps.mean()))
        )
        methods[len(rows) - 1] = method
    best = {
        family: min(
            (k for k, r in enumerate(rows) if r.family == family),
            key=lambda k: rows[k].cost,
        )
        for family in dict.fromkeys(row.family for row in rows)
    }
    times: dict[str, list[float]] = {family: [] for family in best}
    for _ in range(args.repeats):
        for family, k in best.items():
            begin = time.perf_counter()
            arrive(setting, methods[k], goal)
            times[family].append(time.perf_counter() - begin)
    for family, k in best.items():
        rows[k].seconds = statistics.median(times[family])
    print(f"\n{args.tasks} tasks to {DISTANCE:g} of the optimum (|gradient| there {gradient:.0e})")
    for k, row in enumerate(rows):
        best_of_family = f"  {row.seconds:6.2f} s, best" if k in best.values() else ""
        print(
            f"{row.family:20} {row.setting!s:32} {row.arrived}/{args.tasks} arrived   "
            f"f {row.f_evals:7.1f}  VJP {row.vjps:7.1f}  f+VJP {row.cost:7.1f}  "
            f"×{row.cost / rows[best['joint']].cost:.2f} of joint{best_of_family}"
        )
    results["adaptation"] = {
        "distance": DISTANCE,
        "gradient_at_optimum": gradient,
        "trained": weights.is_file(),
        "rows": [asdict(r) for r in rows],
        "best": {family: asdict(rows[k]) for family, k in best.items()},
    }
    save(args, results)


# Overhead ----------------------------------------------------------------------------------------


def part_overhead(args: Args, results: dict[str, Any]) -> None:
    iterations = 50
    model = backbone(args.seed)
    x, y, _, _ = (t[0] for t in sample_tasks(load_glyphs("test", cache=args.cache), 1, ways=WAYS))
    maml = JIIOLearner(model, lr=0.1, adapt=ADAPT, reg=args.reg, iters=iterations, tol=0.0)
    frozen = {n: p.detach() for n, p in model.named_parameters()}
    seen: dict[str, Any] = {}
    cell = model.equilibrium.cell
    with torch.no_grad():  # the state that the bare passes are made at
        handle = model.equilibrium.register_forward_hook(lambda _, a, z: seen.update(u=a, z=z))
        model(x)
        handle.remove()
    state = tuple(t.detach() for t in seen["z"])

    def bare() -> None:
        class Once:
            def on_layer(self, layer: nn.Module, f: Any, z0: Any) -> Any:
                seen["leaves"] = tuple(t.clone().requires_grad_() for t in state)
                seen["f"] = cell(seen["leaves"], *f.injection)
                return seen["leaves"]

        for _ in range(iterations):
            v = {n: frozen[n].clone().requires_grad_() for n in ADAPT}
            with layer_mode(Once()):
                loss = cross_entropy(functional_call(model, {**frozen, **v}, (x,)), y)
            leaves = [*seen["leaves"], *v.values()]
            torch.autograd.grad([loss, *seen["f"]], leaves, [None, *state])

    def adapt() -> Callable[[], None]:
        learner = maml.clone()
        loss = cross_entropy(learner(x), y)
        return lambda: learner.adapt(loss)

    times: dict[str, list[float]] = {"bare": [], "adapt": []}
    for _ in range(args.repeats + 3):
        for name, call in (("bare", bare), ("adapt", adapt())):
            begin = time.process_time()
            with warnings.catch_warnings():  # how accurate 50 iterations are is not the question
                warnings.simplefilter("ignore")
                call()
            times[name].append(time.process_time() - begin)
    bare_s, adapt_s = (statistics.median(times[n][1:]) for n in ("bare", "adapt"))
    print(
        f"\noverhead: adapt with {iterations} iterations {adapt_s:.3f} s, {iterations} bare passes "
        f"{bare_s:.3f} s, ratio {adapt_s / bare_s:.2f}"
    )
    results["overhead"] = {"adapt": adapt_s, "bare": bare_s, "ratio": adapt_s / bare_s}
    save(args, results)


def save(args: Args, results: dict[str, Any]) -> None:
    results["machine"] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(args.out / "results.json", results)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    free = ("out", "cache", "methods", "parts", "repeats")
    keep_settings(args.out, {k: v for k, v in asdict(args).items() if k not in free})
    path = args.out / "results.json"
    results: dict[str, Any] = read(path) if path.is_file() else {}
    parts = {"training": part_training, "adaptation": part_adaptation, "overhead": part_overhead}
    for name in args.parts:
        parts[name](args, results)
    print(f"written: {path}")


if __name__ == "__main__":
    main(tyro.cli(Args))
