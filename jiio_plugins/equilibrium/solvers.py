"""Fixed-point solvers: small frozen dataclasses and one loop that runs them all.

Solves ``z = f(z)`` for every row of a batch by itself. A row stops when
``‖f(z) − z‖ ≤ tol · ‖f(z)‖`` and costs nothing from then on. The iterate that met this is returned.
On a CPU the batch is compacted. On an accelerator the row is frozen, since compacting would make
the host wait.

Where z runs off, ‖f(z)‖ grows until any residual is small beside it, or is rounded away. So a row
stops only once its residual is below ∛tol of its first too, or within the tolerance that held at
the first evaluation. What rounding hides counts as residual there.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from jiio_plugins.equilibrium.some_rows import some_rows
from jiio_plugins.equilibrium.state import Layout, safe_norm
from jiio_plugins.solution import Solution, Stats, Status
from jiio_plugins.utils.checks import check_counts, check_floating

if TYPE_CHECKING:
    from collections.abc import Callable

_PATIENCE = 10  # steps taken back in a row before a row is given up
_IDLE = 20  # evaluations without a new best, at the dtype's precision, before it is
_ABSOLUTE = 1e-12
_COMPACT_BELOW = 0.75  # share of running rows under which a CPU batch is compacted


class FlatMap(Protocol):
    """``f`` on flat states.

    It may have ``restrict(rows)``, the same map for the rows of these indices, or None where that
    cannot be had. Then rows that have converged are left out.
    """

    def __call__(self, z: Tensor, /) -> Tensor:
        """``f(z)``, flat, ``(rows, n)``."""
        ...


class _ByRow:
    """Holds tensors, all of them batch first."""

    def restrict(self, rows: Tensor) -> None:
        """Keep the rows of these indices only."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


class SolverState(_ByRow, abc.ABC):
    """What a solver remembers. Every tensor in it is batch first."""

    @abc.abstractmethod
    def advance(
        self, z: Tensor, fz: Tensor, reject: Tensor, z_best: Tensor, f_best: Tensor
    ) -> Tensor:
        """The next iterate, ``(rows, n)``.

        Args:
            z: the iterate, ``(rows, n)``.
            fz: ``f(z)``, ``(rows, n)``.
            reject: rows whose step the loop takes back, bool ``(rows,)``. It restarts them from
                their best iterate, so the history must do the same.
            z_best: iterate of least residual so far, ``(rows, n)``.
            f_best: ``f(z_best)``, ``(rows, n)``.
        """


@dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    """Common part of the solvers.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ tol · ‖f(z)‖ + abs_tol``.
        abs_tol: the absolute part of that, in the units of z. It is for fixed points at zero. None:
            1e-12, or that times the size of z at the first evaluation where it is below 1.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.
    """

    max_iter: int = 50
    tol: float = 1e-4
    abs_tol: float | None = None

    def __post_init__(self) -> None:
        check_counts(self, max_iter=1)
        if not (self.tol >= 0 and (self.abs_tol is None or self.abs_tol >= 0)):
            raise ValueError(
                f"tol and abs_tol must not be negative, got {self.tol} and {self.abs_tol}"
            )

    @property
    def safeguarded(self) -> bool:
        """Whether the loop takes back steps that made the residual worse."""
        return True

    @property
    def growth(self) -> float:
        """A residual this many times the best one seen is taken back."""
        return 2.0

    @abc.abstractmethod
    def start(self, z: Tensor) -> SolverState:
        """Fresh history for the flat state ``z`` ``(rows, n)``."""


def check_solver(solver: Any, name: str) -> None:
    """Raise unless it is a :class:`Solver` or None.

    Args:
        solver: what was given.
        name: what the message calls it.

    Raises:
        TypeError: it is something else.
    """
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"{name} must be Anderson(...), Picard(...) or Broyden(...), got {solver!r}"
        )


