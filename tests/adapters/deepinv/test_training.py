"""deepinv's own trainer and loss tests with this reconstructor in the place of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import deepinv as dinv
import matplotlib as mpl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from jiio_deepinv import JacobianLoss, JIIOReconstructor
from jiio_plugins import Anderson
from jiio_plugins.models import MDEQRefiner
from tests.adapters.deepinv.toys import Generator
from tests.adapters.deepinv.upstream import upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# deepinv's trainer says so on every CPU
pytestmark = [
    pytest.mark.filterwarnings("ignore:non_blocking_transfers=True can only be used"),
    pytest.mark.filterwarnings("ignore:More than 20 figures have been opened"),
    pytest.mark.filterwarnings("ignore:Mask generator not defined"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
    # ours: an untrained generator, 15 iterations and float32
    pytest.mark.filterwarnings("ignore:the joint solution has a relative residual"),
    pytest.mark.filterwarnings("ignore:the equation for the implicit gradient was solved"),
]

loss_tests = upstream("test_loss")

SHAPE = (3, 15, 10)  # deepinv's


def small(shape: tuple[int, ...] = SHAPE, **kwargs: Any) -> JIIOReconstructor:
    generator = Generator(shape, dtype=torch.float32, solver=Anderson(tol=1e-5)).float()
    return JIIOReconstructor(generator, **{"iters": 15, "latent_penalty": 30.0, **kwargs})


@pytest.fixture(autouse=True)
def _headless() -> Iterator[None]:
    torch.manual_seed(0)
    with mpl.rc_context({"backend": "agg"}):
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images instead of fifty."""
    circles = loss_tests.DummyCircles
    monkeypatch.setattr(loss_tests, "DummyCircles", lambda samples, imsize: circles(2, imsize))


# What is left out, and why: docs/how-to/deepinv.md
@pytest.mark.parametrize(
    "name",
    [
        "mcei",
        "mcei-scale",
        "splittv",
        "score",
        "sup",
        "r2r",
        "ensure",
        "ensure_mri",
        "reducedresolution_manual_physics",
        pytest.param("es", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("few")
def test_losses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, *SHAPE[1:]) if name == "ensure_mri" else SHAPE
    model = small(shape, iters=3 if name == "es" else 15)  # "es" calls it ten times a step
    monkeypatch.setattr(dinv.models, "ArtifactRemoval", lambda backbone, device: model)
    physics = dinv.physics.Inpainting(img_size=SHAPE, mask=0.5)
    dataset = loss_tests._dataset(physics, tmp_path, SHAPE, "cpu")
    rng = torch.Generator().manual_seed(0)
    loss_tests.test_losses(None, name, tmp_path, dataset, physics, SHAPE, "cpu", rng)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """For images of the size at which these tests see little chance."""
    monkeypatch.setattr(dinv.models, "ArtifactRemoval", lambda backbone: small((3, 256, 256)))


# what estimates an unknown noise level needs second derivatives
@pytest.mark.parametrize("noise", [n for n in loss_tests.LIST_SURE if "Unknown" not in n])
@pytest.mark.usefixtures("large")
def test_sure(noise: str) -> None:
    with torch.no_grad():
        loss_tests.test_sure(noise, "cpu")


# Poisson counts near 1 scatter by more than the small error of this generator
@pytest.mark.parametrize("noise", [n for n in loss_tests.LIST_R2R if n != "Poisson"])
@pytest.mark.usefixtures("large")
def test_r2r(noise: str) -> None:
    with torch.no_grad():
        loss_tests.test_r2r(noise, "cpu")


def test_stacked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinv.models, "ArtifactRemoval", lambda backbone: small())
    loss_tests.test_stacked_loss("cpu", SHAPE)


LOSSES = {
    "supervised": dinv.loss.SupLoss(),
    "MC": dinv.loss.MCLoss(),
    "EI": dinv.loss.EILoss(dinv.transform.Shift()),
    "SURE": dinv.loss.SureGaussianLoss(0.1),
    "R2R": dinv.loss.R2RLoss(noise_model=dinv.physics.GaussianNoise(0.1)),
    "splitting": dinv.loss.SplittingLoss(split_ratio=0.8, eval_split_input=False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reaches_the_generator(name: str) -> None:
    shape = (1, 6, 6)
    physics = dinv.physics.Inpainting(shape, mask=0.9, noise_model=dinv.physics.GaussianNoise(0.1))
    x = Generator(shape, dtype=torch.float32)(torch.randn(2, 3).double()).detach()
    y, loss = physics(x), LOSSES[name]
    model = small(shape)
    adapted = loss.adapt_model(model)
    adapted.train()
    x_net = adapted(y, physics, update_parameters=True)
    value = loss(x=x, x_net=x_net, y=y, physics=physics, model=adapted).mean()
    value.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    assert any(float(g.abs().max()) > 1e-7 for g in gradients)


def test_the_trainer_plots_convergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # while it trains, deepinv plots into a folder called None
    shape = (1, 6, 6)
    images = Generator(shape, dtype=torch.float32, seed=5)(torch.randn(4, 3).double()).detach()
    loader = DataLoader([{"x": x} for x in images], batch_size=2)
    model = small(shape)
    trainer = dinv.Trainer(
        model=model,
        physics=dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1)),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.03),
        train_dataloader=loader,
        eval_dataloader=loader,
        epochs=6,
        losses=dinv.loss.SupLoss(),
        online_measurements=True,
        plot_convergence_metrics=True,
        plot_images=True,
        compare_no_learning=False,
        save_path=tmp_path,
        device="cpu",
        verbose=False,
    )
    before = trainer.test(loader, save_path=tmp_path)
    trainer.train()
    after = trainer.test(loader, save_path=tmp_path)
    assert after["PSNR"] > before["PSNR"]
    assert list(tmp_path.rglob("curves.png"))


def test_a_loose_gradient_is_cheaper_and_learns() -> None:
    shape = (1, 8, 8)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.2))
    images = Generator(shape, dtype=torch.float32, seed=5)(torch.randn(8, 3).double()).detach()
    loose = Anderson(max_iter=10, tol=1e-2)
    network = dinv.models.UNet(1, 1, scales=2, channels_per_scale=[4, 8])
    model = JIIOReconstructor(
        MDEQRefiner(shape, channels=(4,), groups=2),
        encoder=dinv.models.ArtifactRemoval(network),
        latent_penalty=30.0,
        iters=6,
        implicit=loose,
    )
    penalty, supervised = JacobianLoss(0.1), dinv.loss.SupLoss()
    with pytest.raises(RuntimeError, match="comes after the model's forward"):
        penalty(x_net=None, x=None, y=None, physics=physics, model=model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    for _ in range(12):
        x_net = model(physics(images), physics)
        value = supervised(x=images, x_net=x_net).mean()
        total = value + penalty(x_net=x_net, x=images, y=None, physics=physics, model=model)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(value.item())
    assert model.solution.stats.implicit.adjoint_evals.max() <= 30
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    assert sum(values[-3:]) < 0.7 * sum(values[:3])
    with pytest.raises(TypeError, match="JacobianLoss is for a JIIOReconstructor, got UNet"):
        penalty(x_net=None, x=None, y=None, physics=physics, model=network)
    # the generator is in eval mode here too: its running statistics stay where they are
    norm = nn.BatchNorm2d(4)
    model.generator.head.insert(0, norm).train()
    x_net = model(physics(images), physics)
    penalty(x_net=x_net, x=images, y=None, physics=physics, model=model)
    assert norm.training
    assert norm.num_batches_tracked == 0
