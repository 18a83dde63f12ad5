"""The joint loop against what it needs: seconds, operations and memory.

    python benchmarks/loop.py [--cells tiny digits] [--batches 1 64 256]

What a run of :class:`Joint` needs is encoder and head once an iteration, two evaluations of f and a
vector-Jacobian product. The *bare* loop makes these, and nothing else, by hand. Slow rows take
more, unless ``--even`` is given. Both run interleaved in one process, on one thread, and the best
of several is taken.

Operations are those that torch dispatches, of one iteration after the first few. On the meta
device the loop takes the branches of an accelerator, so the count is that of its path. Views start
no kernel there and are counted apart. ``--lines`` says which lines of the package they come from.

Peak memory is of the tensors that are alive at once. The model's own forward and backward stand
beside it, and the bare loop.
"""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, patch

import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jiio_plugins import Box, Intersection, Joint, L1Ball, L2Ball, LinfBall, attack_objective
from jiio_plugins.data import load_digits
from jiio_plugins.equilibrium import as_tensors
from jiio_plugins.joint import Problem, Variable
from jiio_plugins.methods import solve
from jiio_plugins.models import ConvDEQClassifier, load_pretrained
from jiio_plugins.utils import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BALLS = {"L2": L2Ball(0.5), "Linf": LinfBall(0.05), "L1": L1Ball(3.0)}


@dataclass
class Args:
    """The joint loop against what it needs."""

    cells: tuple[str, ...] = ("tiny", "digits")
    batches: tuple[int, ...] = (1, 64, 256)
    norms: tuple[str, ...] = ("L2", "Linf", "L1")
    """balls, each in the pixel box, whose operations are counted. Seconds are of the first"""
    iterations: int = 20
    repeats: int = 7
    """runs of each, the best is taken"""
    even: bool = False
    """slow rows take no more passes than others, so that those of the bare loop are the same"""
    lines: bool = False
    """where in the package the operations come from"""
    out: Path = Path("out/benchmark-loop")


