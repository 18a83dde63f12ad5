"""A loss for deepinv's trainer that keeps a generator's cell easy to solve."""

from __future__ import annotations

from typing import Any

import torch
from deepinv.loss import Loss
from torch import Tensor, nn

from jiio_deepinv.reconstructor import JIIOReconstructor
from jiio_plugins.joint import PenaltyMode, SolveMode, guarded, layer_mode


def contraction(generator: nn.Module, w: Tensor) -> Tensor:
    """``‖J_z‖²_F / n`` of the generator's cells where their states settle, a differentiable scalar.

    Args:
        generator: a module with an equilibrium layer.
        w: latents, ``(rows, *latent_shape)``.
    """
    solve = SolveMode()
    with guarded(generator, freeze=False):
        with torch.no_grad(), layer_mode(solve):
            generator(w)
        penalty = PenaltyMode([z.detach() for z in solve.z], probes=1, generator=None)
        with torch.enable_grad(), layer_mode(penalty):
            generator(w)
    return penalty.value


class JacobianLoss(Loss):
    """``weight · ‖J_z‖²_F / n`` of the generator's cells, at the latents that were just found.

    It goes beside another loss in ``dinv.Trainer(losses=[...])``. Without it a cell can stop to
    contract while it learns. :attr:`jiio_plugins.Status.NOT_VERIFIED` and warnings of large
    residuals say so. It takes one probe of Hutchinson's estimate, see
    :func:`jiio_plugins.jacobian_penalty`.

    Args:
        weight: against the other losses.

    Raises:
        TypeError: the model that is trained is no :class:`JIIOReconstructor`.
        RuntimeError: it has not been called yet.

    Source: Bai, Koltun and Kolter (ICML 2021), eq. 8.
    """

    def __init__(self, weight: float = 0.05) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, x_net: Any, x: Any, y: Any, physics: Any, model: Any, **kwargs: Any
    ) -> Tensor:
        """The penalty, a scalar with a graph.

        Args:
            x_net: the reconstruction, not used.
            x: the true images, not used.
            y: the measurements, not used.
            physics: not used.
            model: the reconstructor, or what wraps it. Its last latents count.
            **kwargs: what else deepinv passes, not used.

        Raises:
            TypeError: the model is no :class:`JIIOReconstructor`.
            RuntimeError: it has not been called yet.
        """
        # what wraps it: a loss that adapts models, DistributedDataParallel
        while not isinstance(model, JIIOReconstructor):
            inner = getattr(model, "model", getattr(model, "module", None))
            if inner is None or isinstance(model, nn.DataParallel):
                break
            model = inner
        if not isinstance(model, JIIOReconstructor):
            raise TypeError(
                f"JacobianLoss is for a JIIOReconstructor, got {type(model).__name__}"
                + "; DataParallel's copies keep their latents to themselves, "
                "DistributedDataParallel does not" * isinstance(model, nn.DataParallel)
            )
        w = model.latents
        if w is None:
            raise RuntimeError("JacobianLoss comes after the model's forward, which was not called")
        return self.weight * contraction(model.generator, w)
