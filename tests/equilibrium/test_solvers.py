"""Every solver on every problem: right status, honest residual, no neighbour's influence."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdeq.solver.anderson import anderson_solver

from jiio_plugins import (
    Anderson,
    Broyden,
    Equilibrium,
    Picard,
    Solution,
    Solver,
    Status,
    solve_fixed_point,
)
from jiio_plugins.equilibrium.solvers import Observed, SolverState, anderson, loop
from tests.helpers import PROBLEMS, SOLVERS, Affine, Elementwise, FixedPoint, Spy, contraction, rand

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
every_solver = pytest.mark.parametrize("kind", SOLVERS, ids=lambda s: s.__name__)


@cache
def solved(index: int, kind: type[Solver]) -> Solution:
    """Each problem is solved once by each solver, for all tests."""
    problem = PROBLEMS[index]
    return solve_fixed_point(problem.f, problem.z0, kind(max_iter=problem.budget, tol=problem.tol))


def flat(state: Any) -> Tensor:
    parts = state if isinstance(state, tuple) else (state,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def residual(problem: FixedPoint, z: Any) -> Tensor:
    """``‖f(z) − z‖`` per row."""
    return torch.linalg.vector_norm(flat(problem.f(z)) - flat(z), dim=1)


def recorded(problem: FixedPoint) -> tuple[Any, list[Tensor]]:
    """The problem's map, and the residual of every row at every evaluation of it."""
    seen: list[Tensor] = []

    def f(z: Any) -> Any:
        out = problem.f(z)
        seen.append(torch.linalg.vector_norm(flat(out) - flat(z), dim=1))
        return out

    return f, seen


def rows_of(state: Any, rows: slice) -> Any:
    return tuple(part[rows] for part in state) if isinstance(state, tuple) else state[rows]


# The table --------------------------------------------------------------------------------------


@every_solver
@every_problem
def test_status_of_every_row(problem: FixedPoint, kind: type[Solver]) -> None:
    solution = solved(PROBLEMS.index(problem), kind)
    assert [Status(int(s)) for s in solution.status] == problem.expected(kind())
    assert bool((solution.stats.f_evals <= problem.budget).all())


@every_solver
@every_problem
def test_a_converged_row_is_at_the_known_solution(problem: FixedPoint, kind: type[Solver]) -> None:
    solution = solved(PROBLEMS.index(problem), kind)
    z, done = flat(solution.z), solution.converged
    assert bool(torch.isfinite(z).all())
    limit = problem.tol * torch.linalg.vector_norm(flat(problem.f(solution.z)), dim=1) + 1e-12
    assert bool((residual(problem, solution.z) <= limit * (1 + 1e-6))[done].all())
    if problem.solution is not None:
        gap = torch.linalg.vector_norm(z - flat(problem.solution), dim=1)
        assert bool((gap <= problem.condition * limit)[done].all())


@every_solver
@every_problem
def test_reported_residual_is_true(problem: FixedPoint, kind: type[Solver]) -> None:
    solution = solved(PROBLEMS.index(problem), kind)
    size = torch.linalg.vector_norm(flat(problem.f(solution.z)), dim=1)
    true = residual(problem, solution.z) / size
    reported = solution.stats.z_residual
    finite = torch.isfinite(true)
    torch.testing.assert_close(reported[finite], true[finite], rtol=1e-6, atol=1e-14)
    assert not bool(torch.isnan(reported).any())


@pytest.mark.parametrize("max_iter", [1, 3, 8, 60])
@every_solver
@every_problem
def test_the_best_iterate_seen_is_returned_where_none_met_the_tolerance(
    problem: FixedPoint, kind: type[Solver], max_iter: int
) -> None:
    f, seen = recorded(problem)
    solution = solve_fixed_point(f, problem.z0, kind(max_iter=max_iter, tol=problem.tol))
    assert len(seen) <= max_iter
    best = torch.stack(seen).nan_to_num(torch.inf).amin(0)
    returned = residual(problem, solution.z).nan_to_num(torch.inf)
    assert bool((solution.converged | (returned <= best * (1 + 1e-9) + 1e-15)).all())
    assert bool(torch.isfinite(flat(solution.z)).all())


