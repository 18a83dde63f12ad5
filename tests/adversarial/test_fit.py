"""The training loop: what it reaches, and that a killed training ends where it would have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from jiio_plugins import Joint, count_evaluations
from jiio_plugins.adversarial.batches import TensorBatches
from jiio_plugins.adversarial.carried import Carried
from jiio_plugins.adversarial.fit import fit_adversarially, judge
from jiio_plugins.adversarial.step import TRAINING_METHOD, AdversarialTraining
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import ConvDEQClassifier
from jiio_plugins.utils import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
TRAINING = AdversarialTraining(norm=2, eps=0.3, lower=0.0, upper=1.0, method=Joint(max_iter=3))
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=40),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "ReduceLROnPlateau max": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 1), lr_scheduler.ExponentialLR(o, 0.7)], [1]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.7)]
    ),
}


class StoppedError(Exception):
    """Stands for whatever ends a training in the middle."""


class Bomb(TensorBatches):
    """Batches that end in the middle of the second epoch."""

    def epoch(self, index: int, skip: int = 0) -> Any:
        for k, batch in enumerate(super().epoch(index, skip)):
            if index == 1 and k == 2:
                raise StoppedError
            yield batch


def data(split: str = "train", count: int = 64) -> tuple[Tensor, Tensor]:
    x, y = load_digits(split)
    return x[:count], y[:count]


def build(dropout: float = 0.0, seed: int = 0, channels: int = 4) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = ConvDEQClassifier(channels=channels, groups=2)
    if dropout:
        model.encoder = nn.Sequential(model.encoder, nn.Dropout2d(dropout))
    return model


def train(
    model: nn.Module,
    *,
    batches: Callable[..., Any] = TensorBatches,
    scheduler: str | None = None,
    training: AdversarialTraining = TRAINING,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"epochs": 3, "verbose": False, **options}
    return fit_adversarially(
        model,
        training,
        optimizer,
        batches(*data(), 16),
        scheduler=None if scheduler is None else SCHEDULERS[scheduler](optimizer),
        **options,
    )


def assert_equal_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# What it reaches --------------------------------------------------------------------------------


def test_training_makes_the_network_more_robust() -> None:
    model = build()
    history = train(model, epochs=8, validation=data("test", 100))
    assert len(history) == 8
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["validation_robust"] > history[0]["validation_robust"] + 0.2
    assert history[-1]["validation_clean"] >= history[-1]["validation_robust"]
    assert {"loss", "robust", "clean", "residual"} <= history[0].keys()


def test_states_that_lag_behind_are_warned_of() -> None:
    model = build()
    with torch.no_grad():
        for weight in model.equilibrium.parameters():
            weight *= 3
    with pytest.warns(RuntimeWarning, match="epoch 1 .* raise jacobian_weight"):
        train(model, epochs=1, training=replace(TRAINING, method=Joint(max_iter=1, warmup=1)))


def test_every_sample_is_seen_once_an_epoch_in_another_order() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    batches = TensorBatches(x, y, 4, seed=1)
    epochs = [torch.cat([labels for _, labels in batches.epoch(k)]) for k in (0, 1, 0)]
    assert len(batches) == 3
    assert all(torch.equal(e.sort().values, y) for e in epochs)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    rest = torch.cat([labels for _, labels in batches.epoch(0, skip=2)])
    assert torch.equal(rest, epochs[0][8:])
    assert len(TensorBatches(x, y, 4, drop_last=True)) == 2


def test_flags_and_gradients_come_back_and_the_bar_shows_the_four_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = build().eval()
    train(model, epochs=1, verbose=True)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("loss=", "clean=", "robust=", "residual="))


def test_early_stopping_puts_the_best_weights_back() -> None:
    model, lr = build(), 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    # from the third epoch on the steps only do harm
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 2 else -20.0)
    seen: list[float] = []
    history = fit_adversarially(
        model,
        TRAINING,
        optimizer,
        TensorBatches(*data(), 16),
        epochs=20,
        patience=2,
        validation=data("test", 100),
        scheduler=scheduler,
        verbose=False,
    )
    seen = [epoch["validation_robust"] for epoch in history]
    best = seen.index(max(seen))
    assert len(history) == best + 3 < 20
    alone = build()
    optimizer = torch.optim.SGD(alone.parameters(), lr=lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 2 else -20.0)
    fit_adversarially(
        alone,
        TRAINING,
        optimizer,
        TensorBatches(*data(), 16),
        epochs=best + 1,
        scheduler=scheduler,
        verbose=False,
    )
    assert_equal_weights(model, alone)


# Searches that take up earlier ones --------------------------------------------------------------


class Recorded(AdversarialTraining):
    """Notes where each search started and what goes on, by label: every sample has its own."""

    starts: dict[int, Tensor | None]
    ends: dict[int, Callable[[], Tensor]]

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, **options: Any) -> Any:
        step = super().__call__(model, x, labels % 10, **options)
        start = options["start"]
        for k, label in enumerate(labels.tolist()):
            self.starts[label] = None if start is None else start[k]
            self.ends[label] = lambda k=k: step.ahead()[k]
        return step


def test_searches_start_where_the_last_ones_of_the_same_samples_ended() -> None:
    options: dict[str, Any] = {"norm": 2, "eps": 0.3, "method": Joint(max_iter=2)}
    fresh, short = Recorded(**options), Recorded(**options)
    starts: dict[int, Tensor | None] = {}
    ends: dict[int, Callable[[], Tensor]] = {}
    for training in (fresh, short):
        object.__setattr__(training, "starts", starts)
        object.__setattr__(training, "ends", ends)
    model, x = build(), data()[0]
    history: list[tuple[dict[int, Tensor | None], dict[int, Tensor]]] = []

    class Watched(TensorBatches):
        def epoch(self, index: int, skip: int = 0) -> Any:
            yield from super().epoch(index, skip)
            history.append((dict(starts), {sample: end() for sample, end in ends.items()}))

    fit_adversarially(
        model,
        fresh,
        torch.optim.SGD(model.parameters(), lr=0.01),
        Watched(x, torch.arange(64), 20, drop_last=True),
        epochs=5,
        restart_every=3,
        carried=short,
        verbose=False,
    )
    for epoch, (begun, _) in enumerate(history):
        anew = epoch % 3 == 0
        order = TensorBatches(x, torch.arange(64), 20).order(epoch)[:60].tolist()
        for sample in order:
            start = begun[sample]
            assert (start is None) == anew
            if start is not None:  # the one that an epoch left out starts at its image
                last = history[epoch - 1][1].get(sample, x[sample])
                assert torch.equal(start, last)
    assert any(sample not in history[0][1] for sample in range(64))


def test_carried_searches_are_as_good_for_less() -> None:
    training = replace(TRAINING, method=TRAINING_METHOD)
    counts = []
    for every in (1, 8):
        model = build()
        before = judge(model, training, *data("test", 100))["robust"]
        with count_evaluations() as counter:
            history = train(model, epochs=8, restart_every=every, training=training)
        counts.append(counter.f_evals + counter.vjps)
        assert judge(model, training, *data("test", 100))["robust"] > before + 0.2
        assert ("clean" in history[-1]) == (every == 1)
    assert counts[1] < 0.7 * counts[0]


class Late(TensorBatches):
    """Batches that end in the middle of the third epoch."""

    def epoch(self, index: int, skip: int = 0) -> Any:
        for k, batch in enumerate(super().epoch(index, skip)):
            if index == 2 and k == 2:
                raise StoppedError
            yield batch


@pytest.mark.parametrize("end", [Bomb, Late])  # Late: in a whole search's epoch, if every is 2
@pytest.mark.parametrize("every", [2, 9])
def test_resumed_with_carried_searches(every: int, end: Callable[..., Any], tmp_path: Path) -> None:
    whole, parts, path = build(), build(), tmp_path / "run.pt"
    training = replace(TRAINING, ratio=0.5, trades=2.0)  # some rows have nothing to take up
    options: dict[str, Any] = {"restart_every": every, "epochs": 4, "training": training}
    expected = train(whole, **options)
    kept = {"checkpoint": path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(StoppedError):
        train(parts, batches=end, **options, **kept)
    with pytest.raises(ValueError, match=f"another restart_every, {every}"):
        train(build(), epochs=4, training=training, **kept)
    fresh = build(seed=7)
    assert train(fresh, **options, **kept) == expected
    assert_equal_weights(whole, fresh)


def test_images_that_were_not_attacked_are_not_taken_up() -> None:
    starts: dict[int, Tensor | None] = {}
    ends: dict[int, Callable[[], Tensor]] = {}
    training = Recorded(norm=2, eps=0.3, ratio=0.5, random_start=True, method=Joint(max_iter=2))
    object.__setattr__(training, "starts", starts)
    object.__setattr__(training, "ends", ends)
    x, y, model = data()[0], torch.arange(64), build()
    fit_adversarially(
        model,
        training,
        torch.optim.SGD(model.parameters(), lr=0.01),
        TensorBatches(x, y, 16),
        epochs=2,
        restart_every=2,
        carried=training,
        verbose=False,
    )
    orders = [TensorBatches(x, y, 16).order(k).split(16) for k in (0, 1)]
    before = {int(n) for rows in orders[0] for n in rows[:8]}
    first = {int(n) for rows in orders[1] for n in rows[:8]}
    new = first - before
    assert new
    for sample in new:  # at random, as the training's own searches start
        start = starts[sample]
        assert start is not None
        assert 0.0 < float((start - x[sample]).norm()) <= 0.3 * (1 + 1e-5)
    assert all(float((ends[n]() - x[n]).norm()) < 1e-6 for n in range(64) if n not in first)


def test_kept_images_of_a_checkpoint_go_where_the_batches_are() -> None:
    """Here from single to double precision, as from the CPU to an accelerator."""
    x, y = data()
    kept = Carried(TensorBatches(x, y, 16), 2, TRAINING)
    rows = TensorBatches(x, y, 16).order(0)[:16]
    kept.keep(0, 0, x[rows], 16)
    other = Carried(TensorBatches(x.double(), y, 16), 2, TRAINING)
    other.load(kept.state())
    other.keep(0, 1, x.double()[:16], 16)
    start = other.start(1, 0, x.double()[:16], torch.Generator())
    assert start is not None
    assert start.dtype == torch.float64
    with pytest.raises(ValueError, match="images of 64 samples, the batches hold 20"):
        Carried(TensorBatches(x[:20], y[:20], 16), 2, TRAINING).load(kept.state())


@pytest.mark.parametrize(
    ("order", "words"), [([3, 1, 2], "every sample once"), (list(range(40)), "it should have 8")]
)
def test_an_order_that_does_not_fit(order: list[int], words: str) -> None:
    class Wrong(TensorBatches):
        def order(self, index: int) -> Any:
            return order

        def epoch(self, index: int, skip: int = 0) -> Any:
            return TensorBatches(*data(), 16).epoch(index, skip)

    with pytest.raises(ValueError, match=words):
        train(build(), batches=Wrong, restart_every=2)


def test_a_carried_step_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="needs restart_every"):
        train(build(), carried=TRAINING)
    with pytest.raises(TypeError, match="must be an AdversarialTraining"):
        train(build(), carried="short", restart_every=2)
    with pytest.raises(ValueError, match="in the ball of the others"):
        train(build(), carried=replace(TRAINING, eps=0.2), restart_every=2)


def test_batches_that_do_not_tell_their_samples_cannot_be_carried() -> None:
    class Loader:
        def __len__(self) -> int:
            return 4

        def epoch(self, index: int, skip: int = 0) -> Any:
            return TensorBatches(*data(), 16).epoch(index, skip)

    train(build(), epochs=1, batches=lambda *_: Loader())
    with pytest.raises(TypeError, match=r"batches that have order\(index\)"):
        train(build(), batches=lambda *_: Loader(), restart_every=2)


# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resumed_with_any_scheduler_it_ends_bit_by_bit_where_it_would_have(
    name: str, tmp_path: Path
) -> None:
    options = {
        "scheduler": name,
        "scheduler_interval": "step" if name == "OneCycleLR" else "epoch",
    }
    whole, parts, path = build(), build(), tmp_path / "run.pt"
    expected = train(whole, **options)
    kept = {"checkpoint": path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(StoppedError):
        train(parts, batches=Bomb, **options, **kept)
    fresh = build(seed=7)  # what it holds before does not matter
    history = train(fresh, **options, **kept)
    assert_equal_weights(whole, fresh)
    assert history == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_resumed_with_everything_random_switched_on(tmp_path: Path) -> None:
    """Dropout in the encoder, random starts, the penalty and TRADES."""
    training = AdversarialTraining(
        norm=2,
        eps=0.3,
        method=Joint(max_iter=2),
        random_start=True,
        jacobian_weight=1.0,
        trades=2.0,
    )
    models = [build(dropout=0.3) for _ in range(3)]
    path = tmp_path / "run.pt"
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        train(models[0], training=training)
        torch.manual_seed(5)
        kept = {"checkpoint": path, "checkpoint_every": 3, "resume": True, "training": training}
        with pytest.raises(StoppedError):
            train(models[1], batches=Bomb, **kept)
        torch.manual_seed(99)  # as in another process
        train(models[2], **kept)
    assert_equal_weights(models[0], models[2])


SCRIPT = """
    import sys, torch
    from safetensors.torch import save_file
    from tests.adversarial.test_fit import build, train

    torch.set_num_threads(1)
    model = build(dropout=0.2)
    torch.manual_seed(3)
    train(
        model, epochs=4, scheduler="StepLR", checkpoint=sys.argv[2], checkpoint_every=1,
        resume=True,
    )
    save_file(model.state_dict(), sys.argv[1])
