"""``jiio_art.JIIOAttack``: what it finds, and its place among ART's attacks."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoAttack
from art.defences.trainer import AdversarialTrainer
from art.metrics import adversarial_accuracy
from art.summary_writer import SummaryWriter

from jiio_art import AttackRecord, JIIOAttack
from jiio_plugins import Joint, Nested, Picard, Status, count_evaluations
from jiio_plugins.models import ConvDEQClassifier
from tests.adapters.art.helpers import EPS, Digits, assert_inside, attack_on, sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from art.estimators.classification import PyTorchClassifier


# What it finds ----------------------------------------------------------------------------------


def test_samples_not_to_be_relied_on_are_logged(
    trained: PyTorchClassifier,
    digits: Digits,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attack = attack_on(trained, norm=2, eps=EPS[2.0], max_iter=5)
    attack.generate(*digits)
    assert not caplog.records
    monkeypatch.setattr(trained.model.equilibrium, "solver", Picard(max_iter=1))
    attack.generate(*digits)
    assert attack.solution is not None
    wrong = int((attack.solution.status == Status.DISAGREEMENT).sum())
    (said,) = caplog.messages
    assert said.startswith(f"{wrong} of 8 rows are not to be relied on:\n{wrong} × DISAGREEMENT")
    assert Status.DISAGREEMENT.message in said


@pytest.mark.parametrize("norm", [1, 2, np.inf, "inf"])
def test_fools_the_classifier_and_says_what_it_cost(
    trained: PyTorchClassifier, digits: Digits, norm: Any
) -> None:
    x, y = digits
    p = float(norm)
    attack = attack_on(trained, norm=norm, eps=EPS[p], batch_size=5)
    with count_evaluations() as counter:
        adversarial = attack.generate(x, y)
    record = attack.solution
    assert record is not None
    assert (trained.predict(x).argmax(1) == y).all()
    fooled = trained.predict(adversarial).argmax(1) != y
    np.testing.assert_array_equal(record.success, fooled)
    assert fooled.mean() >= 0.75
    assert_inside(adversarial, x, p, EPS[p])
    assert sizes(adversarial, x, p).max() > 0.9 * EPS[p]
    assert all(getattr(record, name).shape == (8,) for name in AttackRecord.__annotations__)
    assert (record.iterations == Joint().max_iter).all()
    products = Joint().max_iter + Joint().max_iter // 4  # a quarter take a second one
    assert counter.vjps == record.vjps.sum()
    assert (record.vjps >= products).all()
    assert (record.vjps <= Joint().max_iter * Joint().max_adjoint_steps).all()
    assert counter.f_evals == record.f_evals.sum() > record.vjps.sum()
    assert (record.verification_f_evals > 0).all()
    followed = record.status == Status.CONVERGED
    assert followed.any()  # all values are verified; under so much noise some gradients are off
    assert (record.status[~followed] == Status.GRADIENT_UNSETTLED).all()
    assert (record.z_residual < 1e-4).all()
    assert (record.costate_residual > 0).all()
    assert np.median(record.costate_residual) < 0.5
    if p == 1:  # in this ball all images need more, in half of it one does not
        attack.set_params(eps=EPS[p] / 2)
        attack.generate(x, y)
    assert attack.solution is not None
    assert attack.solution.vjps.min() == products
    assert f"{followed.sum()} × CONVERGED" in record.report()
    price = (record.f_evals + record.vjps).mean()
    assert f"price per row: {price:.3g} evaluations of f and VJPs, as much as" in record.report()
    # in the batches of the attack: the own solves are loose, and other kernels end elsewhere
    truth = np.eye(10, dtype=np.float32)[y]
    batches = (slice(0, 5), slice(5, 8))
    loss = np.concatenate([trained.compute_loss(adversarial[b], truth[b]) for b in batches])
    np.testing.assert_allclose(-record.value, loss, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(-record.model_value, loss, rtol=1e-3, atol=1e-3)


def test_the_share_of_fooled_images_is_logged(
    trained: PyTorchClassifier, digits: Digits, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = digits
    y = np.where(np.arange(len(y)) < 6, y, (y + 1) % 10)  # the last are wrong as they are
    attack = attack_on(trained, norm=2, eps=0.0, max_iter=1)
    with caplog.at_level("INFO", logger="jiio_art.attack"):
        attack.generate(x, y)
    assert caplog.messages == ["Success rate of attack: 25.00%"]
    caplog.clear()
    attack.set_params(verify=False)  # nothing is known then
    with caplog.at_level("INFO", logger="jiio_art.attack"):
        attack.generate(x, y)
    assert caplog.messages == []


@pytest.mark.parametrize("loss", ["cross-entropy", "dlr", "margin"])
def test_every_loss_reaches_a_target(trained: PyTorchClassifier, digits: Digits, loss: str) -> None:
    x, y = digits
    targets = (y + 1) % 10
    attack = attack_on(trained, eps=2.0, targeted=True, loss=loss)
    adversarial = attack.generate(x, targets)
    assert (trained.predict(adversarial).argmax(1) == targets).mean() >= 0.75
    assert_inside(adversarial, x, 2, 2.0)


def test_early_stop_costs_less(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    whole, early = attack_on(trained), attack_on(trained, early_stop=True)
    whole.generate(x, y)
    early.generate(x, y)
    assert early.solution.success.all()
    assert early.solution.vjps.sum() < 0.5 * whole.solution.vjps.sum()


def test_first_step_and_iterations(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    ours = attack_on(trained, eps=0.8, eps_step=0.4, max_iter=6)
    same = attack_on(trained, eps=0.8, method=Joint(max_iter=6, step_size=0.5))
    other = attack_on(trained, eps=0.8, max_iter=6)
    result = ours.generate(x, y)
    assert (ours.solution.iterations == 6).all()
    np.testing.assert_allclose(result, same.generate(x, y), atol=1e-6)
    assert np.abs(result - other.generate(x, y)).max() > 1e-3


def test_another_method(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, method=Nested(max_iter=9), max_iter=3)
    assert_inside(attack.generate(x[:2], y[:2]), x[:2], 2, 1.0)
    assert (attack.solution.iterations == 3).all()
    assert (attack.solution.vjps > 3).all()  # an adjoint solve takes more than one


def test_verification_can_be_left_out(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, verify=False, batch_size=5)
    adversarial = attack.generate(x, y)
    assert (trained.predict(adversarial).argmax(1) != y).mean() >= 0.75
    record = attack.solution
    assert (record.status == Status.UNVERIFIED).all()
    assert not record.success.any()
    assert np.isnan(record.value).all()
    assert np.isnan(record.model_value).all()
    assert (record.verification_f_evals == 0).all()
    assert "8 × UNVERIFIED" in record.report()
    assert "adjoint residual: median" in record.report()
    with pytest.raises(TypeError, match="verify must be Anderson"):
        attack.set_params(verify="no")


def test_retry(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    short = attack_on(trained, eps=0.5, max_iter=2)
    short.generate(x, y)
    both = attack_on(trained, eps=0.5, max_iter=2, retry=Joint(max_iter=10))
    assert_inside(both.generate(x, y), x, 2, 0.5)
    missed = ~short.solution.success
    assert missed.any()
    assert (both.solution.iterations == 2 + 10 * missed).all()
    with pytest.raises(TypeError, match="retry must be Joint"):
        attack_on(trained, retry=40)


def test_the_batch_size_does_not_matter(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    one, many = attack_on(trained, batch_size=3), attack_on(trained, batch_size=8)
    np.testing.assert_allclose(one.generate(x, y), many.generate(x, y), atol=1e-3)
    np.testing.assert_allclose(one.solution.value, many.solution.value, rtol=1e-3, atol=1e-3)


def test_random_starts(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    x, y = np.repeat(x[:1], 4, axis=0), np.repeat(y[:1], 4)
    attack = attack_on(trained, norm=np.inf, eps=0.03, num_random_init=1, batch_size=2, max_iter=2)
    first = attack.generate(x, y)
    np.testing.assert_array_equal(first, attack.generate(x, y))
    assert len(np.unique(first.reshape(4, -1), axis=0)) == 4  # in a batch and between batches
    attack.set_params(seed=1)
    assert not np.array_equal(first, attack.generate(x, y))
    assert_inside(first, x, np.inf, 0.03)


def test_restarts_keep_the_best_of_each_sample(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    one = attack_on(trained, norm=np.inf, eps=0.06, num_random_init=1, max_iter=8)
    three = attack_on(trained, norm=np.inf, eps=0.06, num_random_init=3, max_iter=8)
    one.generate(x, y)
    three.generate(x, y)
    before, after = one.solution, three.solution
    assert not before.success.all()  # else there would be no second start
    assert (after.success >= before.success).all()
    assert (
        after.value[after.success == before.success]
        <= before.value[after.success == before.success] + 1e-6
    ).all()
    assert (after.value < before.value - 1e-3).any()
    # a sample that has succeeded is not started again, and its verification said so
    paid = before.vjps + before.verification_vjps
    np.testing.assert_array_equal(after.vjps[before.success], paid[before.success])
    assert (after.vjps[~before.success] > before.vjps[~before.success]).all()


# ART's hooks ------------------------------------------------------------------------------------


def test_parameters_as_art_has_them(shared_small: PyTorchClassifier) -> None:
    attack = attack_on(shared_small)
    assert attack.estimator is shared_small
    assert attack.targeted is False
    attack.set_params(targeted=True, eps=np.ones(3), max_iter=7)
    assert attack.targeted is True
    assert attack.max_iter == 7
    with pytest.raises(ValueError, match="cannot be set"):
        attack.set_params(decay=1.0)
    text = repr(attack)
    assert text.startswith("JIIOAttack(norm=2, ")
    assert all(f"{name}=" in text for name in JIIOAttack.attack_params)
    defaults = JIIOAttack(shared_small)
    assert (defaults.norm, defaults.eps, defaults.batch_size) == (np.inf, 0.3, 32)


def test_copies(shared_small: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(shared_small, max_iter=2)
    result = attack.generate(x, y)
    np.testing.assert_array_equal(copy.deepcopy(attack).generate(x, y), result)
    record = pickle.loads(pickle.dumps(attack.solution))
    np.testing.assert_array_equal(record.value, attack.solution.value)
    with pytest.raises(AttributeError):
        record.value = None


def test_inside_auto_attack(
    trained: PyTorchClassifier, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = digits
    # AutoAttack imports this package of ART's optional ones, and here does nothing with it
    monkeypatch.setitem(sys.modules, "multiprocess", sys.modules[__name__])
    members = [attack_on(trained, eps=0.5, max_iter=4), attack_on(trained, eps=0.5, max_iter=12)]
    auto = AutoAttack(
        trained, norm=2, eps=0.5, eps_step=0.1, attacks=members, batch_size=8, targeted=True
    )
    adversarial = auto.generate(x, y)
    assert_inside(adversarial, x, 2, 0.5)
    alone = members[1]
    alone.set_params(targeted=False)
    alone.generate(x, y)
    fooled = trained.predict(adversarial).argmax(1) != y
    assert fooled.sum() >= alone.solution.success.sum() > 0


def test_adversarial_accuracy(trained: PyTorchClassifier, digits: Digits) -> None:
    x, y = digits
    attack = attack_on(trained, eps=0.3, max_iter=10)
    accuracy = adversarial_accuracy(trained, x, y, attack_crafter=attack)
    assert accuracy == 1 - attack.solution.success.mean()
    assert 0 < accuracy < 1


def test_adversarial_training(
    make_classifier: Callable[..., PyTorchClassifier], digits: Digits
) -> None:
    x, y = digits
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (ART's trainer draws from the global state)
    model = ConvDEQClassifier(channels=4, groups=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    classifier = make_classifier(model, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    attack = attack_on(classifier, max_iter=2, verbose=True)
    trainer = AdversarialTrainer(classifier, attack, ratio=0.5)
    trainer.fit(x, np.eye(10, dtype=np.float32)[y], batch_size=4, nb_epochs=1)
    assert attack.verbose is False
    assert attack.solution.f_evals.shape == (2,)
    after = [p.detach() for p in model.parameters()]
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Recorder(SummaryWriter):
    def __init__(self) -> None:
        super().__init__(summary_writer=False)
        self.updates: list[dict[str, Any]] = []
        self.resets = 0

    def _init_summary_writer(self, summary_writer: Any, init_counter: int) -> None:
        pass

    def update(self, batch_id: int, global_step: int, **kwargs: Any) -> None:  # type: ignore[override]
        self.updates.append({"batch_id": batch_id, "global_step": global_step, **kwargs})

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("targeted", [False, True])
def test_summary_writer(trained: PyTorchClassifier, digits: Digits, targeted: bool) -> None:
    x, y = digits
    writer = Recorder()
    attack = attack_on(
        trained,
        eps=0.02,
        method=Joint(max_iter=12, gap_tol=0.0),  # all images take all steps
        batch_size=5,
        targeted=targeted,
        summary_writer=writer,
    )
    attack.generate(x, y)
    assert [(u["batch_id"], u["global_step"]) for u in writer.updates] == [
        (batch, step) for batch in range(2) for step in range(12)
    ]
    assert writer.resets == 1
    last = writer.updates[11]
    assert last["x"].shape == last["grad"].shape == (5, 1, 8, 8)
    assert last["estimator"] is trained
    assert last["targeted"] is targeted
    assert last["patch"] is None
    np.testing.assert_array_equal(last["y"], np.eye(10)[y[:5]])
    np.testing.assert_array_equal(writer.updates[0]["x"], x[:5])
    # uphill for the attacker, as ART's own attacks write it
    exact = trained.loss_gradient(last["x"], last["y"]) * (-1 if targeted else 1)
    trained.model.zero_grad()
    cosine = (exact * last["grad"]).sum((1, 2, 3)) / np.sqrt(
        np.square(exact).sum((1, 2, 3)) * np.square(last["grad"]).sum((1, 2, 3))
    )
    assert cosine.min() > 0.9


def test_tensorboard(trained: PyTorchClassifier, digits: Digits, tmp_path: Any) -> None:
    pytest.importorskip("tensorboardX")
    x, y = digits
    attack = attack_on(
        trained, max_iter=2, num_random_init=2, loss="margin", summary_writer=str(tmp_path)
    )
    attack.generate(x[:2], y[:2])
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*events*")}
    assert any("loss" in name for name in written)
    assert any("gradients" in name for name in written)


def test_progress_bar(
    shared_small: PyTorchClassifier, digits: Digits, capfd: pytest.CaptureFixture[str]
) -> None:
    for verbose in (False, True):
        attack_on(shared_small, max_iter=1, batch_size=4, verbose=verbose).generate(*digits)
        assert ("JIIO - Batches" in capfd.readouterr().err) is verbose