@every_problem
def test_anderson_needs_no_more_evaluations_than_picard(problem: FixedPoint) -> None:
    index = PROBLEMS.index(problem)
    picard, anderson = solved(index, Picard), solved(index, Anderson)
    solvable = picard.converged | anderson.converged
    # a row that Picard gives up early, because it diverges, is no cheaper for it
    picard_cost = torch.where(picard.converged, picard.stats.f_evals, problem.budget)
    assert bool((anderson.stats.f_evals <= picard_cost)[solvable].all())
    assert bool((anderson.converged | ~picard.converged).all())


@every_solver
@every_problem
def test_a_row_alone_takes_the_same_path(problem: FixedPoint, kind: type[Solver]) -> None:
    solver = kind(max_iter=6, tol=problem.tol)  # before rounding grows
    together = solve_fixed_point(problem.f, problem.z0, solver)
    for i in range(len(problem.u)):
        one = slice(i, i + 1)
        alone = solve_fixed_point(
            lambda z, one=one: problem.cell(z, problem.u[one]), rows_of(problem.z0, one), solver
        )
        assert alone.status.item() == together.status[i].item()
        assert alone.stats.f_evals.item() == together.stats.f_evals[i].item()
        torch.testing.assert_close(
            flat(alone.z), flat(rows_of(together.z, one)), rtol=1e-7, atol=1e-9
        )


