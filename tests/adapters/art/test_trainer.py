"""``JIIOAdversarialTrainer`` does what ART's trainers do, and ART's trainer takes our attack."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.trainer import AdversarialTrainer, Trainer
from art.estimators.classification import PyTorchClassifier
from art.metrics import adversarial_accuracy, loss_sensitivity
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from jiio_art import JIIOAdversarialTrainer, JIIOAttack
from jiio_plugins import Joint, count_evaluations
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import ConvDEQClassifier, load_pretrained

if TYPE_CHECKING:
    from pathlib import Path

TRAIN, TEST = 60, 60


def arrays(split: str, count: int, one_hot: bool = False) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(split)
    labels = y[:count].numpy()
    return x[:count].numpy(), np.eye(10, dtype=np.float32)[labels] if one_hot else labels


def classifier(seed: int = 0, *, optimizer: bool = True, **options: Any) -> PyTorchClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = ConvDEQClassifier(channels=4, groups=2).eval()
    return PyTorchClassifier(
        model,
        **{
            "loss": nn.CrossEntropyLoss(),
            "input_shape": (1, 8, 8),
            "nb_classes": 10,
            "clip_values": (0.0, 1.0),
            "device_type": "cpu",
            "optimizer": torch.optim.Adam(model.parameters(), lr=0.02) if optimizer else None,
            **options,
        },
    )


def trainer_of(target: PyTorchClassifier, **options: Any) -> JIIOAdversarialTrainer:
    attack = JIIOAttack(target, norm=2, eps=0.3, max_iter=3, batch_size=60)
    return JIIOAdversarialTrainer(target, attack, **{"verbose": False, "judged": 0, **options})


def accuracy(trainer: Any, x: np.ndarray, y: np.ndarray) -> float:
    truth = y.argmax(1) if y.ndim == 2 else y
    return float((trainer.predict(x).argmax(1) == truth).mean())


def weights(target: PyTorchClassifier) -> list[np.ndarray]:
    return [t.detach().numpy().copy() for t in target.model.state_dict().values()]


def assert_equal(one: list[np.ndarray], two: list[np.ndarray]) -> None:
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


# What ART's tests ask of a trainer --------------------------------------------------------------


@pytest.mark.parametrize("one_hot", [False, True])
def test_fit_and_predict(one_hot: bool) -> None:
    (x, y), (x_test, y_test) = arrays("train", TRAIN, one_hot), arrays("test", TEST, one_hot)
    kept = [a.copy() for a in (x, y, x_test, y_test)]
    target = classifier()
    trainer = trainer_of(target)
    before = accuracy(trainer, x_test, y_test)
    trainer.fit(x, y, nb_epochs=6, batch_size=15)
    assert accuracy(trainer, x_test, y_test) > before + 0.2
    assert trainer.get_classifier() is trainer.classifier is target
    assert isinstance(trainer, Trainer)
    for a, b in zip(kept, (x, y, x_test, y_test), strict=True):
        np.testing.assert_array_equal(a, b)
    trainer.fit(x, y, nb_epochs=1, validation_data=(x_test, y_test))
    last = trainer.history[-1]
    assert last["validation_clean"] == pytest.approx(accuracy(trainer, x_test, y_test))
    assert 0 < last["validation_robust"] <= last["validation_clean"]


def test_index_and_one_hot_labels_give_the_same_training() -> None:
    x, indices = arrays("train", TRAIN)
    targets = []
    for y in (indices, indices[:, None], np.eye(10)[indices]):
        targets.append(classifier())
        trainer_of(targets[-1]).fit(x, y, nb_epochs=1, batch_size=30)
    assert_equal(weights(targets[0]), weights(targets[1]))
    assert_equal(weights(targets[0]), weights(targets[2]))


@pytest.mark.parametrize("kind", ["numpy", "pytorch"])
def test_fit_generator(kind: str) -> None:
    (x, y), (x_test, y_test) = arrays("train", TRAIN, one_hot=True), arrays("test", TEST)
    if kind == "numpy":
        generator: Any = NumpyDataGenerator(x, y, batch_size=16, drop_remainder=False)
    else:
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        loader = torch.utils.data.DataLoader(dataset, batch_size=15)
        generator = PyTorchDataGenerator(loader, size=TRAIN, batch_size=15)
    trainer = trainer_of(classifier())
    before = accuracy(trainer, x_test, y_test)
    trainer.fit_generator(generator, nb_epochs=6)
    assert accuracy(trainer, x_test, y_test) > before + 0.2
    assert len(trainer.history) == 6


def test_it_resists_its_attack_better_than_before_and_nothing_else_changes() -> None:
    (x, y), (x_test, y_test) = arrays("train", 200), arrays("test", TEST)
    target = classifier()
    attack = JIIOAttack(target, norm=2, eps=0.3, batch_size=60)
    trainer = JIIOAdversarialTrainer(target, attack, verbose=False)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trainer.fit(x, y, nb_epochs=6, batch_size=25)
    assert attack.verbose
    assert not target.model.training
    assert all(p.grad is None for p in target.model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert accuracy(trainer, x_test, y_test) > 0.85
    robust = adversarial_accuracy(target, x_test, y_test, attack_crafter=attack)
    assert robust > 0.7


@pytest.mark.parametrize(
    "build",
    [
        lambda o: StepLR(o, 1, gamma=0.1),
        lambda o: CosineAnnealingLR(o, 3),
        lambda o: ReduceLROnPlateau(o, "max", patience=0, threshold=10.0),
    ],
)
def test_any_scheduler_steps_once_an_epoch(build: Any) -> None:
    target = classifier()
    before = target.optimizer.param_groups[0]["lr"]
    trainer_of(target).fit(*arrays("train", TRAIN), nb_epochs=3, scheduler=build(target.optimizer))
    assert target.optimizer.param_groups[0]["lr"] < before


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"trades": 2.0},
        {"refine": 2},
        {"jacobian_weight": 3.0},
        {"max_grad_norm": 1.0},
    ],
)
def test_options_reach_the_training(options: dict[str, Any]) -> None:
    x, y = arrays("train", 30)
    plain, other = classifier(), classifier()
    trainer_of(plain).fit(x, y, nb_epochs=1)
    trainer = trainer_of(other, **options)
    trainer.fit(x, y, nb_epochs=1)
    assert math.isfinite(trainer.history[0]["loss"])
    assert any((a != b).any() for a, b in zip(weights(plain), weights(other), strict=True))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_searches_that_take_up_earlier_ones(autocast: torch.dtype | None) -> None:
    x, y = arrays("train", TRAIN)
    # the penalty and the judging cost the same in either
    options: dict[str, Any] = {"jacobian_weight": 0.0, "judged": 0, "verbose": False}
    counts = []
    for every in (1, 4):
        target = classifier()
        attack = JIIOAttack(target, norm=2, eps=0.3, autocast=autocast)
        trainer = JIIOAdversarialTrainer(target, attack, restart_every=every, **options)
        with count_evaluations() as counter:
            trainer.fit(x, y, nb_epochs=4, batch_size=16)
        counts.append(counter.f_evals + counter.vjps)
        assert trainer.history[-1]["loss"] < 0.9 * trainer.history[0]["loss"]
    assert counts[1] < 0.75 * counts[0]
    with pytest.raises(ValueError, match=r"use fit\(x, y\)"):
        trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=16), nb_epochs=2)
    for wrong, words in (
        ({"restart_every": 0}, "restart_every must be at least 1"),
        ({"carried": Joint(max_iter=2)}, "set restart_every"),
    ):
        with pytest.raises(ValueError, match=words):
            JIIOAdversarialTrainer(target, attack, **wrong)
    with count_evaluations() as longer:
        JIIOAdversarialTrainer(
            target, attack, restart_every=4, carried=Joint(max_iter=9), **options
        ).fit(x, y, nb_epochs=4, batch_size=16)
    assert longer.f_evals + longer.vjps > 1.3 * counts[1]


def test_preprocessing_and_autocast() -> None:
    x, y = arrays("train", 30)
    target = classifier(preprocessing=(0.5, 0.25))
    attack = JIIOAttack(target, norm=np.inf, eps=0.05, max_iter=2, autocast=torch.bfloat16)
    trainer = JIIOAdversarialTrainer(target, attack, verbose=False)
    trainer.fit(x, y, nb_epochs=4, batch_size=10)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.arange(1.0, 11.0)},
        {"reduction": "sum"},
        {"ignore_index": 3},
        {"label_smoothing": 0.1, "weight": torch.arange(10.0)},
    ],
)
def test_the_loss_is_the_classifiers_own(options: dict[str, Any]) -> None:
    """Without a ball a step is that of ``classifier.fit``."""
    x, y = arrays("train", 40)
    targets = [classifier(loss=nn.CrossEntropyLoss(**options)) for _ in range(2)]
    for target in targets:
        target._optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)
    before = weights(targets[0])
    attack = JIIOAttack(targets[0], norm=2, eps=0.0)
    trainer = JIIOAdversarialTrainer(
        targets[0], attack, refine=200, jacobian_weight=0.0, judged=0, verbose=False
    )
    trainer.fit(x, y, nb_epochs=1, batch_size=40)
    module, loss = targets[1].model.train(), nn.CrossEntropyLoss(**options)
    expected = loss(module(torch.from_numpy(x)), torch.from_numpy(y))
    expected.backward()
    assert targets[0].model is not module
    for own, old, p in zip(weights(targets[0]), before, module.parameters(), strict=True):
        step = 0.1 * p.grad.numpy()
        np.testing.assert_allclose(old - own, step, rtol=0, atol=5e-3 * float(np.abs(step).max()))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    trainer_of(classifier(), verbose=True, judged=3).fit(*arrays("train", 30), nb_epochs=1)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("loss=", "seen_robust=", " clean=", " robust="))
    trainer_of(classifier()).fit(*arrays("train", 30), nb_epochs=1)
    assert capsys.readouterr().err == ""


# Checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [False, True])
def test_a_resumed_fit_ends_bit_by_bit_where_a_whole_one_does(
    tmp_path: Path, generator: bool
) -> None:
    x, y = arrays("train", TRAIN)

    def fit(target: PyTorchClassifier, nb_epochs: int, **options: Any) -> None:
        trainer, schedule = trainer_of(target, **options), StepLR(target.optimizer, 1, gamma=0.5)
        if generator:
            batches = NumpyDataGenerator(x, y, batch_size=20)
            trainer.fit_generator(batches, nb_epochs=nb_epochs, scheduler=schedule)
        else:
            trainer.fit(x, y, batch_size=20, nb_epochs=nb_epochs, scheduler=schedule)

    whole, first, second = classifier(), classifier(), classifier(seed=5)
    fit(whole, 3)
    kept = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2, "resume": True}
    fit(first, 1, **kept)
    fit(second, 3, **kept)
    assert_equal(weights(whole), weights(second))


def test_a_checkpoint_is_not_overwritten_and_not_taken_for_another_model(tmp_path: Path) -> None:
    x, y = arrays("train", 30)
    path = tmp_path / "run.pt"
    trainer_of(classifier(), checkpoint=path).fit(x, y, nb_epochs=1)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        trainer_of(classifier(), checkpoint=path).fit(x, y, nb_epochs=1)
    model = load_pretrained("digits")
    other = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        torch.optim.Adam(model.parameters()),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    with pytest.raises(ValueError, match="another model"):
        trainer_of(other, checkpoint=path, resume=True).fit(x, y, nb_epochs=1)
    assert path.read_bytes() == before


def test_early_stopping() -> None:
    target = classifier()
    for group in target.optimizer.param_groups:
        group["lr"] = 0.0
    trainer = trainer_of(target, patience=2)
    trainer.fit(*arrays("train", 30), validation_data=arrays("test", 30), nb_epochs=9)
    assert len(trainer.history) == 3
    with pytest.raises(ValueError, match="needs validation"):
        trainer.fit(*arrays("train", 30), nb_epochs=9)


# ART's own trainer and metrics with our attack --------------------------------------------------


# ART's own trainer knows no Jacobian penalty: some rows of the cell are lost on the way
@pytest.mark.filterwarnings("ignore::jiio_plugins.ConvergenceWarning")
def test_arts_trainer_takes_our_attack() -> None:
    (x, y), (x_test, y_test) = arrays("train", TRAIN, one_hot=True), arrays("test", TEST)
    target = classifier()
    attack = JIIOAttack(target, norm=2, eps=0.3, max_iter=3)
    trainer = AdversarialTrainer(target, attack, ratio=0.5)
    assert trainer.attacks[0].estimator is trainer.get_classifier()
    before = accuracy(trainer, x_test, y_test)
    np.random.seed(0)  # noqa: NPY002 (ART's trainer draws from the global state)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        trainer.fit(x, y, batch_size=15, nb_epochs=5)
        trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=15), nb_epochs=1)
    assert accuracy(trainer, x_test, y_test) > before + 0.2
    other = AdversarialTrainer(classifier(seed=2), [attack, FastGradientMethod(target, eps=0.1)])
    other.fit(x, y, batch_size=15, nb_epochs=1)  # transferred examples


def test_arts_metrics_take_our_attack() -> None:
    x, y = arrays("test", 40)
    model = load_pretrained("digits")
    target = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    found = [
        adversarial_accuracy(
            target,
            x,
            y,
            attack_crafter=JIIOAttack(target, norm=2, eps=eps, method=Joint(max_iter=10)),
        )
        for eps in (0.05, 0.6)
    ]
    assert found[0] > 0.8
    assert found[1] < 0.3
    assert loss_sensitivity(target, x[:4], np.eye(10, dtype=np.float32)[y[:4]]) > 0


# Bad input --------------------------------------------------------------------------------------


def test_bad_parameters() -> None:
    target = classifier()
    attack = JIIOAttack(target, norm=2, eps=0.3)
    build = JIIOAdversarialTrainer
    with pytest.raises(TypeError, match="PyTorchClassifier"):
        build(target.model, attack)
    with pytest.raises(TypeError, match="must be a JIIOAttack"):
        build(target, FastGradientMethod(target))
    with pytest.raises(TypeError, match="must be a JIIOAttack"):
        build(target, "attack")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another classifier"):
        build(classifier(), attack)
    with pytest.raises(NotImplementedError, match="targeted"):
        build(target, JIIOAttack(target, targeted=True))
    with pytest.raises(ValueError, match="must be a number"):
        build(target, JIIOAttack(target, norm=2, eps=np.array([0.1, 0.2])))
    for options, words in (
        ({"loss": "dlr"}, "loss='cross-entropy' for training"),
        ({"random_eps": True}, "random_eps=False"),
        ({"early_stop": True}, "early_stop=False"),
        ({"retry": Joint(max_iter=40)}, "retry=None"),
        ({"num_random_init": 2}, "num_random_init 0 or 1 for training, .* got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            build(target, JIIOAttack(target, **options))
    with pytest.raises(ValueError, match="ratio must be"):
        build(target, attack, ratio=1.5)
    other = classifier(loss=nn.MultiMarginLoss())
    with pytest.raises(TypeError, match="CrossEntropyLoss"):
        build(other, JIIOAttack(other))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: 0.9 * y + 0.01, "or for smoothed ones take nn.CrossEntropyLoss"),
        (lambda y: y + np.roll(y, 1, axis=1), "single 1 and zeros"),
        (lambda y: 0 * y, r"got \[0\.0, .* for sample 0"),
        (lambda y: y * np.nan, "y holds NaN"),
        (lambda y: y > 2, "False"),
    ],
)
def test_soft_labels_are_refused(change: Any, words: str) -> None:
    x, y = arrays("train", 4, one_hot=True)
    target = classifier()
    attack = JIIOAttack(target, norm=2, eps=0.3, verbose=False)
    with pytest.raises(ValueError, match=words):
        JIIOAdversarialTrainer(target, attack, verbose=False).fit(x, change(y), nb_epochs=1)
    with pytest.raises(ValueError, match=words):
        attack.generate(x, change(y))


def test_bad_input() -> None:
    x, y = arrays("train", 20)
    target = classifier()
    before = weights(target)
    trainer = trainer_of(target)
    strangers = classifier()
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (x, y[:5], {}, ValueError, "one-hot of shape"),
        (x, y + 0.5, {}, ValueError, "classes 0"),
        (x, y + 9, {}, ValueError, "classes 0"),
        (x, -y - 1, {}, ValueError, "classes 0"),
        (x[:, :, :4], y, {}, ValueError, "input_shape"),
        (x * np.nan, y, {}, ValueError, "NaN or Inf"),
        (x + 2, y, {}, ValueError, "within the box"),
        (x[:0], y[:0], {}, ValueError, "no images"),
        (x, y, {"batch_size": 0}, ValueError, "batch_size"),
        (x, y, {"nb_epochs": 0}, ValueError, "epochs"),
        (x, y, {"epochs": 3}, TypeError, "unknown keywords: epochs"),
        (x, y, {"scheduler": StepLR(strangers.optimizer, 1)}, ValueError, "another optimizer"),
        (x, y, {"scheduler": 0.1}, TypeError, "scheduler must be"),
    ]
    for images, labels, options, error, words in cases:
        with pytest.raises(error, match=words):
            trainer.fit(images, labels, **{"nb_epochs": 1, **options})
    bare = classifier(optimizer=False)
    with pytest.raises(ValueError, match="no optimizer"):
        trainer_of(bare).fit(x, y, nb_epochs=1)
    assert_equal(before, weights(target))