def check_positive(name: str, value: float, upper: float = float("inf")) -> None:
    """Raise unless a number is in ``(0, upper]``.

    Args:
        name: what the message calls it.
        value: what was given.
        upper: largest number accepted.

    Raises:
        ValueError: it is not.
    """
    if not 0 < value <= upper:
        limit = "" if upper == float("inf") else f" and at most {upper:g}"
        raise ValueError(f"{name} must be above 0{limit}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """Plain damped iteration ``z⁺ = z + damping · (f(z) − z)``.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ tol · ‖f(z)‖ + abs_tol``.
        abs_tol: the absolute part of that, in the units of z. None: see :class:`Solver`.
        damping: step length, in (0, 2]. Above 1 it over-relaxes.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.

    Not for: cells that do not contract. No step is taken back there, so use :class:`Anderson`.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("damping", self.damping, 2.0)

    @property
    def safeguarded(self) -> bool:
        """Plain iteration is left plain."""
        return False

    def start(self, z: Tensor) -> SolverState:
        """No history."""
        return _PicardState(self.damping)


class _PicardState(SolverState):
    def __init__(self, damping: float) -> None:
        self.damping = damping

    def advance(
        self, z: Tensor, fz: Tensor, reject: Tensor, z_best: Tensor, f_best: Tensor
    ) -> Tensor:
        return fz if self.damping == 1.0 else torch.lerp(z, fz, self.damping)


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II) with a ridge relative to the Gram matrix.

    With residuals ``r_k = f(z_k) − z_k`` and the last ``memory`` differences ``Y = [Δr]``,
    ``D = [Δf]`` it takes ``γ = argmin ‖r_k − Yγ‖²`` and
    ``z⁺ = f(z_k) − Dγ − (1 − damping)(r_k − Yγ)``. The columns of Y are normalised first, so the
    ridge means the same at residual 1 and 1e-12: an absolute ridge stalls.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ tol · ‖f(z)‖ + abs_tol``.
        abs_tol: the absolute part of that, in the units of z. None: see :class:`Solver`.
        memory: differences kept. Each takes the memory of two states.
        damping: in (0, 1]. 1 takes the whole step.
        ridge: added to the unit diagonal of the normalised Gram matrix. None: ten times the dtype's
            epsilon.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.

    Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.2. Safeguarded restarts are as in
    Zhang, O'Donoghue and Boyd, SIAM J. Optim. 30 (2020).
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("damping", self.damping, 1.0)
        check_counts(self, memory=1)
        if self.ridge is not None and self.ridge < 0:
            raise ValueError(f"ridge must not be negative, got {self.ridge}")

    def start(self, z: Tensor) -> SolverState:
        """Preallocate the history."""
        return _AndersonState(self, z)


class _AndersonState(SolverState):
    def __init__(self, solver: Anderson, z: Tensor) -> None:
        rows, n = z.shape
        self.damping = solver.damping
        self.ridge = 10 * torch.finfo(z.dtype).eps if solver.ridge is None else solver.ridge
        self.memory = min(solver.memory, n)
        self.y = z.new_zeros(rows, self.memory, n)
        self.d = z.new_zeros(rows, self.memory, n)
        # a column that is given up is not overwritten, which would cost a pass over the history
        # the normal equations square Y's condition number, so they are solved in float64
        self.gram = z.new_zeros(rows, self.memory, self.memory, dtype=torch.float64)
        self.valid = torch.zeros(rows, self.memory, dtype=torch.bool, device=z.device)
        self.r_last: Tensor | None = None
        self.f_last: Tensor | None = None
        self.count = 0

    def advance(
        self, z: Tensor, fz: Tensor, reject: Tensor, z_best: Tensor, f_best: Tensor
    ) -> Tensor:
        r = fz - z
        if self.r_last is not None and self.f_last is not None:
            slot = self.count % self.memory
            torch.sub(r, self.r_last, out=self.y[:, slot])
            torch.sub(fz, self.f_last, out=self.d[:, slot])
            # a column holding NaN or Inf, or one from before a restart, is no information
            keep = (~reject & torch.isfinite(self.y[:, slot].sum(1)))[:, None]
            self.y[:, slot].masked_fill_(~keep, 0)
            self.d[:, slot].masked_fill_(~keep, 0)
            self.valid &= keep
            self.valid[:, slot] = keep.squeeze(1)
            self.gram.masked_fill_(~keep[:, None], 0)
            column = torch.bmm(self.y, self.y[:, slot].unsqueeze(2)).squeeze(2).double()
            column.masked_fill_(~self.valid, 0)
            self.gram[:, slot] = column
            self.gram[:, :, slot] = column
            self.count += 1
        self.r_last = torch.where(reject[:, None], f_best - z_best, r)
        self.f_last = torch.where(reject[:, None], f_best, fz)
        if self.count == 0:
            return torch.lerp(z, fz, self.damping)
        gamma = self._weights(r)
        z_next = torch.baddbmm(fz.unsqueeze(1), gamma, self.d, alpha=-1).squeeze(1)
        if self.damping != 1.0:
            r_left = torch.baddbmm(r.unsqueeze(1), gamma, self.y, alpha=-1).squeeze(1)
            z_next = z_next - (1 - self.damping) * r_left
        return z_next

    def _weights(self, r: Tensor) -> Tensor:
        """γ of the least squares, ``(rows, 1, memory)``."""
        along = torch.bmm(self.y, r.unsqueeze(2)).double()
        along.masked_fill_(~self.valid.unsqueeze(2), 0)
        return mixing_weights(self.gram, along, self.ridge).to(r.dtype).transpose(1, 2)


