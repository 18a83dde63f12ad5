"""Nothing of the caller's is changed, and threads take turns."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from jiio_plugins import Joint, L2Ball, LinfBall, Nested, Solution, joint_solution, optimize_input
from tests.cases import every_method, squared
from tests.helpers import Context, Net, rand


class Busy(nn.Module):
    """Dropout, batch statistics, frozen and trained parameters, mixed modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)
        self.net = Net(seed=1)
        self.dropout = nn.Dropout(0.4)
        self.still = nn.BatchNorm1d(3, dtype=torch.float64)
        self.fail_at = -1
        self.calls = 0
        self.modes: set[bool] = set()
        self.net.encoder.bias.requires_grad_(False)
        for k, p in enumerate(self.parameters()):
            if k % 2 and p.requires_grad:
                p.grad = torch.full_like(p, 3.0)
        self.train()
        self.still.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if 0 < self.fail_at <= self.calls:
            raise RuntimeError("the cell broke")
        self.modes.add(self.dropout.training)
        return self.still(self.net(self.dropout(self.norm(x))))


def snapshot(model: nn.Module, *tensors: Tensor) -> list[Any]:
    """Everything of the caller's that could be changed."""
    seen: list[Any] = [torch.get_rng_state().tolist()]
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        seen.append((name, id(p), p.requires_grad, p.detach().tolist(), grad))
    seen.extend((name, id(b), b.tolist()) for name, b in model.named_buffers())
    seen.extend((name, m.training) for name, m in model.named_modules())
    seen.extend((name, sorted(m.__dict__)) for name, m in model.named_modules())
    seen.extend((id(t), t.requires_grad, t.grad, t.tolist()) for t in tensors)
    return seen


@pytest.mark.filterwarnings("ignore:training_mode=True with BatchNorm")
@pytest.mark.filterwarnings("ignore:the (cell|model) cannot be called on some")
@pytest.mark.parametrize("training_mode", [False, True])
@pytest.mark.parametrize("fault", ["none", "cell", "cell later", "objective", "stop", "callback"])
@every_method
def test_nothing_of_the_callers_is_changed(method: Any, fault: str, training_mode: bool) -> None:
    model, x = Busy(), rand(4, 5, seed=1).requires_grad_()
    target, radius = rand(4, 3, seed=2), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    mask = torch.tensor([True, True, False, True, True])
    model.fail_at = {"cell": 1, "cell later": 4}.get(fault, -1)

    def fail(part: str) -> None:
        if fault == part and model.calls > 3:
            raise RuntimeError(f"the {part} broke")

    def objective(y: Tensor) -> Tensor:
        fail("objective")
        return (y - target).square().sum(1)

    def stop(y: Tensor) -> Tensor:
        fail("stop")
        return y[:, 0] > 100

    before = snapshot(model, x, target, radius, mask)

    def run() -> Solution:
        return optimize_input(
            model,
            x,
            objective,
            method=method,
            constraint=L2Ball(radius, mask=mask),
            training_mode=training_mode,
            stop=stop,
            callback=lambda progress: fail("callback"),
        )

    if fault == "none":
        run()
        assert model.modes == {training_mode}
    else:
        with pytest.raises(RuntimeError, match="broke"):
            run()
    assert snapshot(model, x, target, radius, mask) == before


