"""Steps on z that a row does without, as its μ is what its gradient hangs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jiio_plugins import Joint, attack
from jiio_plugins.data import load_digits
from jiio_plugins.methods import relaxed
from jiio_plugins.models import load_pretrained


def run(rows: slice = slice(64), **settings: Any) -> Any:
    x, y = (t[rows] for t in load_digits("test"))
    method = Joint(max_iter=20, gap_tol=0.0, **settings)
    return attack(load_pretrained("digits"), x, y, norm=2, eps=0.5, method=method)


def test_a_row_whose_state_is_ahead_spares_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    spared = run()
    monkeypatch.setattr(relaxed, "_AHEAD", 0.0)
    whole = run()
    assert float(spared.stats.f_evals.mean()) < 0.93 * float(whole.stats.f_evals.mean())
    assert float(spared.stats.vjps.mean()) < 1.02 * float(whole.stats.vjps.mean())
    assert len(spared.stats.f_evals.unique()) > 3  # each row for itself
    # both are negative
    assert float(spared.value.mean()) < 0.99 * float(whole.value.mean())
    assert float(spared.value.median()) < 0.99 * float(whole.value.median())


def test_it_hangs_on_no_other_row() -> None:
    together, alone = run(), run(slice(3, 4))
    torch.testing.assert_close(alone.x, together.x[3:4], rtol=0, atol=1e-5)
    assert alone.stats.f_evals == together.stats.f_evals[3]


@pytest.mark.parametrize("steps", [{"state_steps": 1}, {"max_state_steps": 2}])
def test_it_belongs_to_the_control(steps: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(slice(4), **steps)
    monkeypatch.setattr(relaxed, "_AHEAD", 0.0)
    assert torch.equal(run(slice(4), **steps).x, found.x)