def mixing_weights(gram: Tensor, along: Tensor, ridge: float) -> Tensor:
    """``γ = argmin ‖r − Y γ‖²`` with a ridge, ``(rows, memory, 1)``. It is 0 where that fails.

    The columns of Y are normalised first. Those of zeros get no weight.

    Args:
        gram: ``YᵀY``, ``(rows, memory, memory)`` in float64: it squares Y's condition number.
        along: ``Yᵀr``, ``(rows, memory, 1)`` in float64.
        ridge: relative to the unit diagonal of the normalised Gram matrix.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    gram = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
    gram.diagonal(dim1=1, dim2=2).fill_(1.0 + ridge)  # empty columns too
    factor, info = torch.linalg.cholesky_ex(gram)
    gamma = torch.cholesky_solve(along * scale.unsqueeze(2), factor) * scale.unsqueeze(2)
    usable = (info == 0) & torch.isfinite(gamma).all(dim=1).squeeze(1)
    return torch.where(usable[:, None, None], gamma, 0.0)


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method with a limited-memory inverse Jacobian of ``r(z) = f(z) − z``.

    ``z⁺ = z − H r(z)`` with ``H₀ = −I`` and ``H⁺ = H + (Δz − HΔr) ΔzᵀH / (ΔzᵀHΔr)``.

    Args:
        max_iter: evaluations of f at most, per row.
        tol: a row stops at ``‖f(z) − z‖ ≤ tol · ‖f(z)‖ + abs_tol``.
        abs_tol: the absolute part of that, in the units of z. None: see :class:`Solver`.
        memory: rank kept. When it is full the update starts afresh.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a number out of its range.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models" (NeurIPS 2019), section 3.2.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, memory=1)

    @property
    def growth(self) -> float:
        """Broyden's residuals rise before they fall: far less than 10 undoes steps it needs."""
        return 10.0

    def start(self, z: Tensor) -> SolverState:
        """Preallocate the low-rank factors."""
        return _BroydenState(self, z)


