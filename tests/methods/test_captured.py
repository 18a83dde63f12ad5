"""Captured iterations, on a CPU: a tape of operations stands for the graph of a device.

``tests/test_gpu.py`` does the same on CUDA.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import jiio_plugins.methods.base
import jiio_plugins.methods.captured
import jiio_plugins.methods.relaxed
from jiio_plugins import Box, Intersection, Joint, L1Ball, L2Ball, LinfBall
from jiio_plugins.data import load_digits
from jiio_plugins.joint.problem import Problem
from jiio_plugins.joint.variables import Variable
from jiio_plugins.losses import attack_objective
from jiio_plugins.methods import solve
from jiio_plugins.models import load_pretrained
from tests.cases import NETWORKS, PLAIN_NETWORKS, squared
from tests.helpers import Net

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BALLS = {
    "l2": L2Ball(0.5),
    "l2 in a box": Intersection(L2Ball(0.5), Box(-0.9, 0.9)),
    "l1 in a box": Intersection(L1Ball(1.0), Box(-0.9, 0.9)),
    "linf in a box": Intersection(LinfBall(0.2), Box(-0.9, 0.9)),
}


class Tape:
    """Operations on memory, recorded and done again.

    Like a graph it knows tensors by their memory, reads nothing back, and does not compute while it
    records. Since an operation must be computed to be recorded here, what it has written into
    memory that was there before is put back.
    """

    last: Tape

    def __init__(self, device: torch.device) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        Tape.last = self

    @contextmanager
    def record(self) -> Iterator[None]:
        tape = self
        made: set[int] = set()
        before: dict[int, tuple[Tensor, Tensor]] = {}

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                kwargs = kwargs or {}
                for argument, value in zip(func._schema.arguments, args, strict=False):
                    info = argument.alias_info
                    if info is not None and info.is_write and isinstance(value, Tensor):
                        place = _memory(value)
                        if place not in made and place not in before:
                            before[place] = value, value.detach().clone()
                out = func(*args, **kwargs)
                given = {_memory(t) for t in _tensors((args, kwargs))}
                made.update({_memory(t) for t in _tensors(out)} - given)
                tape.operations.append((func, args, kwargs, out))
                return out

        with Recorder():
            yield
        for tensor, old in before.values():
            tensor.detach().copy_(old)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                plain = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
                for old, new in zip(
                    _tensors(out), _tensors(func(*plain[0], **plain[1])), strict=True
                ):
                    if new.data_ptr() != old.data_ptr():
                        old.detach().copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


@pytest.fixture
def recordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop takes an accelerator's branches, and what it does can be recorded."""
    monkeypatch.setattr(jiio_plugins.methods.captured, "CudaGraph", Tape)
    monkeypatch.setattr(jiio_plugins.methods.base, "can_capture", lambda device: True)
    for name in ("best", "iteration", "relaxed", "round", "steps"):
        module = __import__(f"jiio_plugins.methods.{name}", fromlist=[name])
        for function in ("surely_none", "surely_finite"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, lambda tensor: False)
        if hasattr(module, "by_row"):
            chosen: Callable[..., Tensor] = lambda m, new, old: torch.where(m[:, None], new, old)  # noqa: E731
            monkeypatch.setattr(module, "by_row", chosen)
    monkeypatch.setattr(jiio_plugins.methods.relaxed.Relaxed, "leaves", False)


def small() -> Problem:
    x = torch.linspace(-0.5, 0.5, 30, dtype=torch.float64).reshape(6, 5)
    return Problem(Variable(Net().eval().requires_grad_(False), x), squared, L2Ball(0.5))


def both(problem: Callable[[], Problem], stop: Any = None, **settings: Any) -> None:
    """A run with and without a graph, which must be the same."""
    one, other = problem(), problem()
    plain = solve(one, Joint(**settings), stop=stop)
    found = solve(other, Joint(capture=True, **settings), stop=stop)
    for name, value in vars(plain).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, msg=name)
    assert torch.equal(other.f_evals, one.f_evals)
    assert torch.equal(other.vjps, one.vjps)


@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_a_replayed_run_is_the_same(name: str, ball: Any, recordable: None) -> None:
    x = torch.linspace(-0.5, 0.5, 30, dtype=torch.float64).reshape(6, 5)
    model = NETWORKS[name]().eval().requires_grad_(False)
    both(
        lambda: Problem(Variable(model, x), squared, ball),
        max_iter=14,
        max_state_steps=2,
        gap_tol=0.0,
    )
    assert Tape.last.replays == 10


def test_rows_that_stop_and_come_to_rest(recordable: None) -> None:
    model = load_pretrained("digits").requires_grad_(False)
    x, y = (t[:12] for t in load_digits("test"))
    objective = attack_objective("cross-entropy", y)
    both(
        lambda: Problem(Variable(model, x), objective, Intersection(L2Ball(0.5), Box(0.0, 1.0))),
        stop=lambda logits: logits.argmax(1) != y,
        max_iter=25,
        max_state_steps=2,
        adjoint_warmup=3,
    )
    assert Tape.last.replays > 5


def test_a_round_may_run_between_two_replays(
    recordable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    relaxed = jiio_plugins.methods.relaxed.Relaxed
    monkeypatch.setattr(relaxed, "steady", lambda self, k: k in (5, 6, 9, 10, 11))
    both(small, max_iter=14, max_state_steps=2)
    assert Tape.last.replays == 5


def test_slow_rows_are_not_captured(recordable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tape, "__init__", lambda *_: pytest.fail("captured"))
    monkeypatch.setattr(jiio_plugins.methods.relaxed, "_SLOW", 0.0)  # all are
    both(small, max_iter=9)


def test_what_cannot_be_recorded_runs_as_it_is(
    recordable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refused(self: Tape) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(Tape, "record", refused)
    with pytest.warns(UserWarning, match=r"cannot be captured.*not permitted when stream"):
        both(small, max_iter=9, max_state_steps=2)


def test_a_callback_sees_every_iteration(recordable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tape, "__init__", lambda *_: pytest.fail("captured"))
    seen: list[int] = []
    method = Joint(max_iter=8, capture=True)
    solve(small(), method, callback=lambda progress: seen.append(progress.iteration))
    assert seen == list(range(8))


def test_without_cuda_nothing_is_captured() -> None:
    both(small, max_iter=6)
