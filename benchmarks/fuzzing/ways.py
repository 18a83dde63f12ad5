"""What is called: the engine's functions, and the adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jiio_plugins import (
    Anderson,
    Solution,
    attack,
    envelope_loss,
    joint_solution,
    optimize_input,
)

from .calls import nll
from .models import D

if TYPE_CHECKING:
    from collections.abc import Callable

    from .calls import Call
    from .models import Model


@dataclass
class Found:
    """What a call found.

    Attributes:
        x: the optimised input, image or context.
        solution: the engine's, where there is one.
        gradient: of a parameter, where one was asked for.
    """

    x: Any
    solution: Solution | None = None
    gradient: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that must be the same the next time."""
        x = list(self.x.values()) if isinstance(self.x, dict) else [self.x]
        return x if self.gradient is None else [*x, self.gradient]


def optimize(call: Call, **further: Any) -> Found:
    """``optimize_input`` with what was drawn."""
    solution = optimize_input(
        call.model,
        call.x,
        call.options.get("objective", call.objective),
        given=call.given,
        constraint=call.constraint(),
        method=call.method,
        **{**further, **call.further("objective", "constraint")},
    )
    return Found(solution.x, solution)


def attacked(call: Call) -> Found:
    """``attack``."""
    lower, upper = call.box or (None, None)
    solution = attack(
        call.model,
        call.x,
        call.labels,
        norm=call.norm,
        eps=call.eps,
        lower=lower,
        upper=upper,
        mask=call.mask,
        loss=call.loss,  # type: ignore[arg-type]
        targeted=call.targeted,
        method=call.method,
        **call.options,
    )
    return Found(solution.x, solution)


def parameters(call: Call) -> Found:
    """``optimize_input`` of a parameter, one for all rows or one for each group."""
    return optimize(call, **{"variables": ["context"], "groups": call.groups, **call.options})


def gradient(call: Call) -> Found:
    """``optimize_input(differentiable=True)``, and the gradient of Σ x in the encoder's bias."""
    found = optimize(call, **{"differentiable": True, **call.options})
    slope = torch.autograd.grad(found.x.sum(), call.model.encoder.bias)[0]
    return Found(found.x.detach(), found.solution, slope)


def training(call: Call) -> Found:
    """``joint_solution`` and the gradient of ``envelope_loss`` in the encoder's bias."""
    found = joint_solution(
        call.model,
        call.x,
        call.options.get("objective", call.objective),
        constraint=call.constraint(),
        method=call.method,
        **call.further("objective", "constraint", "refine"),
    )
    refine = call.options.get("refine", Anderson(max_iter=300, tol=1e-10))
    loss = envelope_loss(call.model, found, call.objective, refine=refine)
    slope = torch.autograd.grad(loss, call.model.encoder.bias)[0]
    return Found(found.x, None, slope)


def with_torchattacks(call: Call) -> Found:
    """``jiio_torchattacks.JIIO``."""
    from jiio_torchattacks import JIIO

    norm = "L2" if call.norm == 2 else "Linf"
    settings: dict[str, Any] = {"norm": norm, "eps": call.eps, "method": call.method}
    atk = JIIO(call.model, **{**settings, "loss": call.loss, **call.options})
    if call.targeted:
        atk.set_mode_targeted_by_label(quiet=True)
    return Found(atk(call.x, call.labels), atk.solution)


def with_art(call: Call) -> Found:
    """``jiio_art.JIIOAttack``."""
    from art.estimators.classification import PyTorchClassifier

    from jiio_art import JIIOAttack

    classifier = PyTorchClassifier(
        call.model,
        nn.CrossEntropyLoss(),
        tuple(call.x.shape[1:]) if isinstance(call.x, Tensor) else (1, 2, 2),
        call.model.head.out_features,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    settings: dict[str, Any] = {"norm": call.norm, "eps": call.eps, "method": call.method}
    settings.update(loss=call.loss, targeted=call.targeted, verbose=False)
    x, y = (t.numpy() if isinstance(t, Tensor) else t for t in (call.x, call.labels))
    found = JIIOAttack(classifier, **{**settings, **call.options}).generate(x, y)
    return Found(torch.from_numpy(found))


class Generator(nn.Module):
    """A model of images ``(rows, 1, 2, 2)`` in latents ``(rows, 4)``."""

    latent_shape = (D,)

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, w: Tensor) -> Tensor:
        return self.model(w).unflatten(1, (1, 2, 2))


SIGMA = 0.1


def measured(call: Call) -> tuple[Any, Any]:
    """What was measured, and the physics."""
    from deepinv.physics import Denoising, GaussianNoise, Inpainting

    noise, mask = GaussianNoise(SIGMA), call.options["mask"]
    if mask is None:
        physics: Any = Denoising(noise)
    else:
        keep = torch.full((1, 2, 2), mask).round() if mask != 0.5 else torch.eye(2)[None]
        physics = Inpainting((1, 2, 2), mask=keep.to(call.x.dtype), noise_model=noise)
    with torch.no_grad():
        zero = Generator(call.model).eval()(torch.zeros(len(call.x), D, dtype=call.x.dtype))
    image = {"image": call.x, "fitted": zero.detach(), "dark": 0 * call.x}[call.options["y"]]
    return physics.A(image + call.options["noise"] * (call.options["y"] == "image")), physics


def with_deepinv(call: Call) -> Found:
    """``jiio_deepinv.JIIOReconstructor``. x are the latents."""
    from jiio_deepinv import JIIOReconstructor

    training = call.model.training
    y, physics = measured(call)
    call.model.train(training)
    y, physics = (call.options.get(k, v) for k, v in (("measurement", y), ("physics", physics)))
    reconstructor = JIIOReconstructor(Generator(call.model), **call.options["settings"])
    with torch.no_grad():
        reconstructor(y, physics)
    return Found(reconstructor.latents, reconstructor.solution)


def with_learn2learn(call: Call) -> Found:
    """``jiio_learn2learn.JIIOLearner``: a context, and its meta-gradient in the encoder's bias."""
    from jiio_learn2learn import JIIOLearner

    loss = call.options.get("objective", lambda output: nll(output, call.labels).mean())
    clone = JIIOLearner(call.model, **call.further("objective")).clone()
    clone.adapt(loss(clone(call.x)))
    slope = torch.autograd.grad(
        nll(clone(call.x.flip(0)), call.labels).mean(), call.model.encoder.bias
    )[0]
    return Found(clone.module.context.detach(), None, slope)


WAYS: dict[str, Callable[[Call], Found]] = {
    "optimize": optimize,
    "attack": attacked,
    "parameters": parameters,
    "gradient": gradient,
    "training": training,
    "torchattacks": with_torchattacks,
    "art": with_art,
    "deepinv": with_deepinv,
    "learn2learn": with_learn2learn,
}
