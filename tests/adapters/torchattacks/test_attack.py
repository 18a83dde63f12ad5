"""``jiio_torchattacks.JIIO`` against what torchattacks and its users expect of an attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchattacks
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from jiio_plugins import (
    Joint,
    Nested,
    Picard,
    Status,
    attack as engine_attack,
    count_evaluations,
)
from jiio_plugins.data.classification import load_digits
from jiio_plugins.models import load_pretrained
from jiio_plugins.solution import ConvergenceWarning
from jiio_torchattacks import JIIO
from tests.adapters.torchattacks.helpers import (
    CLASSES,
    MEAN,
    ORDER,
    SHAPE,
    STD,
    Normalize,
    assert_inside,
    batch,
    net,
    size,
    value,
)
from tests.helpers import independent_output

if TYPE_CHECKING:
    from torchattacks.attack import Attack

# Does it attack? --------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.6), ("Linf", 0.15)])
def test_breaks_a_trained_classifier_cheaper_than_pgd(norm: str, eps: float) -> None:
    model = load_pretrained("digits")
    images, labels = (t[:24] for t in load_digits("test"))
    torch.manual_seed(0)
    if norm == "L2":
        pgd: Attack = torchattacks.PGDL2(model, eps=eps, alpha=eps / 4, steps=10)
    else:
        pgd = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=10)
    with count_evaluations() as spent:
        by_pgd = pgd(images, labels)
    atk = JIIO(model, norm=norm, eps=eps, steps=20)
    adversarial = atk(images, labels)
    assert_inside(adversarial, images, norm, eps)
    accuracy = [
        float((independent_output(model, x, steps=100).argmax(1) == labels).double().mean())
        for x in (images, by_pgd, adversarial)
    ]
    assert accuracy[0] > 0.9
    assert accuracy[2] <= accuracy[1] + 0.05
    assert accuracy[2] < 0.5
    cost = atk.solution.stats.f_evals + atk.solution.stats.vjps
    assert 3 * float(cost.sum()) < spent.f_evals + spent.vjps


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_is_the_engines_attack(norm: str, loss: str) -> None:
    model, (images, labels) = net(), batch()
    adversarial = JIIO(model, norm=norm, eps=0.3, loss=loss, steps=7)(images, labels)
    direct = engine_attack(
        model,
        images,
        labels,
        norm=ORDER[norm],
        eps=0.3,
        lower=0.0,
        upper=1.0,
        loss="cross-entropy" if loss == "ce" else loss,
        method=Joint(max_iter=7),
    )
    assert torch.equal(adversarial, direct.x)
    assert not torch.equal(adversarial, images)


def test_defaults_are_those_of_the_hosts_attacks() -> None:
    model, (images, labels) = net(), batch(2)
    assert JIIO(model).eps == torchattacks.PGDL2(model).eps
    assert JIIO(model, norm="Linf").eps == torchattacks.PGD(model).eps
    atk = JIIO(model)
    atk(images, labels)
    direct = engine_attack(model, images, labels, norm=2, eps=1.0, lower=0.0, upper=1.0)
    assert torch.equal(atk.solution.stats.iterations, direct.stats.iterations)


def test_a_larger_ball_gives_a_larger_loss() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    losses = [
        float(value(model, JIIO(model, eps=eps)(images, labels), labels).mean())
        for eps in (0.0, 0.1, 0.4, 1.6)
    ]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 1


def test_no_radius_returns_the_images() -> None:
    # torchattacks' PGDL2 gives NaN here
    model, (images, labels) = net(), batch()
    for norm in ORDER:
        adversarial = JIIO(model, norm=norm, eps=0)(images, labels)
        torch.testing.assert_close(adversarial, images, rtol=0, atol=0)


def test_method_steps_and_early_stop() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    atk = JIIO(model, eps=2.0, method=Nested(max_iter=3))
    assert_inside(atk(images, labels), images, "L2", 2.0)
    assert atk.solution.stats.iterations.tolist() == [3] * 6
    atk.steps = 5
    atk(images, labels)
    assert atk.solution.stats.iterations.tolist() == [5] * 6
    atk = JIIO(model, eps=2.0, steps=40)
    atk(images, labels)
    full = atk.solution.stats.f_evals.sum()
    atk.early_stop = True
    adversarial = atk(images, labels)
    assert atk.solution.stats.f_evals.sum() < full / 2
    assert bool((independent_output(model, adversarial).argmax(1) != labels).all())


def test_random_starts() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    atk = JIIO(model, eps=0.2, random_starts=2, steps=3)
    first = atk(images, labels)
    assert_inside(first, images, "L2", 0.2)
    assert torch.equal(first, atk(images, labels))
    other = JIIO(model, eps=0.2, random_starts=2, steps=3, seed=1)(images, labels)
    assert not torch.equal(first, other)
    assert not torch.equal(first, JIIO(model, eps=0.2, steps=3)(images, labels))


def test_retry() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    short = JIIO(model, eps=0.05, steps=2)
    missed = independent_output(model, short(images, labels)).argmax(1) == labels
    assert bool(missed.any())
    both = JIIO(model, eps=0.05, steps=2, retry=Joint(max_iter=10, gap_tol=0.0))
    both(images, labels)
    assert bool((both.solution.stats.iterations == 2 + 10 * missed).all())


def test_verification_can_be_left_out() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    checked, unchecked = JIIO(model, steps=5), JIIO(model, steps=5, verify=False)
    torch.testing.assert_close(unchecked(images, labels), checked(images, labels))
    assert bool((unchecked.solution.status == Status.UNVERIFIED).all())
    assert unchecked.solution.value is None
    with pytest.raises(TypeError, match="verify must be Anderson"):
        JIIO(model, verify="no")  # type: ignore[arg-type]


def test_images_not_to_be_relied_on_are_told_of_once_a_call() -> None:
    model, (images, labels) = net(), batch(saturated=False)
    atk = JIIO(model, steps=5)
    atk(images, labels)  # a sound model: warnings are errors
    model.equilibrium.solver = Picard(max_iter=1)
    with pytest.warns(ConvergenceWarning) as told:
        atk(images, labels)
    message = str(told[0].message)
    wrong = int((atk.solution.status == Status.DISAGREEMENT).sum())
    assert len(told) == 1
    assert told[0].filename == __file__
    assert message.startswith(f"{wrong} of 6 rows are not to be relied on:\n{wrong} × DISAGREEMENT")
    assert Status.DISAGREEMENT.message in message
    atk.verify = False
    atk(images, labels)  # what has been left out on purpose is no reason


def test_batch_of_one_is_a_row_of_the_batch() -> None:
    model, (images, labels) = net(), batch(7)
    for norm in ORDER:
        atk = JIIO(model, norm=norm, eps=0.3)
        together = atk(images, labels)
        alone = torch.cat([atk(images[k : k + 1], labels[k : k + 1]) for k in range(7)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


def test_float64_and_float32() -> None:
    images, labels = batch(saturated=False)
    for norm, order in ORDER.items():
        double = JIIO(net(), norm=norm, eps=0.1)(images, labels)
        single = JIIO(net(torch.float32), norm=norm, eps=0.1)(images.float(), labels)
        assert double.dtype == torch.float64
        assert single.dtype == torch.float32
        delta = torch.linalg.vector_norm((double - images).flatten(1), ord=order, dim=1)
        assert float(delta.max()) <= 0.1 * (1 + 1e-14)
        by_double, by_single = (value(net(), x.double(), labels) for x in (double, single))
        torch.testing.assert_close(by_single, by_double, rtol=1e-3, atol=1e-4)


# Ball and box -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:eps is")  # larger than the box
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_inside_ball_and_box(data: st.DataObject) -> None:
    norm = data.draw(st.sampled_from(["L2", "Linf"]))
    eps = data.draw(st.one_of(st.just(0.0), st.floats(1e-4, 0.2), st.floats(0.2, 8.0)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    rows = data.draw(st.integers(1, 4))
    images, labels = batch(rows, dtype, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    atk = JIIO(
        net(dtype),
        norm=norm,
        eps=eps,
        steps=data.draw(st.integers(1, 6)),
        loss=data.draw(st.sampled_from(["ce", "dlr", "margin"])),
        random_starts=data.draw(st.integers(0, 2)),
        early_stop=data.draw(st.booleans()),
    )
    mode = data.draw(st.sampled_from(["default", "label", "random", "least likely"]))
    if mode == "label":
        atk.set_mode_targeted_by_label(quiet=True)
    elif mode == "random":
        atk.set_mode_targeted_random(quiet=True)
    elif mode == "least likely":
        atk.set_mode_targeted_least_likely(data.draw(st.integers(1, CLASSES - 1)), quiet=True)
    assert_inside(atk(images, labels), images, norm, eps)


@pytest.mark.filterwarnings("ignore:eps is")  # larger than the box
@settings(deadline=None, max_examples=10)
@given(
    norm=st.sampled_from(["L2", "Linf"]),
    eps=st.floats(0, 4),
    seed=st.integers(0, 99),
    random_starts=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_inside_ball_and_box_when_normalised(
    norm: str, eps: float, seed: int, random_starts: int, dtype: torch.dtype
) -> None:
    images, labels = batch(3, dtype, seed)
    atk = JIIO(net(dtype), norm=norm, eps=eps, steps=4, random_starts=random_starts)
    atk.set_normalization_used(MEAN, STD)
    result = atk(atk.normalize(images), labels)
    assert_inside(atk.solution.x, images, norm, eps + 1e-6)  # the images went there and back
    assert torch.equal(result, atk.normalize(atk.solution.x))


# Inside torchattacks ----------------------------------------------------------------------------


@pytest.mark.parametrize(("normalised", "eps"), [(False, 0.6), (True, 0.06)])
def test_multi_attack(normalised: bool, eps: float) -> None:
    model, (images, labels) = net(torch.float32), batch(12, torch.float32, saturated=False)
    if normalised:
        inside = nn.Sequential(Normalize(MEAN, STD, torch.float32), model).eval()
        with torch.no_grad():
            labels = inside(images).argmax(1)
    weak = torchattacks.PGDL2(model, eps=eps, alpha=eps / 3, steps=4, random_start=False)
    strong = JIIO(model, eps=1.5)
    multi = torchattacks.MultiAttack([weak, strong])
    given = images
    if normalised:
        multi.set_normalization_used(MEAN, STD)
        given = multi.normalize(images)
    left = int((model(weak(given, labels)).argmax(1) == labels).sum())
    assert 0 < left < 12  # both attacks have something to do
    result = multi(given, labels)
    assert strong.solution.x.shape == (left, *SHAPE)
    with torch.no_grad():
        assert bool((model(result).argmax(1) != labels).all())
    pixels = multi.inverse_normalize(result) if normalised else result
    assert float(size(pixels.double() - images.double(), "L2").max()) <= 1.5 + 1e-5
    assert multi._normalization_applied is strong._normalization_applied


def test_multi_attack_of_two_and_first_place() -> None:
    model, (images, labels) = net(), batch(4)
    first, second = JIIO(model, eps=0.0), JIIO(model, norm="Linf", eps=0.5)
    torchattacks.MultiAttack([first, second])(images, labels)
    assert first.solution.x.shape == second.solution.x.shape == images.shape


def test_save(tmp_path: Any) -> None:
    model, (images, labels) = net(), batch(6, saturated=False)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    atk = JIIO(model, eps=1.5)
    accuracy, l2, _ = atk.save(loader, tmp_path / "x.pt", verbose=False, return_verbose=True)
    assert accuracy == 0
    assert 0 < l2 <= 1.5 + 1e-6
    saved = torch.load(tmp_path / "x.pt")
    torch.testing.assert_close(saved["adv_inputs"][:4], atk(images[:4], labels[:4]))


def test_repr_is_one_line_of_settings() -> None:
    model, (images, labels) = net(), batch(2)
    atk = JIIO(model, norm="Linf", eps=0.25, steps=2, method=Joint(step_size=torch.ones(2)))
    before = repr(atk)
    atk(images, labels)
    assert repr(atk) == before
    assert before.startswith("JIIO(")
    assert "norm=Linf, eps=0.25, steps=2" in before


# On an accelerator ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("mode", ["default", "by_label", "random", "least_likely"])
@pytest.mark.parametrize("normalised", [False, True])
def test_cuda_agrees_with_the_cpu(norm: str, mode: str, normalised: bool) -> None:
    images, labels = batch(8)
    results = []
    for device in ("cpu", "cuda"):
        atk = JIIO(net().to(device), norm=norm, eps=0.3)
        if mode != "default":
            getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
        if normalised:
            atk.set_normalization_used(MEAN, STD)
        given = atk.normalize(images) if normalised else images
        state = torch.cuda.get_rng_state()
        assert atk(given, labels).device.type == device  # the images came from the CPU
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert_inside(atk.solution.x.cpu(), images, norm, 0.3 + 1e-12)
        results.append(atk.solution)
    on_cpu, on_cuda = results
    torch.testing.assert_close(on_cuda.x.cpu(), on_cpu.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(on_cuda.value.cpu(), on_cpu.value, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_random_starts_and_multi_attack() -> None:
    model, (images, labels) = net(torch.float32).cuda(), batch(8, torch.float32)
    state = torch.cuda.get_rng_state()
    atk = JIIO(model, eps=0.5, random_starts=2, steps=5)
    adversarial = atk(images, labels)
    assert torch.equal(adversarial, atk(images.cuda(), labels.cuda()))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_inside(adversarial.cpu(), images, "L2", 0.5)
    weak = torchattacks.PGDL2(model, eps=0.05, alpha=0.02, steps=2)
    result = torchattacks.MultiAttack([weak, atk])(images, labels)
    assert_inside(result.cpu(), images, "L2", 0.5)
