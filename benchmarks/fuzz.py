"""Random calls of the engine and its adapters on random tiny models, held against what is known.

    python benchmarks/fuzz.py --count 1000
    python benchmarks/fuzz.py --count 1 --first 417   # one call again

A call is told by (seed, number) alone. Cells contract (rates from 0.3 to 0.999), rotate, run away,
or return NaN for some rows. States are tensors or tuples, of one layer or two. Batches have 0 to 9
rows in float32 or float64. One call in ten has a bad input. What must hold, whatever the call:

- an error is a TypeError or ValueError, and names what was wrong;
- x is finite and within ball and box;
- a value that is called CONVERGED is that of a solve in float64 which shares no code with the
  engine, at a state whose residual is as small as was asked;
- no verified problem is worse than its start;
- a row alone ends where it does in its batch, and the same call gives the same bits;
- nothing of the caller's is changed.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_plugins import (
    Anderson,
    Box,
    Broyden,
    Equilibrium,
    Intersection,
    Joint,
    L1Ball,
    L2Ball,
    LinfBall,
    Nested,
    Picard,
    Solution,
    Status,
    attack,
    optimize_input,
)

if TYPE_CHECKING:
    from collections.abc import Callable

D, N, CLASSES = 4, 6, 3  # sizes of input, state and output
KINDS = ("tanh", "linear", "rotation", "running away", "wild", "NaN", "tuple", "series")
TOL = {torch.float32: 1e-5, torch.float64: 1e-9}  # that the default verification asks for
TRUSTED = (Status.CONVERGED, Status.GRADIENT_UNSETTLED, Status.NO_IMPROVEMENT)


@dataclass(frozen=True)
class Args:
    """Random calls, each held against what is known."""

    count: int = 1000
    """calls"""
    seed: int = 0
    """of all of them"""
    first: int = 0
    """number of the first"""
    adapters: bool = True
    """attack through ART and torchattacks too"""
    out: Path | None = None
    """file for the figures, as JSON"""


# Models -----------------------------------------------------------------------------------------


class Cell(nn.Module):
    """``σ(A z + u)``, on one tensor or on two."""

    def __init__(self, kind: str, a: Tensor) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(a)
        self.linear = kind in ("linear", "rotation", "running away")

    def core(self, z: Tensor, u: Tensor) -> Tensor:
        """On flat states ``(rows, n)``."""
        y = z @ self.weight.T + u
        if self.kind == "NaN":
            y = torch.where(u[:, :1] > 0.5, y * torch.nan, y)
        return y if self.linear else torch.tanh(y)

    def initial_state(self, u: Tensor) -> Any:
        return self.split(torch.zeros_like(u))

    def split(self, z: Tensor) -> Any:
        return (z[:, :2], z[:, 2:].reshape(-1, 2, 2)) if self.kind == "tuple" else z

    def forward(self, z: Any, u: Tensor) -> Any:
        flat = torch.cat([z[0], z[1].flatten(1)], dim=1) if self.kind == "tuple" else z
        return self.split(self.core(flat, u))


class Model(nn.Module):
    """Encoder, one equilibrium layer or two, head: logits ``(rows, CLASSES)``."""

    def __init__(self, kind: str, rng: random.Random, generator: torch.Generator) -> None:
        super().__init__()
        self.kind = kind
        self.rate = rng.choice((0.3, 0.6, 0.9, 0.99, 0.999))
        self.encoder, self.head = nn.Linear(D, N), nn.Linear(N, CLASSES)
        solver = rng.choice((Anderson(), Broyden(), Picard(), Anderson(max_iter=200, tol=1e-6)))
        depth = 2 if kind == "series" else 1
        self.layers = nn.ModuleList(
            Equilibrium(Cell(kind, self._matrix(rng, generator)), solver=solver)
            for _ in range(depth)
        )
        with torch.no_grad():
            for p in (*self.encoder.parameters(), *self.head.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator) / 2)

    def _matrix(self, rng: random.Random, generator: torch.Generator) -> Tensor:
        if self.kind in ("running away", "wild"):
            self.rate = rng.choice((1.1, 1.5, 3.0))
        if self.kind == "rotation":
            angles = [rng.uniform(0.1, 3.1) for _ in range(N // 2)]
            turns = [[[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]] for t in angles]
            return self.rate * torch.block_diag(*map(torch.tensor, turns))
        a = torch.randn(N, N, generator=generator)
        return a * (self.rate / torch.linalg.matrix_norm(a, ord=2))

    @property
    def amplification(self) -> float | None:
        """``‖z − z*‖ / ‖f(z) − z‖`` at most, or None where there may be several fixed points."""
        cell = self.layers[0].cell
        if cell.linear:
            eye = torch.eye(N, dtype=torch.float64)
            return float(torch.linalg.inv(eye - cell.weight.detach().double()).norm(p=2))
        return None if self.rate >= 1 else (1 / (1 - self.rate)) ** len(self.layers)

    def run(self, x: Tensor, given: tuple[Tensor, ...], solve: Callable[..., Tensor]) -> Tensor:
        u = self.encoder(x.flatten(1)) + sum(given)
        for layer in self.layers:
            z = solve(layer, u)
            u = z + 0.1 * u
        return self.head(z)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        def solve(layer: Equilibrium, u: Tensor) -> Tensor:
            z = layer(u)
            return torch.cat([z[0], z[1].flatten(1)], dim=1) if isinstance(z, tuple) else z

        return self.run(x, given, solve)


class Plain(nn.Linear):
    """A model without an equilibrium layer."""

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def newton(layer: Equilibrium, u: Tensor) -> Tensor:
    """The fixed point in float64, by Newton's method after plain steps."""
    cell, eye = layer.cell, torch.eye(N, dtype=u.dtype)
    z = torch.zeros_like(u)
    for _ in range(0 if cell.linear else 300):
        z = cell.core(z, u)
    for _ in range(8):
        f = cell.core(z, u)
        slope = torch.ones_like(f) if cell.linear else 1 - f.square()
        jacobian = eye - slope[:, :, None] * cell.weight
        z = z + torch.linalg.solve(jacobian, (f - z)[:, :, None])[:, :, 0]
    return z