def test_training_mode_warns_of_batch_statistics() -> None:
    model, x = Busy(), rand(4, 5, seed=1)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with pytest.warns(UserWarning, match="BatchNorm in train mode"):
        optimize_input(model, x, squared, constraint=L2Ball(0.1), training_mode=True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    model.norm.eval()
    optimize_input(model, x, squared, constraint=L2Ball(0.1), training_mode=True)  # no warning


def test_named_parameters_are_left_as_they_were() -> None:
    model, x = Context(), rand(4, 4, seed=1)
    model.context.grad = torch.ones_like(model.context)
    before = snapshot(model, x)
    optimize_input(model, x, squared, variables=["context"], constraint=L2Ball(0.5))
    optimize_input(
        model,
        x,
        squared,
        variables=["context"],
        groups=torch.tensor([0, 0, 1, 1]),
        constraint=L2Ball(0.5),
    )
    assert snapshot(model, x) == before


def test_the_result_shares_no_memory_with_the_input() -> None:
    model, x = Net(), rand(3, 5, seed=1)
    for rows in (3, 0):
        solution = optimize_input(model, x[:rows], squared, constraint=L2Ball(0.0))
        solution.x.add_(1.0)
    for method in (Joint(max_iter=1), Nested(max_iter=1)):  # the former ends where it begins
        optimize_input(model, x, squared, method=method).x.add_(1.0)
    joint_solution(model, x, squared, method=Joint(max_iter=1)).x.add_(1.0)
    torch.testing.assert_close(x, rand(3, 5, seed=1))
    model, rows = Context(), rand(3, 4, seed=1)
    solution = optimize_input(model, rows, squared, variables=["context"], constraint=L2Ball(0.0))
    solution.x["context"].add_(1.0)
    assert not bool(model.context.any())


def test_the_same_call_gives_the_same_result() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    first = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    torch.manual_seed(123)
    second = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.value, second.value)


class Meddling(nn.Module):
    """Counts its calls in a buffer, also in eval mode, and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)
        self.net = Net()

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x.detach()
        for t in (x, *given):
            t.sub_(0.5).mul_(2)
        return self.net(x)


class Shifted(nn.Module):
    """The same without changing anything."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * (x - 0.5))


@every_method
def test_a_model_that_changes_what_it_is_given(method: Any) -> None:
    model, x, condition = Meddling(), rand(4, 5, seed=1), rand(4, 2, seed=2)
    before = snapshot(model, x, condition)
    got = optimize_input(model, x, squared, method=method, given=[condition])
    assert snapshot(model, x, condition) == before
    assert model.cache is None
    expected = optimize_input(Shifted(model.net), x, squared, method=method)
    torch.testing.assert_close(got.x, expected.x)


# Threads ----------------------------------------------------------------------------------------


def test_two_threads_do_not_meet() -> None:
    model = Net()
    xs = [rand(4, 5, seed=s) for s in range(4)]

    def run(x: Tensor) -> Tensor:
        return optimize_input(model, x, squared, constraint=L2Ball(0.5)).x

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, xs))
    for x, got in zip(xs, together, strict=True):
        assert torch.equal(got, run(x))


def test_threads_take_turns_at_the_flags_of_a_model() -> None:
    """The second comes while the first is at work, and would see its flags."""
    model, x = Busy(), rand(4, 5, seed=1)
    before = snapshot(model, x)
    at_work, joined, done = (threading.Event() for _ in range(3))

    def first(y: Tensor) -> Tensor:
        if not at_work.is_set():
            at_work.set()
            joined.wait(0.5)  # in vain where they take turns
        return squared(y)

    def second(y: Tensor) -> Tensor:
        joined.set()
        done.wait(5)
        return squared(y)

    def run(objective: Any) -> Tensor:
        # a wrapper of its own, as an attack object makes one, around a model that all share
        return optimize_input(nn.Sequential(model), x, objective, constraint=L2Ball(0.5)).x

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, first)
        at_work.wait(5)
        other = pool.submit(run, second)
        one.result()
        done.set()
        assert torch.equal(one.result(), other.result())
    assert snapshot(model, x) == before
    assert model.modes == {False}


def nested(outer: nn.Module, inner: nn.Module, meet: threading.Barrier) -> Tensor:
    x, first = rand(2, 5, seed=1), [True]

    def objective(y: Tensor) -> Tensor:
        if first.pop() if first else False:
            meet.wait(5)  # all are inside by now
            optimize_input(inner, x, squared, constraint=L2Ball(0.5))
        return squared(y)

    return optimize_input(outer, x, objective, constraint=L2Ball(0.5)).x


