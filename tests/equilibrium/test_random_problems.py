"""Every solver on random problems: contractions, rotations, divergent cells, stuck rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from jiio_plugins import Anderson, Broyden, Picard, Solver, Status, solve_fixed_point
from tests.helpers import SOLVERS, contraction, rand, rotation

if TYPE_CHECKING:
    from collections.abc import Callable


@st.composite
def contractions(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """A, u and a bound on ‖A‖₂ below 1."""
    n, rows = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**16))
    rate = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]) | st.floats(0, 0.999))
    kind = draw(st.sampled_from(["symmetric", "nonsymmetric", "orthogonal"]))
    if kind == "orthogonal":
        a = rate * torch.linalg.qr(rand(n, n, seed=seed)).Q
    else:
        a = contraction(n, rate, symmetric=kind == "symmetric", seed=seed)
    u = rand(rows, n, seed=seed + 1) * 10.0 ** draw(st.integers(-4, 4))
    return a, u, rate


@pytest.mark.parametrize("kind", [Anderson, Broyden], ids=lambda s: s.__name__)
@given(contractions())
def test_random_contractions(kind: type[Solver], problem: tuple[Tensor, Tensor, float]) -> None:
    a, u, rate = problem
    tol = 1e-8
    enough = 50 + math.ceil(math.log(tol) / math.log(max(rate, 0.1)))
    solution = solve_fixed_point(
        lambda z: z @ a.T + u, torch.zeros_like(u), kind(max_iter=enough, tol=tol)
    )
    assert bool(solution.converged.all()), solution.report()
    r = torch.linalg.vector_norm(solution.z @ a.T + u - solution.z, dim=1)
    exact = torch.linalg.solve(torch.eye(len(a), dtype=a.dtype) - a, u.T).T
    gap = torch.linalg.vector_norm(solution.z - exact, dim=1)
    assert bool((gap <= r * (1 + 1e-6) / (1 - rate) + 1e-9 * exact.norm(dim=1)).all())


@st.composite
def maps(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """``A z + u`` or ``tanh(A z + u)``, contracting or not, and where to start, in some dtype."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    n, rows, seed = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(0, 2**16))
    a = rand(n, n, seed=seed)
    radius = draw(st.sampled_from([0.5, 0.9, 0.99, 0.999, 1.0, 1.3]))
    a = (a * (radius / torch.linalg.eigvals(a).abs().max())).to(dtype)
    u, z0 = rand(2, rows, n, seed=seed + 1).to(dtype)
    bend = draw(st.sampled_from([torch.tanh, torch.Tensor.clone]))
    return lambda z: bend(z @ a.T + u), z0 * draw(st.sampled_from([0.0, 1.0, 30.0]))


@given(st.sampled_from(SOLVERS), maps(), st.sampled_from([0.1, 1e-2, 1e-4, 1e-6]), st.booleans())
def test_converged_is_true_of_what_is_returned(
    kind: type[Solver], problem: tuple[Callable[[Tensor], Tensor], Tensor], tol: float, again: bool
) -> None:
    f, z0 = problem

    def sizes(z: Tensor) -> tuple[Tensor, Tensor]:
        """``‖f(z) − z‖`` and the most that the tolerance allows."""
        fz = f(z)
        rounding = 1 + 4 * torch.finfo(z.dtype).eps
        r, norm = (torch.linalg.vector_norm(t.double(), dim=1) for t in (fz.double() - z, fz))
        return r, rounding * (solver.tol * norm).clamp(min=1e-12)

    solver = kind(max_iter=120, tol=tol)
    if again:  # warm from an answer of half as many digits
        z0 = solve_fixed_point(f, z0, kind(max_iter=120, tol=tol**0.5)).z
    solution = solve_fixed_point(f, z0, solver)
    done, (r, limit), (r_first, limit_first) = solution.converged, sizes(solution.z), sizes(z0)
    assert bool((r <= limit)[done].all())
    assert bool(((r < r_first) | (r_first <= limit_first))[done].all())
    assert bool(done[r_first <= limit_first / 1.1].all())  # a start that is good enough is taken