# Calls ------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call, ready to be made: on all rows, or on some."""

    model: Model
    x: Tensor
    labels: Tensor
    given: tuple[Tensor, ...] = ()
    how: str = "optimize"
    loss: str = "cross-entropy"
    targeted: bool = False
    norm: float = math.inf
    eps: float | None = None
    box: tuple[float, float] | None = None
    method: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    expected: str | None = None  # what an error must say

    def rows(self, rows: slice) -> Call:
        """The same on some of the rows."""
        given = tuple(g[rows] for g in self.given)
        parts = {"x": self.x[rows], "labels": self.labels[rows], "given": given}
        return Call(**{**vars(self), **parts})

    def objective(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """What is minimised."""
        labels = self.labels if labels is None else labels
        if self.how == "optimize":
            return (logits - 1).square().sum(1)
        value = LOSSES[self.loss](logits, labels)
        return value if self.targeted else -value

    def make(self) -> Solution | Tensor:
        """Call the engine, or an adapter, of which only x is known."""
        if self.how == "optimize":
            return optimize_input(
                self.model,
                self.x,
                self.options.get("objective", self.objective),
                given=self.given,
                constraint=self.constraint(),
                method=self.method,
                **{k: v for k, v in self.options.items() if k != "objective"},
            )
        if self.how == "attack":
            lower, upper = self.box or (None, None)
            threat = {"norm": self.norm, "eps": self.eps, "lower": lower, "upper": upper}
            return attack(
                self.model,
                self.x,
                self.labels,
                **{**threat, "loss": self.loss, "targeted": self.targeted, **self.options},
                method=self.method,
            )
        return ADAPTERS[self.how](self)

    def constraint(self) -> Any:
        """Ball and box as the engine's."""
        if "constraint" in self.options:
            return self.options.pop("constraint")
        parts: list[Any] = []
        if self.eps is not None:
            parts.append({1.0: L1Ball, 2.0: L2Ball, math.inf: LinfBall}[self.norm](self.eps))
        if self.box is not None:
            parts.append(Box(*self.box))
        return Intersection(*parts) if len(parts) == 2 else (parts or [None])[0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf)
    return others.amax(1) - own


LOSSES: dict[str, Any] = {
    "cross-entropy": lambda logits, labels: cross_entropy(logits, labels, reduction="none"),
    "margin": margin,
}


def with_torchattacks(call: Call) -> Tensor:
    from jiio_torchattacks import JIIO

    norm = "L2" if call.norm == 2 else "Linf"
    atk = JIIO(call.model, norm=norm, eps=call.eps, method=call.method)
    return atk(call.x, call.labels)


def with_art(call: Call) -> Tensor:
    from art.estimators.classification import PyTorchClassifier

    from jiio_art import JIIOAttack

    classifier = PyTorchClassifier(
        call.model,
        nn.CrossEntropyLoss(),
        tuple(call.x.shape[1:]),
        CLASSES,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    found = JIIOAttack(
        classifier, norm=call.norm, eps=call.eps, method=call.method, verbose=False
    ).generate(call.x.numpy(), call.labels.numpy())
    return torch.from_numpy(found)


ADAPTERS: dict[str, Callable[[Call], Tensor]] = {"torchattacks": with_torchattacks, "art": with_art}

# option or attribute, a bad value, what the error must say
BAD: tuple[tuple[str, str, Any, str], ...] = (
    ("both", "x", lambda c: c.x * math.nan, r"NaN"),
    ("both", "x", lambda c: (10 * c.x).int(), r"float"),
    ("both", "x", lambda c: c.x.to(torch.complex64), r"complex"),
    ("both", "x", lambda c: c.x.tolist(), r"tensor"),
    ("both", "method", lambda _: 3, r"method"),
    ("both", "verify", lambda _: 3, r"verify"),
    ("both", "model", lambda c: Plain(D, CLASSES, dtype=c.x.dtype), r"[Ee]quilibrium"),
    ("both", "model", lambda _: "model", r"model"),
    ("optimize", "constraint", lambda _: 0.5, r"constraint"),
    ("optimize", "constraint", lambda _: L2Ball(-1.0), r"radius"),
    ("optimize", "constraint", lambda _: Box(1.0, 0.0), r"lower|upper|Box"),
    ("optimize", "objective", lambda _: 3, r"objective"),
    ("optimize", "objective", lambda _: lambda y: y.sum(), r"objective"),
    ("optimize", "objective", lambda _: lambda y: y.detach().sum(1), r"objective"),
    ("attack", "labels", lambda c: c.labels + CLASSES, r"label|class"),
    ("attack", "labels", lambda c: c.labels.float(), r"label"),
    ("attack", "labels", lambda c: c.labels[:-1], r"label"),
    ("attack", "labels", lambda c: c.labels[:, None], r"label"),
    ("attack", "eps", lambda _: -1.0, r"eps|radius"),
    ("attack", "eps", lambda _: math.nan, r"eps|radius"),
    ("attack", "norm", lambda _: 3, r"norm"),
    ("attack", "loss", lambda _: "hinge", r"loss"),
    ("attack", "random_starts", lambda _: -1, r"random_starts"),
)


def build(seed: int, number: int, adapters: bool) -> Call:
    """The call of this number."""
    rng = random.Random(f"{seed}/{number}")
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dtype = rng.choice(tuple(TOL))
    how = rng.choice(("optimize", "optimize", "attack", "attack", *(ADAPTERS if adapters else ())))
    kind = rng.choice(KINDS)
    model = Model(kind, rng, generator).to(dtype).train(rng.random() < 0.5)
    rows = rng.randrange(1 if how in ADAPTERS else 0, 10)
    x = torch.rand(rows, 1, 2, D // 2, generator=generator).to(dtype)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    call = Call(model, x, labels, how=how)
    call.method = rng.choice(
        (
            None,
            Joint(max_iter=rng.choice((1, 5, 30))),
            Joint(max_iter=10, mixing="anderson"),
            Joint(max_iter=10, state_steps=1, adjoint_warmup=0, relaxation=1.0),
            Nested(max_iter=rng.choice((1, 5, 20))),
            Nested(solver=Anderson(tol=1e-2), warm_start=True, max_iter=8),
        )
    )
    call.eps = rng.choice((0.0, 0.01, 0.1, 0.5))
    call.norm = rng.choice(
        (1.0, 2.0, math.inf) if how in ("optimize", "attack") else (2.0, math.inf)
    )
    call.box = (0.0, 1.0) if how in ADAPTERS or rng.random() < 0.5 else None
    if how == "optimize":
        call.eps = call.eps if rng.random() < 0.8 else None
        if rng.random() < 0.3:
            call.given = (torch.randn(rows, N, generator=generator).to(dtype),)
    if how == "attack":
        call.loss, call.targeted = rng.choice(tuple(LOSSES)), rng.random() < 0.3
        call.options = rng.choice(({}, {}, {"random_starts": 2}, {"early_stop": True}))
    if how == "art" and dtype == torch.float64:
        call.model, call.x = model.float(), x.float()
    bad = [b for b in BAD if b[0] in ("both", how)]
    if how not in ADAPTERS and rows > 1 and rng.random() < 0.1:
        _, name, value, call.expected = rng.choice(bad)
        place = vars(call) if name in vars(call) else call.options
        place[name] = value(call)
    return call


# What must hold ---------------------------------------------------------------------------------


def state_of(call: Call) -> list[Any]:
    """Everything of the caller's that could be changed."""
    model = call.model if isinstance(call.model, nn.Module) else nn.Module()
    return [
        torch.get_rng_state().tolist(),
        [(n, p.requires_grad, p.grad, p.tolist()) for n, p in model.named_parameters()],
        [(name, m.training, sorted(m.__dict__)) for name, m in model.named_modules()],
        [t.tolist() if isinstance(t, Tensor) else t for t in (call.x, call.labels, *call.given)],
    ]


def check(call: Call, again: bool) -> list[str]:
    """What does not hold of a call."""
    before = str(state_of(call))
    try:
        found = call.make()
    except Exception as error:
        wrong = [] if str(state_of(call)) == before else ["the caller's state was changed"]
        return wrong + wrong_error(call, error)
    wrong = [] if str(state_of(call)) == before else ["the caller's state was changed"]
    if call.expected is not None:
        return [*wrong, f"no error, though one about {call.expected!r} was due"]
    x = found.x if isinstance(found, Solution) else found
    assert isinstance(x, Tensor)
    wrong += wrong_place(call, x)
    if isinstance(found, Solution) and found.value is not None and len(x):
        wrong += wrong_value(call, x, found)
    if again:
        twice = call.make()
        same = twice.x if isinstance(twice, Solution) else twice
        if not torch.equal(same, x):
            wrong.append("the same call gave another x")
        wrong += wrong_alone(call, found)
    return wrong


def wrong_error(call: Call, error: Exception) -> list[str]:
    said = f"{type(error).__name__}: {error}"
    if call.expected is None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"an error without a cause: {said} ({where.filename}:{where.lineno})"]
    if not isinstance(error, (TypeError, ValueError)) or not re.search(call.expected, str(error)):
        return [f"an error that does not speak of {call.expected!r}: {said}"]
    return []


def wrong_place(call: Call, x: Tensor) -> list[str]:
    wrong = []
    if x.shape != call.x.shape or x.dtype != call.x.dtype:
        wrong.append(f"x is {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        wrong.append("x holds NaN or Inf")
    if call.eps is not None and len(x):
        delta = (x - call.x).double().flatten(1)
        far = float(torch.linalg.vector_norm(delta, ord=call.norm, dim=1).max())
        if far > call.eps * (1 + 1e-5) + 1e-6:
            wrong.append(f"x is {far:g} from the centre, {call.eps:g} were allowed")
    if call.box is not None and bool(((x < call.box[0]) | (x > call.box[1])).any()):
        wrong.append("x is outside the box")
    return wrong


@torch.no_grad()
def exact(call: Call, x: Tensor) -> Tensor:
    """The objective at x by Newton's method in float64."""
    model = copy.deepcopy(call.model).double()
    given = tuple(g.double() for g in call.given)
    return call.objective(model.run(x.double(), given, newton))


@torch.no_grad()
def wrong_value(call: Call, x: Tensor, found: Solution) -> list[str]:
    assert found.value is not None
    status, value, tol = found.status, found.value.double(), TOL[x.dtype]
    finite = torch.isfinite(value)
    wrong = []
    if bool((~finite & (status != Status.NONFINITE)).any()):
        wrong.append("a value is NaN or Inf, and the status does not say so")
    converged = status == Status.CONVERGED
    if bool((converged & ~(found.stats.z_residual <= tol)).any()):
        wrong.append("CONVERGED above the tolerance")
    z = found.z if isinstance(found.z, Tensor) else None
    if z is not None and not isinstance(found.x, dict) and call.model.kind != "tuple":
        model = copy.deepcopy(call.model).double()
        u = model.encoder(x.double().flatten(1)) + sum(g.double() for g in call.given)
        f = model.layers[0].cell.core(z.double(), u)
        residual = (f - z.double()).norm(dim=1) / f.norm(dim=1).clamp(min=1e-12)
        # the state is rounded to its dtype, and f with it
        slack = 20 * tol + 50 * torch.finfo(x.dtype).eps
        if bool((converged & ~(residual <= slack)).any()):
            wrong.append(f"CONVERGED at a residual of {float(residual[converged].max()):.1e}")
    if (amplification := call.model.amplification) is not None:
        there, start = exact(call, x), exact(call, call.x)
        slack = (20 * amplification * tol + 1e-5) * (1 + there.abs() + start.abs())
        off = (value - there).abs()
        if bool((converged & torch.isfinite(there) & ~(off <= slack)).any()):
            worst = float(off[converged].max())
            wrong.append(
                f"a value called CONVERGED is {worst:.1e} off (1/(1−ρ) {amplification:.0f})"
            )
        trusted = torch.isin(status, torch.tensor([int(s) for s in TRUSTED], dtype=status.dtype))
        worse = there - start > 2 * slack
        worse &= "random_starts" not in call.options  # those may be worse than x
        if bool((trusted & worse).any()):
            row = int((trusted & worse).nonzero()[0, 0])
            by, name = float((there - start)[row]), Status(int(status[row])).name
            wrong.append(f"row {row}, {name}, is worse than the start by {by:.1e}")
    return wrong


def wrong_alone(call: Call, found: Any) -> list[str]:
    """In float64 and with contraction, where rounding is not amplified."""
    tame = call.model.kind in ("tanh", "linear", "rotation", "tuple") and call.model.rate <= 0.9
    if call.how in ADAPTERS or call.x.dtype != torch.float64 or not tame or len(call.x) < 2:
        return []
    if "random_starts" in call.options or found.value is None:
        return []
    one: Any = call.rows(slice(1, 2)).make()
    gap = float((one.value - found.value[1:2]).abs())
    if not gap <= 1e-5 * (1 + float(one.value.abs())):
        return [f"row 1 alone has another value, by {gap:.1e}"]
    return []


# The run ----------------------------------------------------------------------------------------


def run(args: Args) -> dict[str, Any]:
    """Make the calls, print what does not hold, and count."""
    begin, kinds, violations = time.perf_counter(), Counter[str](), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(args.first, args.first + args.count):
            call = build(args.seed, number, args.adapters)
            kinds["bad input" if call.expected else call.how] += 1
            for wrong in check(call, again=number % 3 == 0):
                kind = getattr(call.model, "kind", "another")
                line = f"call {number} ({call.how}, {kind}, {type(call.method).__name__}): {wrong}"
                violations.append(line)
                print(line, flush=True)
    seconds = time.perf_counter() - begin
    record = {
        "calls": args.count,
        "of": dict(kinds),
        "violations": violations,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }
    print(f"{args.count} calls in {seconds:.0f} s, {dict(kinds)}: {len(violations)} violations")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"seed": args.seed, **record}, indent=1) + "\n")
    return record


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(run(tyro.cli(Args, description=__doc__))["violations"]))
