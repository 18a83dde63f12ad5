"""``jiio_plugins.check``: what it says of models whose nature is known."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from jiio_plugins import Anderson, Equilibrium, Phantom, check, diagnosis
from jiio_plugins.cli.main import main
from tests.equilibrium.specimens import Hooked, Model, iterate
from tests.helpers import ROOT, TIGHT, Affine, TanhCell, contraction, linear, rand, rotation
from tests.test_whole_batches import Net

if TYPE_CHECKING:
    from pathlib import Path

X = rand(6, 5, seed=4)


class Around(nn.Module):
    """A cell between two linear maps."""

    def __init__(self, cell: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.encoder, self.head = linear(5, 6, seed=1), linear(6, 3, seed=3)
        self.deq = Equilibrium(cell, **{"solver": TIGHT, **settings})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deq(self.encoder(x)))


def test_a_model_without_faults(tmp_path: Path) -> None:
    found = check(Around(Affine(contraction(6, 0.6, symmetric=True, seed=2))), X)
    assert found.batch_first
    assert found.repeatable
    assert found.on_some_rows
    assert found.independent
    assert found.rate == pytest.approx(0.6, abs=0.02)
    assert found.residual is not None
    assert found.residual < 1e-10
    assert found.gradient_cosine == pytest.approx(1.0)
    assert found.gradient_ratio == pytest.approx(1.0, abs=1e-3)
    assert found.settings == "Joint()"
    assert found.plain[-1][1] < 1e-6
    assert found.anderson[-1][1] < 1e-9
    assert str(found) == "\n".join(found.sentences)
    assert found.sentences[0] == "Start with method=Joint(): the defaults."
    assert found.sentences[1].endswith("nothing has to be written.")  # there is nothing to mind
    found.save(tmp_path / "check.json")
    assert json.loads((tmp_path / "check.json").read_text())["independent"] is True
    found.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 1000


def test_a_gradient_is_judged_where_there_is_an_exact_one() -> None:
    class Some(nn.Module):
        """Rows whose injection is negative have no fixed point."""

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return torch.where(u[:, :1] > 0, 0.5 * z.roll(1, 1) + u, z + 1)

    model = Around(Some())
    model.encoder = nn.Identity()  # type: ignore[assignment]
    model.head = linear(5, 3, seed=3)
    x = torch.cat([X.abs()[:4], -X.abs()[:2]])
    found = check(model, x)
    assert found.gradient_cosine == pytest.approx(1.0)
    assert "of the 4 whose fixed point was found" in str(found)
    hopeless = check(model, -X.abs())
    assert hopeless.gradient_cosine is None
    assert "no fixed point was found at which there would be an exact one" in str(hopeless)


class Conditioned(Around):
    """Takes something else beside x."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x + condition)


def test_a_model_that_takes_something_else() -> None:
    model = Conditioned(Affine(contraction(6, 0.6, symmetric=True, seed=2)))
    found = check(model, X, given=(rand(6, 5, seed=9),))
    assert found.independent
    assert found.settings == "Joint()"
    with pytest.raises(TypeError, match=r"got Tensor: what else the model takes goes in given="):
        check(model, X, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"given must be a tuple or list of tensors.*got a tensor"):
        check(model, X, given=X)  # type: ignore[arg-type]


@pytest.mark.parametrize(("angles", "radius"), [([0.5, 1.0, 2.0], 0.95), ([2.0, 2.5, 3.0], 1.3)])
def test_how_contractive(angles: list[float], radius: float) -> None:
    found = check(Around(Affine(rotation(angles, radius))), X)
    assert found.rate == pytest.approx(radius, abs=0.02)
    assert found.settings == "Joint(max_iter=80)"
    assert found.anderson[-1][1] < 1e-4
    assert (found.plain[-1][1] > 1) == (radius > 1) or radius < 1
    assert found.settings in found.sentences[0]
    titles = re.findall(r'the page "(.*?)"', found.sentences[0])
    assert titles == ["Cells that do not contract"] * (radius > 1)
    headings = {path.read_text().partition("\n")[0] for path in ROOT.glob("docs/**/*.md")}
    assert {f"# {title}" for title in titles} <= headings


def test_a_gradient_that_is_none() -> None:
    found = check(
        Around(Affine(rotation([2.0, 2.5, 3.0], 0.9)), adjoint=Phantom(steps=1, damping=0.2)), X
    )
    assert found.gradient_ratio is not None
    assert found.gradient_ratio < 0.6
    assert any("own gradient is" in line for line in found.sentences)
    assert found.sentences[1] == "Mind, see below: the model's own gradient is not to be trusted."


def test_a_layer_that_others_wrote_is_put_back() -> None:
    model = Model("hook").eval()
    before = model(X)
    found = check(model, X)
    assert found.layers == {"deq": "Hooked"}
    assert found.lines == ["import jiio_plugins", "model = jiio_plugins.adapt(model)"]
    assert found.gradient_cosine == pytest.approx(1.0, abs=1e-4)
    assert found.evaluations is not None
    assert found.evaluations[1] > 10
    assert type(model.deq) is Hooked
    assert torch.equal(model(X), before)


def test_nodes_of_a_graph_and_random_starts() -> None:
    found = check(Net("graph", 6), X)
    assert (found.independent, found.on_some_rows) == (False, False)
    assert any("Rows are not independent" in line for line in found.sentences)
    assert found.sentences[1].startswith("Mind, see below: rows are not independent")
    model = Model("hook").eval()
    model.deq.solver = lambda f, z0: iterate(f, torch.rand_like(z0), most=3)
    found = check(model, X)
    assert found.repeatable is False
    assert any("start or solver is random" in line for line in found.sentences)
    assert found.sentences[1].startswith("Mind, see below: two calls differ")

    class Noisy(TanhCell):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return super().forward(z, u) + 0.01 * torch.rand_like(z)

    found = check(Around(Noisy(6, 0.7, seed=2)), X)
    assert any("cell is random" in line for line in found.sentences)


def test_rows_that_are_declared_to_belong_together() -> None:
    model = Around(TanhCell(6, 0.7, seed=2), whole_batch=True)
    found = check(model, X)
    assert (found.independent, found.on_some_rows) == (True, False)
    assert "whole_batch=True says so" in str(found)


def test_a_cell_that_hardly_contracts() -> None:
    """Its solves end anywhere, and its rows are independent nevertheless."""
    matrix = rotation([0.001, 0.01, 0.1], 0.9999)
    found = check(Around(Affine(matrix), solver=Anderson(max_iter=3)), X)
    assert found.independent
    assert found.on_some_rows


def test_an_adjoint_that_does_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_TIGHT", 2)
    found = check(Around(Affine(rotation([0.1, 0.2, 0.3], 0.999))), X)
    assert found.gradient_cosine is None
    assert "cannot be said: in 2 products" in str(found)


def test_states_that_are_not_batch_first() -> None:
    found = check(Net("sequences", 6), X)
    assert found.batch_first is False
    assert "called on 6 rows, the states" in found.sentences[0]


def test_nothing_to_work_on_and_bad_input() -> None:
    found = check(nn.Linear(5, 2).double(), X)
    assert found.layers == {}
    assert "Looked at Linear" in str(found)
    with pytest.raises(ValueError, match="two rows at least"):
        check(Model("hook"), X[:1])
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        check(3, X)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--weights", "digits", "--images", "3", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"check.json", "check.png"}
    assert capsys.readouterr().out.startswith("Start with method=Joint")