@every_solver
@every_problem
def test_rows_judged_one_by_one_take_the_same_path(
    problem: FixedPoint, kind: type[Solver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator never looks whether an evaluation was uneventful."""
    solver = kind(max_iter=30, tol=problem.tol)
    looking = solve_fixed_point(problem.f, problem.z0, solver)
    monkeypatch.setattr(loop, "looks", lambda z: False)
    monkeypatch.setattr(anderson, "looks", lambda z: False)
    blind = solve_fixed_point(problem.f, problem.z0, solver)
    assert torch.equal(looking.status, blind.status)
    assert torch.equal(looking.stats.f_evals, blind.stats.f_evals)
    torch.testing.assert_close(flat(looking.z), flat(blind.z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rise", "taken_back"), [(9.0, False), (11.0, True)])
def test_a_residual_may_rise_before_it_falls(rise: float, taken_back: bool) -> None:
    seen = []

    class Steps(SolverState):
        """One step away from the fixed point at 0, then to it."""

        def advance(self, at: Observed) -> Tensor:
            seen.append(at.reject is not None)
            return at.z * (rise if len(seen) == 1 else 0.0)

    class Scripted(Solver):
        def start(self, z: Tensor) -> SolverState:
            return Steps()

    found = solve_fixed_point(torch.zeros_like, torch.ones(1, 1).double(), Scripted(max_iter=9))
    assert bool(found.converged)
    assert seen[:2] == [False, taken_back]


def test_plain_steps_get_away_from_where_residuals_do_not_change() -> None:
    """The residual is 0.1 on the way from 0 to 1, and what is mixed there is of no use."""

    class Useless(SolverState):
        def advance(self, at: Observed) -> Tensor:
            return at.z + 1e3

    class Astray(Solver):
        def start(self, z: Tensor) -> SolverState:
            return Useless()

    def f(z: Tensor) -> Tensor:
        return torch.where(z < 1, z + 0.1, 1 + 0.5 * z)

    found = solve_fixed_point(f, torch.zeros(2, 1).double(), Astray(max_iter=200, tol=1e-5))
    assert bool(found.converged.all())
    torch.testing.assert_close(found.z, torch.full_like(found.z, 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("damping", [0.5, 1.5])
def test_damped_picard_keeps_its_damping_where_residuals_rise(damping: float) -> None:
    a = torch.tensor([[0.0, -40.0], [40.0, 0.0]]).double()  # runs off, tenfold and more a step
    expected = z = torch.ones(1, 2).double()
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z)
        return z @ a

    solve_fixed_point(f, z, Picard(max_iter=8, damping=damping))
    for k in range(8):
        torch.testing.assert_close(seen[k], expected)
        expected = expected + damping * (expected @ a - expected)


@pytest.mark.parametrize("kind", [Anderson, Broyden], ids=lambda s: s.__name__)
@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_float64_reaches_1e10_where_torchdeq_stalls(rate: float, kind: type[Solver]) -> None:
    a = torch.diag(rate ** torch.arange(1, 21, dtype=torch.float64))
    u = rand(2, 20, seed=1)

    def f(z: Tensor) -> Tensor:
        return z @ a.T + u

    ours = solve_fixed_point(f, torch.zeros_like(u), kind(max_iter=300, tol=1e-10))
    assert bool(ours.converged.all())
    assert float(ours.stats.z_residual.max()) <= 1e-10

    theirs, _, _ = anderson_solver(f, torch.zeros_like(u), max_iter=300, tol=1e-10, stop_mode="rel")
    stalled = torch.linalg.vector_norm(f(theirs) - theirs, dim=1) / theirs.norm(dim=1)
    assert float(stalled.min()) > 1e-9


# What a solve costs -----------------------------------------------------------------------------


@every_solver
def test_converged_rows_are_not_evaluated_again(kind: type[Solver]) -> None:
    rates = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.95]).double()
    u = torch.cat([rates[:, None], rand(8, 4, seed=5)], dim=1)

    def g(z: Tensor, u: Tensor) -> Tensor:
        decay = u[:, :1] * torch.tensor([1.0, 0.9, 0.7, -0.5, 0.2]).double()
        return decay * z + u

    spy = Spy(Elementwise(g))
    solver = kind(max_iter=1000, tol=1e-10)
    with torch.no_grad():
        z = Equilibrium(spy, solver=solver)(u)
    # solve_fixed_point cannot restrict f to rows: it tells each row's own number of evaluations
    own = solve_fixed_point(lambda z: g(z, u), torch.zeros_like(u), solver)
    for k, rows in enumerate(spy.rows):
        running = int((own.stats.f_evals > k).sum())
        assert running <= rows <= running / 0.75
    assert len(spy.rows) == int(own.stats.f_evals.max())
    torch.testing.assert_close(z, own.z, rtol=1e-8, atol=1e-8)


@every_solver
def test_evaluations_are_counted_truly_for_one_row(kind: type[Solver]) -> None:
    spy = Spy(Affine(contraction(6, 0.9, symmetric=True, seed=1)))
    u = rand(1, 6, seed=2)
    solution = solve_fixed_point(lambda z: spy(z, u), torch.zeros_like(u), kind(max_iter=500))
    assert spy.total == solution.stats.f_evals.item() == solution.stats.iterations.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_on(dtype: torch.dtype) -> None:
    calls = 0

    def rotate(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.stack([-z[:, 1], z[:, 0]], dim=1) + 1

    solver = Picard(max_iter=2500, tol=0.0)  # goes round and round
    found = solve_fixed_point(rotate, torch.ones(2, 2, dtype=dtype), solver)
    assert found.stats.f_evals.tolist() == [calls] * 2 == [2500] * 2
    assert found.z.dtype == dtype


def test_history_is_allocated_once() -> None:
    """No tensor of the history's size is made anew while the loop runs."""
    u = rand(2, 50, seed=1)
    a = contraction(50, 0.999, symmetric=True, seed=2)
    solver = Anderson(max_iter=40, tol=0.0, memory=30)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            fresh = isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given
            if fresh and out.numel() >= 2 * 30 * 50:  # no view
                sizes.append(out.numel())
            return out

    with Watch():
        solve_fixed_point(lambda z: z @ a.T + u, torch.zeros_like(u), solver)
    assert len(sizes) <= 2  # Y and D


# float32, tolerances, edges ---------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("tol", [0.0, 1e-12])
def test_float32_ends_with_a_status_below_its_precision(kind: type[Solver], tol: float) -> None:
    a = contraction(30, 0.99, symmetric=True, seed=1).float()
    u = rand(4, 30, seed=2, dtype=torch.float32)
    solver = kind(max_iter=2000, tol=tol, abs_tol=0.0)
    solution = solve_fixed_point(lambda z: z @ a.T + u, torch.zeros_like(u), solver)
    ends = {Status(int(s)) for s in solution.status}
    assert ends <= {Status.STALLED, Status.MAX_ITER, Status.CONVERGED}
    exact_zero = solution.stats.z_residual <= tol
    assert torch.equal(solution.converged, exact_zero)
    assert float(solution.stats.z_residual.max()) < 1e-5
    if kind is Anderson:
        assert bool((solution.stats.f_evals < 500).all())  # it notices
        assert ends == {Status.STALLED}


@every_solver
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e25])
def test_float32_far_from_one(kind: type[Solver], size: float) -> None:
    """Squares of these leave the range of float32."""
    a = contraction(6, 0.5, symmetric=False, seed=1)
    u = rand(3, 6, seed=2)
    exact = torch.linalg.solve(torch.eye(6) - a, u.T).T
    narrow = (size * u).float()
    solver = kind(max_iter=200, tol=1e-4)
    found = solve_fixed_point(lambda z: z @ a.T.float() + narrow, torch.zeros(3, 6), solver)
    assert bool(found.converged.all())
    assert bool((found.stats.z_residual > 0).all())
    torch.testing.assert_close(found.z.double() / size, exact, rtol=2e-3, atol=2e-3)


