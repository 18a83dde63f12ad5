"""Finding and loading the adapters."""

from __future__ import annotations

import pytest

from jiio_plugins.hosts import load_adapter


def test_load_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_adapter("art").__name__ == "jiio_art"
    with pytest.raises(ValueError, match="art, deepinv, learn2learn, torchattacks, torchdeq"):
        load_adapter("nothing")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name="torchattacks")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'jiio-plugins\[torchattacks\]'"):
        load_adapter("torchattacks")
