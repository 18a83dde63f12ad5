"""What deepinv plots of a convergence: ``metrics[name][sample][iteration]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor

if TYPE_CHECKING:
    from jiio_deepinv._objective import Objective
    from jiio_plugins.methods import Callback, Progress


class Metrics:
    """Collects "residual" ``‖x_{k+1} − x_k‖ / ‖x_{k+1}‖``, "cost" and, given x_gt, "psnr".

    The entries of an iteration are of the image at its unconverged state. The last entry is the
    returned image's. An iterate that is taken back is there too.

    Args:
        x_gt: true images ``(rows, c, h, w)``, or None.
    """

    def __init__(self, x_gt: Tensor | None) -> None:
        self.x_gt, self.psnr_of = x_gt, PSNR()
        self.last: Tensor | None = None
        self.residual: list[Tensor] = []
        self.psnr: list[Tensor] = []
        self.cost: list[Tensor] = []

    def watch(self, objective: Objective) -> Callback:
        """What takes in each iteration of the minimisation of ``objective``."""

        def see(progress: Progress) -> None:
            assert objective.image is not None
            self.cost.append(progress.loss * objective.scale)
            self._image(objective.image)

        return see

    def _image(self, image: Tensor) -> None:
        if self.x_gt is not None:
            self.psnr.append(self.psnr_of(image, self.x_gt).reshape(-1))
        if self.last is not None:
            change = torch.linalg.vector_norm((image - self.last).flatten(1), dim=1)
            size = torch.linalg.vector_norm(image.flatten(1), dim=1)
            self.residual.append(change / (size + 1e-6))
        self.last = image

    def finish(self, image: Tensor) -> dict[str, list[list[float]]]:
        """``metrics[name][sample][iteration]``, once ``image`` is returned."""
        self._image(image)
        named = {"psnr": self.psnr, "cost": self.cost, "residual": self.residual}
        return {
            name: torch.stack(values, dim=1).tolist() if values else [[] for _ in range(len(image))]
            for name, values in named.items()
        }
