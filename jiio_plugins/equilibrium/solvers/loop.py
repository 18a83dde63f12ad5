"""The one loop that runs every solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jiio_plugins.equilibrium.solvers.base import ByRow, FlatMap, Observed, Solver, looks
from jiio_plugins.equilibrium.some_rows import some_rows
from jiio_plugins.equilibrium.state import full_precision, safe_norms, surely_none
from jiio_plugins.solution import Status

_PATIENCE = 10  # steps taken back in a row before a row is given up
_IDLE = 20  # evaluations without a new best, at the dtype's precision, before it is
_ABSOLUTE = 1e-12
_PLAIN = 5  # the most plain steps in a row are 2 to the power of this
_COMPACT_BELOW = 0.75  # share of running rows under which a CPU batch is compacted


class HostFlag:
    """An answer of the device, without making the host wait for an accelerator.

    On a CPU the answer is immediate. On CUDA it is the last that has arrived: it is copied to
    pinned memory in the background, and asked for anew once it is there. Before the first one, and
    where nothing can be asked because the device only records, that is what was known before.

    Args:
        device: where the answer is.
        known: before the first one.
    """

    def __init__(self, device: torch.device, known: bool = False) -> None:
        self._cuda = device.type == "cuda"
        self._pending, self._known = False, known
        if self._cuda:
            self._host = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._event = torch.cuda.Event()

    def __call__(self, answer: Tensor) -> bool:
        """The answer, as far as the host knows it."""
        if not self._cuda:
            return bool(answer)
        if torch.cuda.is_current_stream_capturing():
            return self._known
        if self._pending and self._event.query():
            self._known, self._pending = bool(self._host), False
        if not self._pending:
            self._host.copy_(answer, non_blocking=True)
            self._event.record()
            self._pending = True
        return self._known


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


class _Running(ByRow):
    """The rows still in the loop: iterate, best iterate, flags. All tensors are batch first.

    The best iterate is the one of least residual, until one meets the tolerance.

    Most evaluations are uneventful: every row is better than ever, and none has converged. On a
    CPU, where it costs little to see that, nothing has to be chosen row by row then.
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
        zeros = torch.zeros(5, rows, device=z.device)
        self.evals, self.fails, self.idle, self.fruitless, self.plain = zeros.unbind()
        self.floor = 100 * torch.finfo(z.dtype).eps
        self.active = torch.ones(rows, dtype=torch.bool, device=z.device)
        self.converged = ~self.active
        self.grew = ~self.active
        self.nonfinite = ~self.active
        self.watched = looks(z)
        self.uneventful = False  # the last evaluation was
        self.mixing = True  # surely no row takes plain steps
        self.calm = False  # surely no fails, nothing idle, all finite
        self.all_active = True  # surely
        self.begun = False

    def restrict(self, rows: Tensor) -> None:
        """Keep the rows of these indices only."""
        super().restrict(rows)
        self.all_active = bool(self.active.all())

    def observe(self, fz: Tensor, solver: Solver) -> Observed:
        """Take in ``f(z)``, and tell the rows whose step is to be taken back."""
        residual = fz - self.z
        r, norm = safe_norms(residual, fz, self.norms)
        self.evals = self.evals + self.active
        if not self.begun:
            self._begin(r, norm, solver)
        limit = torch.maximum(solver.tol * norm, self.abs_tol)
        better = r < self.r_best
        self.uneventful = self.watched and self.all_active and bool((better & (r > limit)).all())
        if self.uneventful:
            self.z_best, self.f_best, self.r_best, self.scale = self.z, fz, r, norm
            self._calm_down()
            return Observed(self.z, fz, residual, self.z, fz, None)
        reject = self._sort_out(fz, r, norm, better, r <= limit, solver)
        return Observed(self.z, fz, residual, self.z_best, self.f_best, reject)

    def _begin(self, r: Tensor, norm: Tensor, solver: Solver) -> None:
        """Fix what is measured by the first evaluation. A row that is not finite ends there."""
        if solver.abs_tol is None:  # r + norm is at least as large as z
            self.abs_tol = _ABSOLUTE * (r + norm).clamp(max=1.0)
        else:
            self.abs_tol = torch.full_like(r, solver.abs_tol)
        if solver.reduction:
            share = solver.reduction * torch.where(torch.isfinite(r), r, 0.0)
            self.abs_tol = torch.maximum(self.abs_tol, share)
        eps = torch.finfo(self.z.dtype).eps
        limit = torch.maximum((solver.tol + 2 * eps) * norm, self.abs_tol)
        self.ceiling = torch.maximum(max(solver.tol, eps) ** (1 / 3) * r, limit)
        self.r_first = torch.where(torch.isfinite(r), r, self.r_first)
        self.begun = True

    def _calm_down(self) -> None:
        """No row failed."""
        if not self.mixing:
            self.plain = (self.plain - 1).clamp(min=0)
            self.mixing = surely_none(self.plain > 0)
        if not self.calm:
            self.fails, self.idle = torch.zeros(2, *self.fails.shape, device=self.z.device).unbind()
            self.nonfinite = torch.zeros_like(self.nonfinite)
            self.fruitless = torch.zeros_like(self.fruitless)
            self.calm = True

    def _sort_out(
        self,
        fz: Tensor,
        r: Tensor,
        norm: Tensor,
        better: Tensor,
        within: Tensor,
        solver: Solver,
    ) -> Tensor | None:
        """Judge row by row. The rows to take back, None for surely none."""
        shrunk = torch.maximum(r, torch.finfo(self.z.dtype).eps * norm) <= self.ceiling
        done = within & shrunk
        better = self.active & (done | better)
        self.z_best = torch.where(better[:, None], self.z, self.z_best)
        self.f_best = torch.where(better[:, None], fz, self.f_best)
        self.scale = torch.where(better, norm, self.scale)
        self.r_best = torch.where(better, r, self.r_best)
        self.idle = torch.where(better, 0.0, self.idle + 1)
        finite = torch.isfinite(r)
        taken_back = ~(finite & (r <= solver.growth * self.r_best))
        if solver.safeguarded:
            self._count_fruitless(better, taken_back)
        reject: Tensor | None = taken_back
        if surely_none(taken_back):
            self.fails, self.nonfinite = torch.zeros_like(self.fails), ~finite
            reject = None
        else:
            self.fails = torch.where(taken_back, self.fails + 1, 0.0)
            self.nonfinite = torch.where(self.active, ~finite, self.nonfinite)
            self.grew = self.grew | (self.active & finite & (r > 1e3 * self.r_first))
            if not solver.safeguarded:
                reject = ~finite
        self.calm = False
        self.converged = self.converged | (self.active & done)
        hopeless = self.stalled if solver.safeguarded else ~finite
        # the last: not finite at its very first evaluation
        self.active = self.active & ~done & ~hopeless & ~torch.isinf(self.r_best)
        self.all_active = self.watched and bool(self.active.all())
        return reject

    def _count_fruitless(self, better: Tensor, taken_back: Tensor) -> None:
        """Grant plain steps where mixing fails again and again from the same best iterate.

        There the residual hardly changes from one iterate to the next, and least squares say
        nothing. Plain steps do get away from it. Where they fail themselves, it is mixing's turn.
        """
        self.fruitless = torch.where(better, 0.0, self.fruitless + taken_back)
        more = torch.where(self.fruitless < 2, 0.0, 2.0 ** self.fruitless.clamp(max=_PLAIN))
        more = torch.where(self.plain > 0, 0.0, more)
        self.plain = torch.where(taken_back, more, (self.plain - 1).clamp(min=0))
        self.mixing = surely_none(self.plain > 0)

    @property
    def stalled(self) -> Tensor:
        """Rows that nothing improves: every step is taken back, or rounding is all that is left."""
        at_floor = self.r_best <= self.floor * self.scale
        return (self.fails >= _PATIENCE) | (at_floor & (self.idle >= _IDLE))

    def advance(self, z_next: Tensor, at: Observed) -> None:
        """Move on. Rejected rows go back to the best iterate and try ever shorter plain steps."""
        reject = at.reject
        if not self.mixing:
            z_next = torch.where((self.plain > 0)[:, None], at.fz, z_next)
        if reject is not None:
            step = (0.5**self.fails).clamp(max=1.0)[:, None].to(self.z.dtype)
            plain = self.z_best + step * (self.f_best - self.z_best)
            z_next = torch.where(reject[:, None], plain, z_next)
        self.z = z_next if self.all_active else torch.where(self.active[:, None], z_next, self.z)

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
        at = run.observe(f(run.z), solver)
        # the best iterate is returned, so after the last evaluation there is no step to take
        if k + 1 == solver.max_iter or (not run.uneventful and all_done(~run.active.any())):
            break
        with full_precision(z0.device.type):  # products of iterates, not of layers
            z_next = state.advance(at)
        run.advance(z_next, at)
        if not run.watched or run.all_active:
            continue
        if int(run.active.sum()) < compact_below * len(rows):
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
