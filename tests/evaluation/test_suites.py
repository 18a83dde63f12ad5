"""The ready suites, with the real host library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Anderson
from jiio_plugins.data.classification import load_digits
from jiio_plugins.evaluation import default_suite, host_attack, quick_suite, robust_accuracy
from jiio_plugins.models import load_pretrained
from tests.helpers import Net, rand

EPS = {2.0: 0.3, float("inf"): 0.06, 1.0: 2.0}
SMALL: dict[str, Any] = {"steps": 4, "queries": 6}


MODEL = load_pretrained("digits")  # building one draws from the global generator


def evaluate(attacks: Any, norm: float) -> Any:
    x, y = load_digits("test")
    return robust_accuracy(
        MODEL,
        x[:10],
        y[:10],
        attacks,
        eps=EPS[norm],
        norm=norm,
        audit=0,
        progress=False,
        skip_broken=False,
    )


@pytest.mark.parametrize("norm", [2.0, float("inf")])
def test_default_suite(norm: float) -> None:
    suite = default_suite(eps=EPS[norm], norm=norm, **SMALL)
    state = torch.get_rng_state()
    report = evaluate(suite, norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert [a.name for a in report.attacks] == [
        "JIIO",
        "JIIO, DLR",
        "PGD nested, tight",
        "APGD-CE",
        "APGD-DLR",
        "PGD unrolled",
        "PGD intermediate",
        "Square",
    ]
    assert report.accuracy.value < report.clean.value
    by_name = {a.name: a for a in report.attacks}
    assert by_name["Square"].vjps == 0
    assert all(a.f_evals > 0 and a.seconds > 0 for a in report.attacks)
    for name in ("JIIO", "APGD-CE", "PGD unrolled"):
        assert by_name[name].broken > 0
    # deterministic, whatever the global generator holds
    torch.manual_seed(99)
    again = evaluate(suite, norm)
    assert torch.equal(again.worst, report.worst)


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_quick_suite(norm: float) -> None:
    report = evaluate(quick_suite(eps=EPS[norm], norm=norm), norm)
    assert [a.gradient for a in report.attacks] == ["implicit", "own", "implicit"]
    assert report.accuracy.value < report.clean.value


class TwoClasses(nn.Module):
    """Images ``(rows, ...)`` of six pixels to two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(inputs=6, outputs=2, seed=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


@pytest.mark.parametrize("shape", [(1, 2, 3), (6,)])
@pytest.mark.parametrize("name", ["quick", "default"])
def test_a_suite_leaves_out_what_cannot_run_and_says_so(name: str, shape: tuple[int, ...]) -> None:
    model, x = TwoClasses(), rand(4, *shape, seed=1).sigmoid()
    with torch.no_grad():
        y = model(x).argmax(1)
    ball: dict[str, Any] = {"eps": 0.2, "norm": 2.0}
    suite = quick_suite(**ball) if name == "quick" else default_suite(**ball, **SMALL)
    report = robust_accuracy(model, x, y, suite, **ball, audit=0, progress=False)
    host = {"APGD-CE", "APGD-DLR", "Square"}
    gone = {"JIIO, DLR"} if name == "quick" else {"JIIO, DLR", "APGD-DLR", "Square"}
    if name == "default" and len(shape) == 1:
        gone |= host
    assert set(report.left_out) == gone
    assert [a.name for a in report.attacks] == [a.name for a in suite if a.name not in gone]
    assert "left out (JIIO, DLR): the dlr loss needs 3 classes or more, the model has 2" in str(
        report
    )
    assert report.to_dict()["left_out"] == report.left_out
    alone = [attack for attack in suite if attack.name in gone]
    with pytest.raises(ValueError, match=r"none of the attacks can run .* JIIO, DLR: the dlr loss"):
        robust_accuracy(model, x, y, alone, **ball, audit=0, progress=False)


def test_another_pixel_range_is_rescaled() -> None:
    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = load_pretrained("digits")
            self.inner.equilibrium.solver = Anderson(max_iter=200, tol=1e-5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner((x + 1) / 2)
            return logits

    x, y = load_digits("test")
    x, y = x[:6], y[:6]
    model = Signed().eval()
    settings: dict[str, Any] = {"loss": "ce", "steps": 5}
    unit = host_attack("a", "own", "APGD", eps=0.3, norm=2, **settings).run(model.inner, x, y)
    signed = host_attack(
        "a", "own", "APGD", eps=0.6, norm=2, lower=-1.0, upper=1.0, **settings
    ).run(model, 2 * x - 1, y)
    torch.testing.assert_close((signed + 1) / 2, unit, rtol=0, atol=1e-3)
    assert not torch.equal(unit, x)
    assert not model.training


def test_no_radius_changes_nothing() -> None:
    x, y = load_digits("test")
    attack = host_attack("a", "own", "APGD", eps=0.0, norm=2, loss="ce")
    assert torch.equal(attack.run(load_pretrained("digits"), x[:2], y[:2]), x[:2])


def test_missing_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name="torchattacks")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'jiio-plugins\[torchattacks\]'"):
        default_suite(eps=0.3, norm=2)
    quick_suite(eps=0.3, norm=2)  # needs none


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="quick_suite takes the L1 norm"):
        default_suite(eps=0.3, norm=1)
    with pytest.raises(ValueError, match="steps and queries"):
        default_suite(eps=0.3, norm=2, steps=0)
    with pytest.raises(ValueError, match="bounded pixel range"):
        default_suite(eps=0.3, norm=2, lower=1.0, upper=0.0)
    with pytest.raises(TypeError, match="two numbers"):
        default_suite(eps=0.3, norm=2, lower=torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm must be"):
        quick_suite(eps=0.3, norm=3)


def test_what_torchattacks_cannot_do_says_so() -> None:
    settings: dict[str, Any] = {"eps": 0.3, "norm": 2}
    dlr = host_attack("a", "own", "APGD", loss="dlr", **settings)
    flat = torch.zeros(2, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="3 classes"):
        dlr.run(Net(outputs=2), flat[:, :, None, None], labels)
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\), got \(2, 5\)"):
        dlr.run(Net(outputs=3), flat, labels)
