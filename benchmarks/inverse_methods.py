"""The problems of ``inverse_problems.py``, and who solves them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import deepinv as dinv
import torch
from adam import NestedAdam
from torch import Tensor, nn
from tqdm import tqdm

from jiio_deepinv import GaussianEncoder, JIIOReconstructor
from jiio_deepinv.losses import contraction
from jiio_plugins import Anderson, Implicit, Joint
from jiio_plugins.generative import psnr
from jiio_plugins.models import MDEQRefiner
from jiio_plugins.utils import TrainingState, set_random_states

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deepinv.physics import Physics

    from jiio_plugins.models import MDEQDecoder

SHAPE = (1, 28, 28)
WIDTHS = (22, 44, 88)  # of U-Nets of about 245,000 parameters


@dataclass(frozen=True)
class Task:
    """A problem; ``back`` is how networks are given y as an image."""

    name: str
    make: Callable[[], Physics]
    back: str = "adjoint"

    def physics(self) -> Physics:
        """The same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make()

    def measure(self, x: Tensor, seed: int) -> tuple[Tensor, Physics]:
        """y of images with noise that the seed draws."""
        physics = self.physics()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return physics(x), physics


def _noise(sigma: float) -> Any:
    return dinv.physics.GaussianNoise(sigma)


def _inpainting(mask: Any) -> Physics:
    physics: Physics = dinv.physics.Inpainting(SHAPE, mask=mask, noise_model=_noise(0.05))
    return physics


def _box() -> Tensor:
    mask = torch.ones(SHAPE)
    mask[:, 9:19, 9:19] = 0
    return mask


TASKS = [
    Task("denoise 0.2", lambda: dinv.physics.Denoising(_noise(0.2))),
    Task("denoise 0.4", lambda: dinv.physics.Denoising(_noise(0.4))),
    Task("box", lambda: _inpainting(_box())),
    Task("inpaint 50 %", lambda: _inpainting(0.5)),
    Task(
        "sensing 25 %",
        lambda: dinv.physics.CompressedSensing(m=196, img_size=SHAPE, noise_model=_noise(0.05)),
        "pinv",
    ),
]


@dataclass
class Found:
    """Images, and what they took: f evaluations and VJPs an image, where there is a DEQ."""

    images: Tensor
    f_evals: float = 0.0
    vjps: float = 0.0


def quality(solve: Callable[[Tensor, Physics], Found], task: Task, images: Tensor) -> float:
    """Mean PSNR on images with the validation noise."""
    y, physics = task.measure(images, seed=1)
    return float(psnr(solve(y, physics).images.clamp(0, 1), images).mean())


def best(
    settings: dict[str, Callable[[Tensor, Physics], Found]], task: Task, images: Tensor
) -> tuple[str, Callable[[Tensor, Physics], Found]]:
    """The setting with the best PSNR on validation images, and its name."""
    found = {name: quality(solve, task, images) for name, solve in settings.items()}
    name = max(found, key=found.__getitem__)
    return name, settings[name]


# Untrained ------------------------------------------------------------------------------------


def variational(prior: Any, weight: float, iterations: int = 200) -> Any:
    """deepinv's FISTA on ``‖Ax − y‖²/2 + weight · prior(x)``."""

    def solve(y: Tensor, physics: Physics) -> Found:
        with torch.no_grad():
            norm = float(physics.compute_sqnorm(torch.rand(1, *SHAPE), verbose=False))
            model = dinv.optim.FISTA(
                data_fidelity=dinv.optim.L2(),
                prior=prior,
                lambda_reg=weight,
                stepsize=0.95 / norm,
                max_iter=iterations,
                early_stop=True,
                thres_conv=1e-5,
            )
            return Found(model(y, physics))

    return solve


def tv(task: Task, validation: Tensor) -> tuple[str, Any]:
    """Total variation, its weight tuned."""
    prior = dinv.optim.TVPrior(n_it_max=50)
    grid = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    return best({f"weight {b:g}": variational(prior, b) for b in grid}, task, validation)