@every_solver
def test_a_fixed_point_at_zero_is_reached_from_any_size(kind: type[Solver]) -> None:
    sizes = torch.tensor([1e-30, 1e-10, 1.0])[:, None]
    found = solve_fixed_point(lambda z: 0.5 * z, sizes, kind(max_iter=200, tol=1e-6))
    assert bool(found.converged.all())
    assert bool((found.z.abs() <= 2e-12 * sizes).all())


@every_solver
def test_autocast_is_for_f_alone(kind: type[Solver]) -> None:
    a = contraction(10, 0.8, symmetric=False, seed=1).float()
    u = rand(3, 10, seed=2).float()

    def f(z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return z @ a.T + u

    solver = kind(tol=1e-6)
    plain = solve_fixed_point(f, torch.zeros_like(u), solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve_fixed_point(f, torch.zeros_like(u), solver)
    assert torch.equal(found.z, plain.z)
    assert torch.equal(found.stats.f_evals, plain.stats.f_evals)


@every_solver
def test_float32_and_float64_agree(kind: type[Solver]) -> None:
    a = contraction(10, 0.8, symmetric=False, seed=1)
    u = rand(3, 10, seed=2)
    wide = solve_fixed_point(lambda z: z @ a.T + u, torch.zeros_like(u), kind(tol=1e-6))
    a32, u32 = a.float(), u.float()
    narrow = solve_fixed_point(lambda z: z @ a32.T + u32, torch.zeros_like(u32), kind(tol=1e-6))
    assert narrow.z.dtype == torch.float32
    assert bool(narrow.converged.all())
    torch.testing.assert_close(narrow.z.double(), wide.z, rtol=1e-4, atol=1e-4)


@every_solver
def test_starting_at_the_solution_costs_one_evaluation(kind: type[Solver]) -> None:
    u = rand(3, 4, seed=1)
    solution = solve_fixed_point(lambda z: u, u.clone(), kind())
    assert solution.stats.f_evals.tolist() == [1, 1, 1]
    assert bool(solution.converged.all())


@every_solver
def test_an_empty_batch(kind: type[Solver]) -> None:
    solution = solve_fixed_point(lambda z: z / 2, torch.zeros(0, 3), kind())
    assert solution.z.shape == (0, 3)
    assert solution.status.shape == (0,)


def test_damping_changes_the_path_and_not_the_answer() -> None:
    a = torch.diag(torch.linspace(-0.95, 0.2, 12).double())
    u = rand(2, 12, seed=1)
    results = [
        solve_fixed_point(lambda z: z @ a.T + u, torch.zeros_like(u), solver)
        for solver in (
            Picard(max_iter=1000, tol=1e-10),
            Picard(max_iter=1000, tol=1e-10, damping=0.6),
            Anderson(max_iter=1000, tol=1e-10),
            Anderson(max_iter=1000, tol=1e-10, damping=0.5),
        )
    ]
    for result in results[1:]:
        torch.testing.assert_close(result.z, results[0].z, rtol=1e-8, atol=1e-8)
    assert int(results[1].stats.f_evals.max()) < int(results[0].stats.f_evals.min()) / 5
    assert int(results[3].stats.f_evals.max()) != int(results[2].stats.f_evals.max())


def test_anderson_remembers_no_more_than_it_is_told() -> None:
    """On a linear problem a memory of n ends it in n + 2 evaluations; a shorter one does not."""
    a = contraction(6, 0.95, symmetric=False, seed=3)
    u = rand(2, 6, seed=4)

    def evals(memory: int) -> int:
        solver = Anderson(max_iter=300, tol=1e-9, memory=memory)
        return int(solve_fixed_point(lambda z: z @ a.T + u, u * 0, solver).stats.f_evals.max())

    assert evals(6) <= 8 < evals(1)


@pytest.mark.parametrize(("rate", "evaluations"), [(0.99, 110), (0.999, 150)])
def test_the_memory_of_anderson_grows_where_a_cell_is_slow(rate: float, evaluations: int) -> None:
    """To 1e-10. With the memory it starts with, it takes 390, or does not arrive in 1000."""
    a = torch.diag(torch.linspace(-rate / 2, rate, 200, dtype=torch.float64))
    u = rand(4, 200, seed=1)
    found = solve_fixed_point(lambda z: z @ a + u, u * 0, Anderson(max_iter=1000, tol=1e-10))
    assert bool(found.converged.all())
    assert int(found.stats.f_evals.max()) <= evaluations


def test_the_memory_of_anderson_grows_by_rows_alone() -> None:
    """A large state keeps five differences, however slow its cell: they take memory."""
    n = 2**19  # 2 MiB a row in float32, and a pair of differences 4 MiB
    state = Anderson().start(torch.zeros(1, n))
    assert state.limit == state.memory == 5
    assert Anderson().start(torch.zeros(64, 100)).limit == 40


# Misuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        (Picard, {"max_iter": 0}, "max_iter must be at least 1, got 0"),
        (Anderson, {"tol": -1e-3}, "must not be negative, got -0.001"),
        (Anderson, {"tol": math.nan}, "must not be negative, got nan"),
        (Broyden, {"abs_tol": -1.0}, "must not be negative"),
        (Picard, {"damping": 0.0}, "damping must be above 0 and at most 2, got 0"),
        (Picard, {"damping": 2.5}, "at most 2, got 2.5"),
        (Anderson, {"damping": 1.5}, "at most 1, got 1.5"),
        (Anderson, {"memory": 0}, "memory must be at least 1, got 0"),
        (Broyden, {"memory": 0}, "memory must be at least 1, got 0"),
        (Anderson, {"ridge": -1.0}, "ridge must not be negative, got -1"),
        (Anderson, {"max_iter": 10.5}, "max_iter must be an integer, got 10.5"),
        (Broyden, {"memory": 2.5}, "memory must be an integer, got 2.5"),
    ],
)
def test_bad_arguments(kind: type[Solver], arguments: dict[str, float], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        kind(**arguments)


@every_solver
def test_unknown_keywords_raise(kind: type[Solver]) -> None:
    with pytest.raises(TypeError, match="threshold"):
        kind(threshold=3)


def test_solvers_are_values() -> None:
    assert Anderson(tol=1e-3) == Anderson(tol=1e-3) != Anderson(tol=1e-4)
    with pytest.raises(AttributeError):
        Anderson().tol = 1.0  # type: ignore[misc]


def test_wrong_states_raise() -> None:
    z0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"of f is a tensor of shape \(2, 4\).*\(2, 3\)"):
        solve_fixed_point(lambda z: torch.zeros(2, 4), z0)
    with pytest.raises(ValueError, match="the output of f is a"):
        solve_fixed_point(lambda z: (z, z), z0)
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        solve_fixed_point(lambda z: z, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="batch-first tensor or a tuple"):
        solve_fixed_point(lambda z: z, [1.0, 2.0])
    with pytest.raises(TypeError, match="batch-first tensor or a tuple"):
        solve_fixed_point(lambda z: z, torch.tensor(1.0))


def test_every_status_says_what_to_do() -> None:
    for status in Status:
        assert len(status.message) > 15
    mixed = solved([p.name for p in PROBLEMS].index("one row stuck"), Anderson)
    assert "3 × CONVERGED" in mixed.report()
    assert "1 × MAX_ITER: the iteration limit" in mixed.report()