@pytest.mark.parametrize("count", [2, 3])
def test_models_nested_in_a_circle_do_not_wait_for_each_other(count: int) -> None:
    models, x = [Net(seed=k) for k in range(count)], rand(2, 5, seed=1)
    before = [snapshot(model) for model in models]
    meet = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        runs = [
            pool.submit(nested, model, models[(k + 1) % count], meet)
            for k, model in enumerate(models)
        ]
        found = [run.result(timeout=30) for run in runs]
    for model, got in zip(models, found, strict=True):
        assert torch.equal(got, optimize_input(model, x, squared, constraint=L2Ball(0.5)).x)
    assert [snapshot(model) for model in models] == before


# Processes --------------------------------------------------------------------------------------


def attack_and_look(model: nn.Module, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    seen = snapshot(model)
    found = optimize_input(model, x, squared, constraint=L2Ball(0.5)).x
    queue.put((seen[1:], found.tolist(), snapshot(model)[1:]))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_a_thread_attacks() -> None:
    """It attacks, and finds the model as the caller left it, not as the attack has it."""
    model, x = Busy(), rand(4, 5, seed=1)
    before = snapshot(model)[1:]
    expected = optimize_input(model, x, squared, constraint=L2Ball(0.5)).x
    inside, done = threading.Event(), threading.Event()

    def objective(y: Tensor) -> Tensor:
        inside.set()
        done.wait(30)
        return squared(y)

    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(optimize_input, model, x, objective, constraint=L2Ball(0.5))
        assert inside.wait(10)
        queue = context.SimpleQueue()
        child = context.Process(target=attack_and_look, args=(model, x, queue))
        child.start()
        child.join(20)
        done.set()
        assert child.exitcode == 0
        seen, found, after = queue.get()
        assert torch.equal(run.result().x, expected)
    assert found == expected.tolist()
    assert seen == after == before


class Attacked(Dataset[Tensor]):
    """Samples that are attacked where they are loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        x = rand(4, 5, seed=1)[index : index + 1]
        return optimize_input(self.model, x, squared, constraint=L2Ball(0.5)).x[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_the_workers_of_a_loader_may_attack() -> None:
    model, stop = Net(), threading.Event()
    alone = torch.stack([Attacked(model)[k] for k in range(4)])

    def attack_on() -> None:
        while not stop.is_set():
            optimize_input(model, rand(4, 5, seed=1), squared, constraint=L2Ball(0.5))

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(attack_on)
        try:
            loader = DataLoader(Attacked(model), 2, num_workers=2, timeout=30)
            found = torch.cat(list(loader))
        finally:
            stop.set()
        busy.result()
    assert torch.equal(found, alone)


# Modes of autograd ------------------------------------------------------------------------------


def test_what_was_made_in_inference_mode_is_taken() -> None:
    model = Net()
    with torch.inference_mode():
        x, condition = rand(4, 5, seed=1), rand(4, 5, seed=2)
    ordinary = optimize_input(model, rand(4, 5, seed=1), squared)
    assert torch.equal(optimize_input(model, x, squared).x, ordinary.x)
    optimize_input(model, x, squared, constraint=L2Ball(0.1, center=condition * 0 + x))
    assert bool(torch.isfinite(joint_solution(model, x, squared).x).all())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="joint_solution needs grad"):
        joint_solution(model, x, squared)


def test_settings_that_require_grad_leave_no_graph() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    radius, step = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 1.0))
    for solve in (optimize_input, joint_solution):
        for constraint in (L2Ball(radius), LinfBall(radius)):
            method = Joint(max_iter=5, step_size=step)
            solution = solve(model, x, squared, constraint=constraint, method=method)
            assert not solution.x.requires_grad


def test_inside_no_grad() -> None:
    model, x = Net(), rand(4, 5, seed=1)
    expected = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    with torch.no_grad():
        quiet = optimize_input(model, x, squared, constraint=L2Ball(0.5))
    assert torch.equal(quiet.x, expected.x)
    assert not torch.is_inference(quiet.x)
