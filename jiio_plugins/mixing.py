"""Anderson mixing of the whole joint iterate, for smooth problems where v settles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jiio_plugins._state import row_norm

if TYPE_CHECKING:
    from jiio_plugins._problem import Groups


class BlockAnderson:
    """One set of weights per problem over the blocks (z, μ, v), each residual block scaled.

    Each block is divided by its own current norm before the least squares: otherwise the largest
    decides alone. A problem whose summed relative residual grows tenfold over its best forgets its
    history and takes a plain step.
    """

    def __init__(self, memory: int, groups: Groups, ridge: float = 1e-4) -> None:
        self.memory, self.groups, self.ridge = memory, groups, ridge
        self.count = 0
        self.last_t: tuple[Tensor, ...] = ()
        self.last_r: tuple[Tensor, ...] = ()
        self.size: Tensor | None = None

    def __call__(
        self, z: Tensor, rz: Tensor, mu: Tensor, rmu: Tensor, v: Tensor, rv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next ``(z, μ, v)`` from the iterates and their residuals."""
        iterates, residuals = (z, mu, v), (rz, rmu, rv)
        norms = [
            self._problem_norm(r, by_row) for r, by_row in zip(residuals, _BY_ROW, strict=True)
        ]
        scales = [
            self._problem_norm(t, by_row) for t, by_row in zip(iterates, _BY_ROW, strict=True)
        ]
        tiny = torch.finfo(z.dtype).tiny
        self.size = sum(n / s.clamp(min=tiny) for n, s in zip(norms, scales, strict=True))  # type: ignore[assignment]
        assert self.size is not None
        if self.count == 0:
            self.best = self.size
            self.y = [r.new_zeros(len(r), self.memory, r.shape[1]) for r in residuals]
            self.d = [r.new_zeros(len(r), self.memory, r.shape[1]) for r in residuals]
        else:
            restart = ~torch.isfinite(self.size) | (self.size > 10 * self.best)
            slot = (self.count - 1) % self.memory
            for i, by_row in enumerate(_BY_ROW):
                drop = (self.groups.spread(restart) if by_row else restart)[:, None, None]
                self.y[i][:, slot] = residuals[i] - self.last_r[i]
                self.d[i][:, slot] = self.y[i][:, slot] + iterates[i] - self.last_t[i]
                self.y[i].masked_fill_(drop, 0)
                self.d[i].masked_fill_(drop, 0)
            self.best = torch.where(restart, self.size, torch.minimum(self.best, self.size))
        self.last_t, self.last_r = iterates, residuals
        self.count += 1
        if self.count == 1:
            return z + rz, mu + rmu, v + rv
        gamma = self._weights(residuals, norms)
        z_next, mu_next, v_next = (
            self._mixed(i, iterates[i] + residuals[i], gamma) for i in range(3)
        )
        return z_next, mu_next, v_next

    def below(self, tol: float) -> Tensor:
        """Problems whose residual was below ``tol`` at the last call, ``(problems,)``."""
        assert self.size is not None
        return self.size < tol

    def _problem_norm(self, t: Tensor, by_row: bool) -> Tensor:
        size = row_norm(t)
        return self.groups.sum(size.square()).sqrt() if by_row else size

    def _weights(self, residuals: tuple[Tensor, ...], norms: list[Tensor]) -> Tensor:
        """γ, ``(problems, 1, memory)``."""
        gram: Tensor | float = 0.0
        rhs: Tensor | float = 0.0
        for i, by_row in enumerate(_BY_ROW):
            weight = norms[i].double().clamp(min=1e-300).square().reciprocal()[:, None, None]
            part = torch.bmm(self.y[i], self.y[i].transpose(1, 2)).double()
            side = torch.bmm(self.y[i], residuals[i].unsqueeze(2)).double()
            if by_row:
                part, side = self.groups.sum(part), self.groups.sum(side)
            gram, rhs = gram + weight * part, rhs + weight * side
        assert isinstance(gram, Tensor)
        assert isinstance(rhs, Tensor)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        gram = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        gram.diagonal(dim1=1, dim2=2).fill_(1.0 + self.ridge)
        factor, info = torch.linalg.cholesky_ex(gram)
        gamma = torch.cholesky_solve(rhs * scale.unsqueeze(2), factor) * scale.unsqueeze(2)
        ok = (info == 0) & torch.isfinite(gamma).all(1).squeeze(1)
        return torch.where(ok[:, None, None], gamma, 0.0).transpose(1, 2)

    def _mixed(self, i: int, plain: Tensor, gamma: Tensor) -> Tensor:
        weights = self.groups.spread(gamma) if _BY_ROW[i] else gamma
        weights = weights.to(plain.dtype)
        return torch.baddbmm(plain.unsqueeze(1), weights, self.d[i], alpha=-1).squeeze(1)


_BY_ROW = (True, True, False)  # z and μ are per row, v per problem