@pytest.mark.parametrize("kind", SOLVERS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tol", [0.2, 1e-2])
def test_running_off_is_no_convergence(kind: type[Solver], dtype: torch.dtype, tol: float) -> None:
    """``z + 1`` has no fixed point, though 1 is small beside a z of 100."""
    solution = solve_fixed_point(
        lambda z: z + 1, torch.zeros(1, 1, dtype=dtype), kind(max_iter=200, tol=tol)
    )
    assert Status(int(solution.status)) in (Status.MAX_ITER, Status.STALLED)
    assert solution.z.item() == 0.0
    assert solution.stats.z_residual.item() == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_no_fixed_point_along_an_eigenvector_of_eigenvalue_one(seed: int) -> None:
    q = torch.linalg.qr(rand(3, 3, seed=seed)).Q
    a = q @ torch.diag(torch.tensor([1.0, 0.5, -0.3]).double()) @ q.T
    u = rand(2, 3, seed=seed + 100) + 2 * q[:, 0]  # (I − A) z = u has no solution
    solver = Anderson(max_iter=200, tol=1e-9)
    solution = solve_fixed_point(lambda z: z @ a.T + u, torch.zeros_like(u), solver)
    assert not bool(solution.converged.any()), solution.report()


@pytest.mark.parametrize("seed", [264, 268, 282, 288])
def test_broyden_returns_the_iterate_that_met_the_tolerance(seed: int) -> None:
    """On the way to a far z* an early iterate has the smaller residual."""
    q, u = rand(6, seed=seed).split([4, 2])
    q = torch.linalg.qr(q.reshape(2, 2)).Q
    a = q @ torch.diag(torch.tensor([0.999, 0.3]).double()) @ q.T
    exact = torch.linalg.solve(torch.eye(2).double() - a, u)
    solver = Broyden(max_iter=300, tol=1e-2)
    solution = solve_fixed_point(lambda z: z @ a.T + u, torch.zeros(1, 2).double(), solver)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.z, exact[None], rtol=1e-3, atol=0)


@given(
    st.lists(st.floats(0.3, 3.0), min_size=1, max_size=3),
    st.floats(1.0, 1.5),
    st.integers(0, 2**16),
)
def test_random_rotations(angles: list[float], radius: float, seed: int) -> None:
    a = rotation(angles, radius)
    u = rand(2, len(a), seed=seed)

    def f(z: Tensor) -> Tensor:
        return z @ a.T + u

    plain = solve_fixed_point(f, torch.zeros_like(u), Picard(max_iter=200, tol=1e-8))
    assert not bool(plain.converged.any())
    assert bool(torch.isfinite(plain.z).all())
    for solver in (Anderson(max_iter=400, tol=1e-8, memory=8), Broyden(max_iter=400, tol=1e-8)):
        solution = solve_fixed_point(f, torch.zeros_like(u), solver)
        assert bool(solution.converged.all()), (solver, solution.report())


@given(
    st.sampled_from(SOLVERS),
    st.floats(0.1, 5.0),
    st.integers(1, 6),
    st.integers(0, 2**16),
    st.integers(2, 150),
)
def test_random_cells_that_diverge(
    kind: type[Solver], c: float, n: int, seed: int, max_iter: int
) -> None:
    start = rand(3, n, seed=seed)
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        out = z * z + z + c
        seen.append(torch.linalg.vector_norm(out - z, dim=1))
        return out

    solution = solve_fixed_point(f, start, kind(max_iter=max_iter, tol=1e-8))
    bad = {Status.MAX_ITER, Status.DIVERGED, Status.STALLED, Status.NONFINITE}
    assert {Status(int(s)) for s in solution.status} <= bad
    assert bool(torch.isfinite(solution.z).all())
    best = torch.stack(seen).nan_to_num(torch.inf).amin(0)
    torch.testing.assert_close(torch.linalg.vector_norm(f(solution.z) - solution.z, dim=1), best)


@given(
    st.sampled_from(SOLVERS),
    st.integers(0, 5),
    st.integers(1, 6),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_row_that_turns_nonfinite_harms_nobody(
    kind: type[Solver], bad_row: int, good_calls: int, poison: float
) -> None:
    a = contraction(5, 0.9, symmetric=False, seed=2)
    u = rand(6, 5, seed=3)

    def clean(z: Tensor) -> Tensor:
        return z @ a.T + u

    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = clean(z)
        if calls > good_calls:
            out[bad_row, 2] = poison
        return out

    solver = kind(max_iter=300, tol=1e-10)
    solution = solve_fixed_point(f, torch.zeros_like(u), solver)
    reference = solve_fixed_point(clean, torch.zeros_like(u), solver)
    assert Status(int(solution.status[bad_row])) in (Status.NONFINITE, Status.STALLED)
    assert bool(torch.isfinite(solution.z).all())
    others = torch.arange(6) != bad_row
    assert bool(solution.converged[others].all())
    assert torch.equal(solution.z[others], reference.z[others])


@given(st.sampled_from(SOLVERS), st.integers(0, 7), st.floats(0.0, 0.8), st.integers(0, 2**16))
def test_one_stuck_row_costs_the_others_nothing(
    kind: type[Solver], where: int, rate: float, seed: int
) -> None:
    a = contraction(4, rate, symmetric=False, seed=seed)
    u = rand(8, 4, seed=seed + 1)
    stuck = (torch.arange(8) == where)[:, None]

    solver = kind(max_iter=150, tol=1e-9)
    mixed = solve_fixed_point(
        lambda z: torch.where(stuck, z + 1, z @ a.T + u), torch.zeros_like(u), solver
    )
    clean = solve_fixed_point(lambda z: z @ a.T + u, torch.zeros_like(u), solver)
    others = ~stuck.squeeze(1)
    assert Status(int(mixed.status[where])) in (Status.MAX_ITER, Status.STALLED)
    assert bool(mixed.converged[others].all())
    assert torch.equal(mixed.z[others], clean.z[others])
    assert torch.equal(mixed.stats.f_evals[others], clean.stats.f_evals[others])