def wavelet(task: Task, validation: Tensor) -> tuple[str, Any]:
    """ℓ1 of Daubechies wavelets, the weight tuned (deepinv's prox takes a tenth of it)."""
    prior = dinv.optim.WaveletPrior(level=3, wv="db8")
    grid = (0.1, 0.3, 0.6, 1.2, 2.4, 4.8, 9.6)
    return best({f"weight {b:g}": variational(prior, b) for b in grid}, task, validation)


def deep_image_prior(iterations: int) -> Any:
    """deepinv's, an image at a time: it takes no batch."""

    def solve(y: Tensor, physics: Physics) -> Found:
        torch.manual_seed(0)
        images = []
        for one in y.split(1):
            network = dinv.models.ConvDecoder(img_size=SHAPE, in_size=(4, 4), layers=4, channels=64)
            model = dinv.models.DeepImagePrior(network, img_size=(64, 4, 4), iterations=iterations)
            images.append(model(one, physics).detach())
        return Found(torch.cat(images))

    return solve


def dip(task: Task, validation: Tensor) -> tuple[str, Any]:
    """The deep image prior, stopped where it is best on four validation images."""
    grid = (100, 200, 400, 800)
    return best({f"{n} steps": deep_image_prior(n) for n in grid}, task, validation[:4])


# On a generator -------------------------------------------------------------------------------


def latent(generator: MDEQDecoder, penalty: float, method: Any) -> Any:
    """A reconstruction over the generator's latents, by whatever method."""

    def solve(y: Tensor, physics: Physics) -> Found:
        model = JIIOReconstructor(generator, latent_penalty=penalty, method=method)
        with torch.no_grad():
            images = model(y, physics)
        assert model.solution is not None
        stats = model.solution.stats
        return Found(images, float(stats.f_evals.mean()), float(stats.vjps.mean()))

    return solve


def joint(iterations: int) -> Joint:
    """The reconstructor's default with other iterations."""
    return Joint(max_iter=iterations, step_size=1.0, tol=1e-4)


@dataclass(frozen=True)
class Choice:
    """A generator and its latent penalty, which all methods on it share."""

    name: str
    generator: MDEQDecoder
    penalty: float

    def __str__(self) -> str:
        return f"{self.name}, λ {self.penalty:g}"


def choose(generators: dict[str, MDEQDecoder], task: Task, validation: Tensor) -> Choice:
    """The one with which JIIO is best on validation images."""
    grid = (0.03, 0.1, 0.3, 1.0, 3.0)
    choices = {
        str(choice): choice
        for name, generator in generators.items()
        for choice in (Choice(name, generator, penalty) for penalty in grid)
    }
    solves = {name: latent(c.generator, c.penalty, joint(60)) for name, c in choices.items()}
    return choices[best(solves, task, validation)[0]]


def adam(steps: int, rate: float, cap: int | None) -> NestedAdam:
    """Adam on latents with full solves (cap None, relative tolerance 1e-3) or warm-started ones."""
    if cap is None:
        return NestedAdam(solver=Anderson(max_iter=60, tol=1e-3), max_iter=steps, step_size=rate)
    solver = Anderson(max_iter=cap, tol=1e-2)
    return NestedAdam(solver=solver, warm_start=True, max_iter=steps, step_size=rate)


# Trained --------------------------------------------------------------------------------------


def unet(widths: tuple[int, ...] = WIDTHS, **settings: bool) -> nn.Module:
    """deepinv's, with three scales."""
    network: nn.Module = dinv.models.UNet(
        1, 1, scales=3, channels_per_scale=list(widths), **settings
    )
    return network


@dataclass
class Stage:
    """From which share of the time on, what is trained, and on how many images a step."""

    begin: float
    run: Callable[[Tensor, Physics], Tensor]
    batch: int = 64
    penalised: bool = False