"""


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, as often as it takes to hit several moments of writing and computing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }

    path = tmp_path / "run.pt"

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(tmp_path / out), str(path)]
        return subprocess.Popen(command, env=environment)

    whole = build(dropout=0.2)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        train(whole, epochs=4, scheduler="StepLR")
    steps = []
    for wanted in (2, 7):
        process = start("killed.safetensors")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists():
                progress = checkpoint.read(path)["progress"]  # whole at any moment
                done = 4 * progress["epoch"] + progress["step"]
                if done >= wanted:
                    break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        progress = checkpoint.read(path)["progress"]
        steps.append(4 * progress["epoch"] + progress["step"])
    assert 2 <= steps[0] < steps[1] < 16
    assert not (tmp_path / "killed.safetensors").exists()
    assert start("resumed.safetensors").wait(timeout=120) == 0
    resumed = build(dropout=0.2)
    resumed.load_state_dict(load_file(tmp_path / "resumed.safetensors"))
    assert_equal_weights(whole, resumed)


def test_a_finished_training_resumed_does_nothing_and_can_be_prolonged(tmp_path: Path) -> None:
    whole, model, path = build(), build(), tmp_path / "run.pt"
    train(model, epochs=2, checkpoint=path)
    before = path.read_bytes()
    again = build(seed=7)
    assert len(train(again, epochs=2, checkpoint=path, resume=True)) == 2
    assert_equal_weights(model, again)
    assert path.read_bytes() == before
    train(again, epochs=3, checkpoint=path, resume=True)
    train(whole, epochs=3)
    assert_equal_weights(whole, again)


# Bad input: clear errors, and nothing overwritten -----------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.pt"
    train(build(), epochs=1, checkpoint=path, scheduler="StepLR")
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": lambda: build(channels=6)}, "another model: .* first"),
        ({"model": lambda: nn.Sequential(build())}, "another model"),
        ({"scheduler": "LambdaLR"}, "another scheduler"),
        ({"scheduler": None}, "another scheduler"),
        ({"seed": 4}, "another seed"),
        ({"training": AdversarialTraining(norm=2, eps=0.9)}, "another eps"),
        ({"optimizer": torch.optim.SGD}, "another optimizer"),
        ({"max_grad_norm": 0.1}, "another max_grad_norm"),
        ({"scheduler_interval": "step"}, "another scheduler_interval"),
        ({"batches": lambda x, y, _: TensorBatches(x, y, 17)}, "another batch size"),
        ({"batches": lambda x, y, n: TensorBatches(x.flip(0), y.flip(0), n)}, "another data"),
    ],
)
def test_a_checkpoint_of_another_training(saved: Path, change: dict[str, Any], words: str) -> None:
    before = saved.read_bytes()
    model = change.pop("model", build)()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    if "optimizer" in change:
        change["optimizer"] = change["optimizer"](model.parameters(), lr=0.01)
    options = {"scheduler": "StepLR", "checkpoint": saved, "resume": True, **change}
    with pytest.raises(ValueError, match=words):
        train(model, **options)
    assert saved.read_bytes() == before
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    part = whole[: int(share * len(whole))]
    saved.write_bytes(part)
    with pytest.raises(ValueError, match="damaged"):
        train(build(), scheduler="StepLR", checkpoint=saved, resume=True)
    assert saved.read_bytes() == part


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_text("my notes\n" * 100)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        train(build(), checkpoint=path, resume=True)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a training checkpoint"):
        train(build(), checkpoint=path, resume=True)
    torch.save({"format": Path}, path)  # would run code when loaded
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        train(build(), checkpoint=path, resume=True)
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "absent.pt")


def test_an_existing_checkpoint_is_not_overwritten(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        train(build(), scheduler="StepLR", checkpoint=saved)
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"epochs": 0}, ValueError, "epochs must be"),
        ({"patience": 0}, ValueError, "patience must be"),
        ({"patience": 2}, ValueError, "needs validation"),
        ({"scheduler_interval": "batch"}, ValueError, "scheduler_interval"),
        ({"checkpoint_every": 2}, ValueError, "needs checkpoint="),
        ({"resume": True}, ValueError, "needs checkpoint="),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"restart_every": 0}, ValueError, "restart_every must be"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(build(), **options)


def test_a_scheduler_or_optimizer_of_something_else() -> None:
    model, other = build(), build()
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    batches = TensorBatches(*data(), 16)

    def fit(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        fit_adversarially(
            model, TRAINING, optimizer, batches, epochs=1, scheduler=scheduler, verbose=False
        )

    kept = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="another optimizer"):
        fit(mine, lr_scheduler.StepLR(theirs, 1))
    with pytest.raises(TypeError, match="scheduler must be"):
        fit(mine, "cosine")
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fit(theirs, None)
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_training_before_it_spoils_anything(
    tmp_path: Path,
) -> None:
    model, path = build(), tmp_path / "run.pt"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(model, optimizer=optimizer, checkpoint=path, checkpoint_every=1)
    assert checkpoint.read(path)["progress"]["step"] == 1


def test_a_loader_is_told_what_to_do() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    with pytest.raises(TypeError, match=r"give TensorBatches\(x, y, batch_size\)"):
        train(build(), batches=lambda *_: loader)


def test_bad_batches() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="batch_size"):
        TensorBatches(x, y, 0)
    with pytest.raises(ValueError, match="same length"):
        TensorBatches(x, y[:5], 4)
    with pytest.raises(ValueError, match="no batch"):
        TensorBatches(x[:3], y[:3], 4, drop_last=True)