class _BroydenState(SolverState):
    def __init__(self, solver: Broyden, z: Tensor) -> None:
        rows, n = z.shape
        self.left = z.new_zeros(rows, solver.memory, n)
        self.right = z.new_zeros(rows, solver.memory, n)
        self.z_last: Tensor | None = None
        self.r_last: Tensor | None = None
        self.count = 0

    def _times_h(self, left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
        """``−vector + Σ left_i ⟨right_i, vector⟩``."""
        weights = torch.bmm(right, vector.unsqueeze(2)).transpose(1, 2)
        return torch.baddbmm(vector.unsqueeze(1), weights, left, beta=-1).squeeze(1)

    def advance(
        self, z: Tensor, fz: Tensor, reject: Tensor, z_best: Tensor, f_best: Tensor
    ) -> Tensor:
        r = fz - z
        if self.z_last is not None and self.r_last is not None:
            slot = self.count % self.left.shape[1]
            if slot == 0:  # each pair was made with H as it was, so none can be dropped alone
                self.left.zero_()
                self.right.zero_()
            s, y = z - self.z_last, r - self.r_last
            sh = self._times_h(self.right, self.left, s)
            denominator = (sh * y).sum(1, keepdim=True)
            left = (s - self._times_h(self.left, self.right, y)) / denominator
            # a finite secant pair is true whether or not its step is taken back
            usable = torch.isfinite(left.sum(1)) & torch.isfinite(sh.sum(1))
            self.left[:, slot] = torch.where(usable[:, None], left, 0)
            self.right[:, slot] = torch.where(usable[:, None], sh, 0)
            self.count += 1
        self.z_last = torch.where(reject[:, None], z_best, z)
        self.r_last = torch.where(reject[:, None], f_best - z_best, r)
        return z - self._times_h(self.left, self.right, r)


class HostFlag:
    """Whether all rows are done, without making the host wait for an accelerator.

    On a CPU the answer is immediate. On CUDA it is that of an earlier iteration: it is copied to
    pinned memory in the background and read once the copy has arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending = False
        if self._cuda:
            self._host = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._event = torch.cuda.Event()

    def __call__(self, all_done: Tensor) -> bool:
        """Whether the batch is done, as far as the host knows."""
        if not self._cuda:
            return bool(all_done)
        if self._pending:
            if not self._event.query():
                return False
            self._pending = False
            if bool(self._host):
                return True
        self._host.copy_(all_done, non_blocking=True)
        self._event.record()
        self._pending = True
        return False


@dataclass
class FlatSolution:
    """Outcome of :func:`iterate`, one entry per row.

    Attributes:
        z: iterate that met the tolerance, else the one of least residual, ``(rows, n)``.
        fz: ``f(z)`` there, ``(rows, n)``.
        residual: ``‖f(z) − z‖ / ‖f(z)‖`` there, ``(rows,)``.
        evals: evaluations of f, float ``(rows,)``.
        status: :class:`Status` codes, int8 ``(rows,)``.
        size: ``‖f(z) − z‖`` of that iterate, ``(rows,)``.
        first_size: the same of the first iterate where it was finite.
    """

    z: Tensor
    fz: Tensor
    residual: Tensor
    evals: Tensor
    status: Tensor
    size: Tensor
    first_size: Tensor

    def write(self, rows: Tensor, other: FlatSolution) -> None:
        """Put another solution's rows in.

        Args:
            rows: where they belong here, indices.
            other: the rows, in the order of ``rows``.
        """
        for name in FlatSolution.__annotations__:
            getattr(self, name)[rows] = getattr(other, name)


class _Running(_ByRow):
    """The rows still in the loop: iterate, best iterate, flags. All tensors are batch first.

    The best iterate is the one of least residual, until one meets the tolerance.
    """

    def __init__(self, z: Tensor) -> None:
        rows = len(z)
        self.z = z
        self.z_best, self.f_best = z, z
        # the norm of a row in half precision is too coarse to be compared with a tolerance
        half = z.dtype in (torch.float16, torch.bfloat16)
        self.norms = torch.float32 if half else z.dtype
        self.r_best = z.new_full((rows,), torch.inf, dtype=self.norms)
        self.r_first = self.ceiling = self.r_best
        self.abs_tol = torch.zeros_like(self.r_best)
        self.scale = torch.ones_like(self.r_best)
        # half precision cannot count far
        self.evals, self.fails, self.idle = torch.zeros(3, rows, device=z.device).unbind()
        self.floor = 100 * torch.finfo(z.dtype).eps
        self.active = torch.ones(rows, dtype=torch.bool, device=z.device)
        self.converged = ~self.active
        self.grew = ~self.active
        self.nonfinite = ~self.active

    def observe(self, fz: Tensor, solver: Solver) -> Tensor:
        """Take in ``f(z)``, and tell the rows whose step is to be taken back, bool ``(rows,)``."""
        r, norm = safe_norm(fz - self.z, self.norms), safe_norm(fz, self.norms)
        finite = torch.isfinite(r)
        self.evals = self.evals + self.active
        first = torch.isinf(self.r_first) & finite
        if solver.abs_tol is None:  # r + norm is at least as large as z
            self.abs_tol = torch.where(first, _ABSOLUTE * (r + norm).clamp(max=1.0), self.abs_tol)
        limit = solver.tol * norm + (self.abs_tol if solver.abs_tol is None else solver.abs_tol)
        self.r_first = torch.where(first, r, self.r_first)
        eps = torch.finfo(self.z.dtype).eps
        rounding = eps * norm
        ceiling = torch.maximum(max(solver.tol, eps) ** (1 / 3) * r, limit + 2 * rounding)
        self.ceiling = torch.where(first, ceiling, self.ceiling)
        shrunk = torch.maximum(r, rounding) <= self.ceiling
        done = finite & (r <= limit) & shrunk
        better = self.active & finite & (done | (r < self.r_best))
        self.z_best = torch.where(better[:, None], self.z, self.z_best)
        self.f_best = torch.where(better[:, None], fz, self.f_best)
        self.scale = torch.where(better, norm, self.scale)
        self.r_best = torch.where(better, r, self.r_best)
        reject = ~finite | (r > solver.growth * self.r_best)
        self.fails = torch.where(reject, self.fails + 1, 0.0)
        self.idle = torch.where(better, 0.0, self.idle + 1)
        self.nonfinite = torch.where(self.active, ~finite, self.nonfinite)
        self.grew = self.grew | (self.active & finite & (r > 1e3 * self.r_first))
        self.converged = self.converged | (self.active & done)
        hopeless = torch.isinf(self.r_best)  # not finite at its very first evaluation
        if solver.safeguarded:
            hopeless = hopeless | self.stalled
        else:
            hopeless = hopeless | ~finite
            reject = ~finite
        self.active = self.active & ~done & ~hopeless
        return reject

    @property
    def stalled(self) -> Tensor:
        """Rows that nothing improves: every step is taken back, or rounding is all that is left."""
        at_floor = self.r_best <= self.floor * self.scale
        return (self.fails >= _PATIENCE) | (at_floor & (self.idle >= _IDLE))

    def advance(self, z_next: Tensor, reject: Tensor) -> None:
        """Move on. Rejected rows go back to the best iterate and try ever shorter plain steps."""
        step = (0.5**self.fails).clamp(max=1.0)[:, None].to(self.z.dtype)
        plain = self.z_best + step * (self.f_best - self.z_best)
        z_next = torch.where(reject[:, None], plain, z_next)
        self.z = torch.where(self.active[:, None], z_next, self.z)

    def result(self) -> FlatSolution:
        status = torch.full_like(self.evals, Status.MAX_ITER, dtype=torch.int8)
        status.masked_fill_(self.stalled, Status.STALLED)
        status.masked_fill_(self.nonfinite, Status.NONFINITE)
        status.masked_fill_(self.grew & ~self.converged, Status.DIVERGED)
        status.masked_fill_(self.converged, Status.CONVERGED)
        tiny = torch.finfo(self.scale.dtype).tiny
        return FlatSolution(
            self.z_best,
            self.f_best,
            self.r_best / self.scale.clamp(min=tiny),
            self.evals,
            status,
            self.r_best,
            self.r_first,
        )


@torch.no_grad()
def iterate(f: FlatMap, z0: Tensor, solver: Solver) -> FlatSolution:
    """Run a solver on a flat map.

    Args:
        f: the map.
        z0: where to start, ``(rows, n)``.
        solver: what takes the steps.

    Returns:
        Per row the iterate that met the tolerance, or where none did the one of least residual, as
        a :class:`FlatSolution`.
    """
    run = _Running(z0.detach())
    rows = torch.arange(len(z0), device=z0.device)
    out: FlatSolution | None = None
    if not len(z0):
        return run.result()
    state = solver.start(run.z)
    all_done = HostFlag(z0.device)
    compact_below = getattr(f, "compact_below", _COMPACT_BELOW)
    for k in range(solver.max_iter):
        fz = f(run.z)
        reject = run.observe(fz, solver)
        # the best iterate is returned, so after the last evaluation there is no step to take
        if k + 1 == solver.max_iter or all_done(~run.active.any()):
            break
        run.advance(state.advance(run.z, fz, reject, run.z_best, run.f_best), reject)
        if z0.device.type == "cpu" and int(run.active.sum()) < compact_below * len(rows):
            keep = run.active.nonzero().squeeze(1)
            smaller = some_rows(f, keep, run.z)
            if smaller is not None:
                if out is None:
                    out = run.result()
                else:
                    out.write(rows, run.result())
                f, rows = smaller, rows[keep]
                run.restrict(keep)
                state.restrict(keep)
    if out is None:
        return run.result()
    out.write(rows, run.result())
    return out


def solve_fixed_point(f: Callable[[Any], Any], z0: Any, solver: Solver | None = None) -> Solution:
    """Solve ``z = f(z)`` for every row of a batch.

    Args:
        f: maps a state to a state of the same shape, row by row.
        z0: where to start: a tensor ``(rows, ...)`` or a tuple of such tensors.
        solver: :class:`Anderson` (default), :class:`Picard` or :class:`Broyden`.

    Returns:
        A :class:`Solution` with ``z``, ``status`` and ``stats``. ``z`` of a row is the iterate that
        met the tolerance, or where none did the one of least residual. The other fields, ``x``,
        ``costate``, ``value`` and ``output``, are None.

    Raises:
        ValueError: f returns another shape than it was given.
        TypeError: z0 is not a tensor or tuple of floating-point tensors.

    Example:
        >>> solution = solve_fixed_point(torch.cos, torch.zeros(1, 1))
        >>> print(f"cos({solution.z.item():.4f}) = {solution.z.cos().item():.4f}")
        cos(0.7391) = 0.7391

    Not for: gradients. :class:`jiio_plugins.Equilibrium` has them.
    """
    layout = Layout.of(z0)
    flat0 = layout.pack(z0)
    check_floating(flat0, "z0")

    def flat_f(z: Tensor) -> Tensor:
        out = f(layout.unpack(z))
        layout.check(out, len(z), "the output of f")
        return layout.pack(out)

    result = iterate(flat_f, flat0, solver or Anderson())
    stats = Stats(
        f_evals=result.evals,
        vjps=torch.zeros_like(result.evals),
        iterations=result.evals,
        z_residual=result.residual,
    )
    z = layout.unpack(result.z)
    return Solution(None, z, None, None, result.status, stats)