@dataclass
class Learner:
    """A network, how it is trained, and how it is used."""

    model: nn.Module
    stages: list[Stage] = field(default_factory=list)
    regularise: Callable[[Tensor, Physics], Tensor] | None = None
    parts: dict[str, Callable[[Tensor, Physics], Tensor]] = field(default_factory=dict)
    """what its parts make by themselves, to see what the whole adds"""

    def __post_init__(self) -> None:
        # convolutions of a processor are a third faster so, and minutes are what is given
        self.model.to(memory_format=torch.channels_last)

    def solve(self, y: Tensor, physics: Physics) -> Found:
        """In eval mode."""
        self.model.eval()
        with torch.no_grad():
            images = self.model(y, physics)
        stats = getattr(getattr(self.model, "solution", None), "stats", None)
        if stats is None:
            return Found(images)
        return Found(images, float(stats.f_evals.mean()), float(stats.vjps.mean()))


def artifact_removal(task: Task, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """A U-Net on Aᵀy, or A⁺y."""
    model: nn.Module = dinv.models.ArtifactRemoval(unet(widths), mode=task.back)
    return model


def plain_unet(task: Task) -> Learner:
    """It by itself."""
    model = artifact_removal(task)
    return Learner(model, [Stage(0.0, model)])


def unfolded_pgd(task: Task, iterations: int, widths: tuple[int, ...]) -> nn.Module:
    """deepinv's proximal gradient unfolded, a U-Net an iteration, step sizes learned."""
    norm = float(task.physics().compute_sqnorm(torch.rand(1, *SHAPE), verbose=False))
    priors = [dinv.optim.PnP(denoiser=unet(widths)) for _ in range(iterations)]
    model: nn.Module = dinv.optim.PGD(
        unfold=True,
        stepsize=[1 / norm] * iterations,
        g_param=[0.1] * iterations,
        lambda_reg=[1.0] * iterations,
        max_iter=iterations,
        trainable_params=["stepsize", "g_param"],
        data_fidelity=dinv.optim.L2(),
        prior=priors,
    )
    return model


def unfolded(task: Task) -> Learner:
    """Five iterations of it."""
    model = unfolded_pgd(task, 5, (10, 20, 40))
    return Learner(model, [Stage(0.0, model)])


def deq_pgd(task: Task) -> Learner:
    """Proximal gradient to its fixed point, one U-Net, as deepinv has it.

    On validation images of the box it is worse with implicit instead of Jacobian-free gradients,
    and with a U-Net that adds its input to its output.
    """
    norm = float(task.physics().compute_sqnorm(torch.rand(1, *SHAPE), verbose=False))
    model = dinv.optim.PGD(
        DEQ=dinv.optim.DEQConfig(jacobian_free=True),
        stepsize=[1 / norm],
        g_param=[0.1],
        lambda_reg=[1.0],
        max_iter=15,
        anderson_acceleration=True,
        trainable_params=["stepsize", "g_param"],
        data_fidelity=dinv.optim.L2(),
        prior=[dinv.optim.PnP(denoiser=unet(batch_norm=False, residual=False))],
    )
    return Learner(model, [Stage(0.0, model, batch=32)])


def end_to_end(guess: Callable[[Task], nn.Module], task: Task, *, largest: float = 0.25) -> Learner:
    """JIIO around an encoder's guess: first the guess, then with the generator, then jointly.

    How far off the guess may be is learned in the last stage, from a constant; λ is 1. Above 0.25
    eight iterations would end early, and the loose gradient could let it stay there.
    """
    generator = MDEQRefiner(
        SHAPE,
        solver=Anderson(max_iter=20, tol=1e-3),
        adjoint=Implicit(solver=Anderson(max_iter=15, tol=1e-2)),
    )
    encoder = guess(task)
    spread = dinv.models.UNet(2, 1, scales=3, channels_per_scale=[8, 16, 32], residual=False)
    model = JIIOReconstructor(
        generator,
        encoder=GaussianEncoder(encoder, spread, mode=task.back, largest=largest),
        latent_penalty=1.0,
        method=Joint(max_iter=8, step_size=1.0, tol=1e-3),
        implicit=Anderson(max_iter=8, memory=8, tol=0.1),
    )

    def regularise(y: Tensor, physics: Physics) -> Tensor:
        with torch.no_grad():
            w = encoder(y, physics)
        return 0.05 * contraction(generator, w)

    def corrected(y: Tensor, physics: Physics) -> Tensor:
        images: Tensor = generator(encoder(y, physics))
        return images

    stages = [
        Stage(0.0, encoder),
        Stage(0.55, corrected, penalised=True),
        Stage(0.62, model, batch=32, penalised=True),
    ]
    return Learner(model, stages, regularise, {"guess": encoder, "G of it": corrected})


_around_unet = partial(end_to_end, partial(artifact_removal, widths=(20, 40, 80)))
_around_unfolded = partial(end_to_end, partial(unfolded_pgd, iterations=4, widths=(10, 20, 40)))
LEARNERS: dict[str, Callable[[Task], Learner]] = {
    "U-Net": plain_unet,
    "unfolded PGD": unfolded,
    "DEQ-PGD": deq_pgd,
    "JIIO, end to end": _around_unet,
    "JIIO, unfolded": _around_unfolded,
}
VARIANTS: dict[str, Callable[[Task], Learner]] = {  # trained where --methods names them
    "JIIO, end to end, largest 1": partial(_around_unet, largest=1.0),
    "JIIO, unfolded, largest 1": partial(_around_unfolded, largest=1.0),
}


def train(
    learner: Learner,
    task: Task,
    images: Tensor,
    validation: Tensor,
    minutes: float,
    path: Path,
    name: str,
) -> list[tuple[float, float]]:
    """Least squares for so many CPU minutes; ``(seconds, validation PSNR)`` along the way.

    AdamW at 2e-3 with a warm-up and a cosine over the time. It goes on from its checkpoint.
    """
    model, physics, total = learner.model, task.physics(), minutes * 60
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    settings = {"task": task.name, "learner": name, "minutes": minutes}
    state = TrainingState(model, optimizer, None, settings)
    spent, step, curve = 0.0, 0, []
    torch.manual_seed(0)
    if path.exists():
        progress, random = state.load(path)
        set_random_states(random)
        spent, step, curve = progress["spent"], progress["step"], progress["curve"]
    saved = time.process_time()
    bar = tqdm(total=round(total), initial=round(spent), desc=f"{task.name}, {name}", unit="s")
    while spent < total:
        begin = time.process_time()
        share = spent / total
        stage = next(s for s in reversed(learner.stages) if share >= s.begin)
        x = images[torch.randint(len(images), (stage.batch,))]
        y = physics(x)
        for group in optimizer.param_groups:
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * cosine
        model.train()
        loss = (stage.run(y, physics) - x).square().mean()
        if stage.penalised and learner.regularise is not None and step % 4 == 0:
            loss = loss + learner.regularise(y, physics)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent += time.process_time() - begin
        bar.n = round(min(spent, total))
        if time.process_time() - saved > 30 or spent >= total:
            value = quality(partial(evaluated, learner, stage), task, validation)
            curve.append((spent, value))
            bar.set_postfix_str(f"{value:.2f} dB on validation images")
            state.save(path, {"spent": spent, "step": step, "curve": curve})
            saved = time.process_time()
    bar.close()
    return curve


def evaluated(learner: Learner, stage: Stage, y: Tensor, physics: Physics) -> Found:
    """What the stage that is being trained makes, in eval mode."""
    learner.model.eval()
    with torch.no_grad():
        return Found(stage.run(y, physics))