class Cell:
    """A classifier in parts, and images for it.

    Args:
        name: "tiny", a state of 1,024 numbers, or "digits", the shipped multiscale classifier.
        rows: images.
        device: where.
        model: another classifier, with ``equilibrium``, ``encoder`` and ``decode``.
        images: for it, and their labels.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        device: str = "cpu",
        model: Any = None,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(0)
        some, labels = images if images is not None else load_digits("test")
        index = torch.arange(rows) % len(some)
        if model is None:
            model = load_pretrained("digits")
        if name == "tiny":
            model = ConvDEQClassifier(channels=16, stride=1).eval()
        self.name, self.model = name, model.to(device).requires_grad_(False)
        self.x, self.y = some[index].to(device), labels[index]
        self.f = self.model.equilibrium.cell
        self.head: nn.Module | Callable[[Any], Tensor]
        self.head = self.model.head if name == "tiny" else self.model.decode
        if device == "meta":  # labels that are nowhere have no range
            self.objective = lambda logits: logits[:, 0] - logits.logsumexp(1)
        else:
            self.y = self.y.to(device)
            self.objective = attack_objective("cross-entropy", self.y)

    def bare(self, iterations: int, warmup: int, second: int) -> None:
        """The passes of a run, and nothing else.

        Args:
            iterations: each of two evaluations of f, encoder, head and a VJP.
            warmup: evaluations before.
            second: iterations with a second VJP.
        """
        leaf = self.x.clone().requires_grad_()
        with torch.no_grad():
            u = self.model.encoder(leaf)
            z = self.model.equilibrium.initial_state(u)
            for _ in range(warmup):
                z = self.f(z, u)
        for k in range(iterations):
            u = self.model.encoder(leaf)
            if k:
                with torch.no_grad():
                    z = self.f(z, u)
            parts = _leaves(z)
            f = as_tensors(self.f(_like(z, parts), u))
            answers = _leaves(f)
            loss = self.objective(self.head(_like(z, answers)))
            mu = torch.autograd.grad(loss.sum(), answers)
            if k < second:
                mu = torch.autograd.grad(f, parts, mu, retain_graph=True)
            torch.autograd.grad(f, [*parts, leaf], mu)
            z = _like(z, tuple(t.detach() for t in f))

    def plain(self) -> None:
        """A forward and backward of the model as it is."""
        leaf = self.x.clone().requires_grad_()
        torch.autograd.grad(self.objective(self.model(leaf)).sum(), leaf)

    def problem(self, norm: str) -> Problem:
        """An attack on the images."""
        feasible: Any = Intersection(BALLS[norm], Box(0.0, 1.0))
        if self.x.is_meta:  # where nothing can be checked
            feasible = feasible.bind(torch.zeros(self.x.shape))
            for name, value in vars(feasible).items():
                if isinstance(value, Tensor):
                    setattr(feasible, name, value.to("meta"))
        return Problem(Variable(self.model, self.x), self.objective, feasible)


def _leaves(z: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in as_tensors(z))


def _like(z: Any, parts: tuple[Tensor, ...]) -> Any:
    return parts if isinstance(z, tuple) else parts[0]


def method(iterations: int, even: bool = False) -> Joint:
    """The defaults, but no row leaves. With ``even`` slow rows take no more passes than others."""
    return Joint(max_iter=iterations, gap_tol=1e-30, max_state_steps=2 if even else 4)


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, and where from. Tells the memory that is alive at most.

    Attributes:
        all: operations.
        views: those of them that only look at a tensor in another way.
        lines: file and line in the package -> operations.
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all = self.views = self.peak = self._alive = 0
        self.lines: Counter[str] = Counter()
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.all += 1
        returns = func._schema.returns
        self.views += any(r.alias_info and not r.alias_info.is_write for r in returns)
        self.lines[_line()] += 1
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self._hold(t.untyped_storage())
        return out

    def _hold(self, storage: Any) -> None:
        if self._seen.get(id(storage)) is storage:
            return
        self._seen[id(storage)] = storage
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._alive -= size


def _line() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/jiio_plugins/" in name:
            return f"{name.rpartition('/jiio_plugins/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def flags_unread() -> Iterator[None]:
    """On the meta device there is nothing to read: no row has finished, and none is slow."""
    flag = Mock(return_value=Mock(return_value=False))
    with ExitStack() as stack:
        for module in ("equilibrium.solvers.loop", "methods.best", "methods.relaxed"):
            stack.enter_context(patch(f"jiio_plugins.{module}.HostFlag", flag))
        yield


def counted(call: Callable[[int], None], few: int = 6, many: int = 10) -> Operations:
    """The operations of one iteration of those after the first few."""
    with Operations() as less:
        call(few)
    with Operations() as more:
        call(many)
    more.all = (more.all - less.all) // (many - few)
    more.views = (more.views - less.views) // (many - few)
    more.lines.subtract(less.lines)
    more.lines = Counter({k: n // (many - few) for k, n in more.lines.items() if n})
    return more


def seconds(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The best CPU seconds of each, run by turns."""
    best = dict.fromkeys(calls, float("inf"))
    for k in range(repeats + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if k:
                best[name] = min(best[name], time.process_time() - begin)
    return best


def loop_of(
    cell: Cell, norm: str, even: bool = False, capture: bool = False
) -> Callable[[int], None]:
    """A run of so many iterations."""
    return lambda iterations: void(
        solve(cell.problem(norm), replace(method(iterations, even), capture=capture))
    )


def void(_: Any) -> None:
    """Nothing of a result is kept."""


def on_the_cpu(args: Args, name: str, rows: int) -> dict[str, Any]:
    """Seconds, operations and memory, the loop's beside those of what it needs."""
    cell, norm = Cell(name, rows), args.norms[0]
    problem = cell.problem(norm)
    solve(problem, method(args.iterations, args.even))
    warmup = round(float(problem.f_evals.mean())) - 2 * args.iterations + 1
    second = round(float(problem.vjps.mean())) - args.iterations

    def bare(iterations: int) -> None:
        cell.bare(iterations, warmup, second)

    loop = loop_of(cell, norm, args.even)
    runs = {"loop": lambda: loop(args.iterations), "bare": lambda: bare(args.iterations)}
    best = seconds(runs, args.repeats)
    with Operations() as plain:
        cell.plain()
    ours, theirs = counted(loop), counted(bare)
    mib = {"loop": ours.peak, "model": plain.peak, "bare": theirs.peak}
    return {
        "cell": name,
        "rows": rows,
        "ms": {key: 1e3 * value / args.iterations for key, value in best.items()},
        "operations": {"loop": ours.all, "bare": theirs.all},
        "MiB": {key: value / 2**20 for key, value in mib.items()},
    }


def on_an_accelerator(name: str, norm: str) -> tuple[dict[str, Any], Operations]:
    """The operations of an accelerator's path, and those of the loop."""
    with flags_unread():
        cell = Cell(name, 4, "meta")
        bare = counted(lambda n: cell.bare(n, 0, 0))
        loop = counted(loop_of(cell, norm))
    kernels = {"loop": loop.all - loop.views, "bare": bare.all - bare.views}
    operations = {"loop": loop.all, "bare": bare.all}
    return {"cell": name, "norm": norm, "operations": operations, "kernels": kernels}, loop


def main(args: Args) -> None:
    torch.set_num_threads(1)
    print("on the CPU, of one iteration")
    print("                  ms                       ops                  MiB at most")
    print(
        "cell      rows     loop     bare  ratio    loop  bare  ratio       loop    model  ratio   "
        "bare"
    )
    results: dict[str, list[dict[str, Any]]] = {"cpu": [], "accelerator": []}
    for name, rows in itertools.product(args.cells, args.batches):
        r = on_the_cpu(args, name, rows)
        results["cpu"].append(r)
        ms, ops, mib = r["ms"], r["operations"], r["MiB"]
        print(
            f"{name:8} {rows:5}  {ms['loop']:8.2f} {ms['bare']:8.2f} "
            f"{ms['loop'] / ms['bare']:6.2f}   {ops['loop']:5} {ops['bare']:5} "
            f"{ops['loop'] / ops['bare']:6.2f}   {mib['loop']:8.2f} {mib['model']:8.2f} "
            f"{mib['loop'] / mib['model']:6.2f} {mib['loop'] / mib['bare']:6.2f}"
        )
    print("\noperations of one iteration on the path of an accelerator")
    print("                    all                  kernels")
    print("cell     ball    loop  bare  ratio    loop  bare  ratio")
    for name, norm in itertools.product(args.cells, args.norms):
        r, loop = on_an_accelerator(name, norm)
        results["accelerator"].append(r)
        pairs = [
            f"{r[key]['loop']:5} {r[key]['bare']:5} {r[key]['loop'] / r[key]['bare']:6.2f}"
            for key in ("operations", "kernels")
        ]
        print(f"{name:8} {norm:5}  {'   '.join(pairs)}")
        if args.lines:
            for line, n in loop.lines.most_common(45):
                print(f"    {n:5}  {line}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", results)
    print(f"written: {args.out}/results.json")


if __name__ == "__main__":
    main(tyro.cli(Args))
