"""deepinv's own tests of its trainer with this reconstructor in the place of their models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import deepinv as dinv
import matplotlib as mpl
import pytest
import torch

from jiio_deepinv import JIIOReconstructor
from jiio_plugins import Anderson
from tests.adapters.deepinv.toys import Generator
from tests.adapters.deepinv.upstream import upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    *(
        pytest.mark.filterwarnings(f"ignore:{theirs}")
        for theirs in (
            "non_blocking_transfers=True can only be used",
            "More than 20 figures have been opened",
            "Physics generator is provided but",
            "Generating online measurements requires dataloader to return",
            "early_stop should be an integer or None",
            "No training will be done because epochs",
            "Trainer running with AMP",
            "Update progress bar frequency of 1",
        )
    ),
    # ours: an untrained generator, six iterations and float32
    pytest.mark.filterwarnings("ignore:the joint solution has a relative residual"),
    pytest.mark.filterwarnings("ignore:the equation for the implicit gradient was solved"),
]

trainer_tests = upstream("test_trainer")
SHAPE = (3, 8, 6)


class Counting(JIIOReconstructor):
    """Counts its calls as the model of theirs does that this replaces."""

    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        generator = Generator(shape, dtype=torch.float32, solver=Anderson(tol=1e-5)).float()
        loose = Anderson(max_iter=10, tol=1e-2)
        super().__init__(generator, iters=6, latent_penalty=30.0, implicit=loose)
        self.eval_count = self.train_count = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.train_count += self.training
        self.eval_count += not self.training
        return super().forward(*args, **kwargs)


@pytest.fixture(autouse=True)
def _headless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dinv.models, "ArtifactRemoval", lambda backbone: Counting())
    monkeypatch.setattr(dinv.models, "MedianFilter", lambda: Counting((3, 32, 28)))
    monkeypatch.setattr(trainer_tests, "DummyModel", Counting)
    with mpl.rc_context({"backend": "agg"}):
        yield


@pytest.fixture
def images() -> Any:
    return upstream("dummy").DummyCircles(samples=4, imsize=SHAPE)


@pytest.mark.parametrize("precision", [False, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("losses", [False, True])
def test_forward_passes(images: Any, tmp_path: Path, precision: Any, losses: bool) -> None:
    trainer_tests.test_model_forward_passes(
        precision, images, SHAPE, "cpu", tmp_path, losses, True, 4, 2
    )


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradient_norm(images: Any, tmp_path: Path, clip: float | None) -> None:
    trainer_tests.test_gradient_norm(images, SHAPE, "cpu", tmp_path, clip)


@pytest.mark.parametrize(
    "case",
    [(True, True, True), (True, True, False), (True, False, True), (False, True, False)],
)
@pytest.mark.parametrize("parameters", [True, False])
def test_dataloader_formats(
    tmp_path: Path, case: tuple[bool, bool, bool], parameters: bool
) -> None:
    rng = torch.Generator().manual_seed(0)
    trainer_tests.test_dataloader_formats(
        None, SHAPE, "cpu", Counting(), parameters, *case, 2, True, rng, tmp_path
    )


# at that learning rate the cell is lost, and its gradient says so
@pytest.mark.filterwarnings("ignore::jiio_plugins.ConvergenceWarning")
@pytest.mark.parametrize("stop", [True, 3, None])
def test_early_stop(images: Any, tmp_path: Path, stop: Any) -> None:
    trainer_tests.test_early_stop(None, images, SHAPE, "cpu", Counting(), stop, 100_000, tmp_path)


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("losses", [False, True])
def test_loss_logging(images: Any, tmp_path: Path, losses: bool, metrics: bool) -> None:
    model = Counting()
    trainer_tests.test_loss_logging(images, SHAPE, "cpu", model, tmp_path, losses, metrics)


@pytest.mark.parametrize("method", trainer_tests.NO_LEARNING)
def test_nolearning(tmp_path: Path, method: str) -> None:
    physics = dinv.physics.BlurFFT(img_size=SHAPE, filter=torch.ones(1, 1, 3, 3) / 9)
    trainer_tests.test_nolearning(SHAPE, physics, Counting(), method, "cpu", tmp_path)


@pytest.mark.filterwarnings("ignore:Generated measurements repeat each epoch")
@pytest.mark.filterwarnings("ignore:Cannot reset state for random number generator")
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("noise", [None, "gaussian", "poisson"])
def test_physics_generator_params(repeat: bool, noise: str | None) -> None:
    rng = torch.Generator().manual_seed(0)
    size = (3, 37, 31)  # of theirs: with fewer pixels two counts can be equal
    trainer_tests.test_trainer_physics_generator_params(size, repeat, noise, rng, "cpu", Counting())


@pytest.mark.parametrize("generator", [None, "param", "noise", "param+noise"])
@pytest.mark.parametrize("kind", ["blur", "inpainting"])
@pytest.mark.parametrize("online", [True, False])
def test_get_samples(
    images: Any, tmp_path: Path, kind: str, generator: str | None, online: bool
) -> None:
    rng = torch.Generator().manual_seed(0)
    trainer_tests.test_get_samples(
        tmp_path, SHAPE, kind, Counting(), "cpu", images, generator, online, True, rng, tmp_path
    )


def test_folders_that_collide(images: Any, tmp_path: Path) -> None:
    trainer_tests.test_out_dir_collision_detection(images, SHAPE, "cpu", Counting(), tmp_path)


def test_metrics() -> None:
    trainer_tests.test_trainer_test_metrics(None, "cpu", torch.Generator().manual_seed(0))


def test_metrics_without_learning(images: Any, tmp_path: Path) -> None:
    trainer_tests.test_trained_model_not_used_for_no_learning_metrics(
        images, SHAPE, "cpu", Counting(), tmp_path, 40.0, 20.0
    )
