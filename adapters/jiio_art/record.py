"""What one ``JIIOAttack.generate`` call found and what it cost, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jiio_plugins import Solution, is_adversarial
from jiio_plugins.solution import report_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor


@dataclass(frozen=True)
class AttackRecord:
    """One entry per sample, in the order of the images. All are NumPy arrays ``(rows,)``.

    Attributes:
        success: adversarial by ``model(x)`` itself and by an independent tight solve. With
            ``verify=False``, when nobody has looked, False.
        value: the minimised objective by the tight solve: minus the loss, or with ``targeted`` the
            loss of the target. With ``verify=False`` NaN.
        model_value: the same by ``model(x)`` with the solver the model carries.
        status: :class:`jiio_plugins.Status` codes, which :meth:`report` reads out.
        f_evals: evaluations of the cell f, all restarts together. The final verification, which
            every method shares, is not in it.
        vjps: vector-Jacobian products, all restarts together.
        iterations: iterations of the loop, all restarts together.
        verification_f_evals: evaluations of f in the final verification.
        verification_vjps: VJPs there.
        model_f_evals: those of them that ``model(x)`` itself takes. With ``verify=False`` NaN.
        z_residual: ``‖f(z) − z‖ / ‖f(z)‖`` of the verified state.
        costate_residual: the same of the adjoint equation where the loop ended.
    """

    success: npt.NDArray[np.bool_]
    value: npt.NDArray[np.float32]
    model_value: npt.NDArray[np.float32]
    status: npt.NDArray[np.int8]
    f_evals: npt.NDArray[np.float32]
    vjps: npt.NDArray[np.float32]
    iterations: npt.NDArray[np.float32]
    verification_f_evals: npt.NDArray[np.float32]
    verification_vjps: npt.NDArray[np.float32]
    model_f_evals: npt.NDArray[np.float32]
    z_residual: npt.NDArray[np.float32]
    costate_residual: npt.NDArray[np.float32]

    @classmethod
    def of(cls, solution: Solution, labels: Tensor, targeted: bool) -> AttackRecord:
        """The record of one batch. The states z and μ are left behind.

        Args:
            solution: of :func:`jiio_plugins.attack`.
            labels: true classes ``(rows,)``, or with ``targeted`` the wanted ones.
            targeted: whether the attack was.
        """

        def read(name: str) -> npt.NDArray[Any]:
            source = solution if name in ("value", "status") else solution.stats
            entry: Tensor | None = getattr(source, name)
            if entry is None:
                return np.full(len(solution.status), np.nan, dtype=np.float32)
            entry = entry.detach().cpu()
            array: npt.NDArray[Any] = (
                entry.float() if entry.is_floating_point() else entry
            ).numpy()
            return array

        judged = solution.output is not None
        success = is_adversarial(solution, labels, targeted) if judged else labels != labels
        known = success.cpu().numpy()
        return cls(known, **{f.name: read(f.name) for f in fields(cls) if f.name != "success"})

    @classmethod
    def join(cls, records: Sequence[AttackRecord]) -> AttackRecord:
        """The batches one after the other. No batches give an empty record."""
        empty: dict[str, type] = {"success": bool, "status": np.int8}
        return cls(
            **{
                f.name: np.concatenate([getattr(record, f.name) for record in records])
                if records
                else np.zeros(0, dtype=empty.get(f.name, np.float32))
                for f in fields(cls)
            }
        )

    def report(self) -> str:
        """Count of each status with its message, one line each, how the adjoints ended, the price.

        The price is told in f evaluations and VJPs, and in calls of the model.
        """
        return report_of(torch.from_numpy(self.status), self)
