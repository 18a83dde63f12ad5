"""Omniglot as torchvision leaves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from jiio_plugins.data.omniglot import load_omniglot

if TYPE_CHECKING:
    from pathlib import Path


def write_omniglot(root: Path) -> None:
    """Torchvision's folder in small: 16 classes of two drawings, black ink on white."""
    from PIL import Image

    for part, alphabets in (("images_background", ("Greek", "Latin")), ("images_evaluation", "N")):
        for alphabet in alphabets:
            for character in range(6 if part == "images_background" else 4):
                folder = root / "omniglot-py" / part / alphabet / f"character{character:02d}"
                folder.mkdir(parents=True)
                for sample in range(2):
                    image = Image.new("1", (105, 105), 1)
                    image.paste(0, (10 + character, 10, 60, 40 + sample))
                    image.save(folder / f"{character:04d}_{sample:02d}.png")


def test_omniglot_from_torchvisions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Omniglot

    write_omniglot(tmp_path)
    # the archives that torchvision asks for cannot be made here, only what is read out of them
    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: True)
    cache = tmp_path / "cache"
    train, test = (load_omniglot(tmp_path, s, cache=cache) for s in ("train", "test"))
    held = load_omniglot(tmp_path, "validation", cache=cache, size=28)
    assert len(train) == 4 * 12  # 1,200 of 1,623 classes, each in four turns
    assert len(test) == 4
    assert len(held) == 1
    assert train.images.shape[1:] == (2, 1, 28, 28)
    assert not set(train.names) & set(test.names)
    assert set(held.names) <= set(train.names)
    assert float(train.images[:, :, 0, 0, 0].max()) == 0  # paper is 0, ink is high
    assert float(train.images.flatten(2).max(2).values.min()) > 200
    assert len(load_omniglot(tmp_path, "test", rotations=True, cache=cache)) == 16


def test_missing_omniglot_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_omniglot(tmp_path, cache=tmp_path)
    assert "download=True" in str(caught.value)
    assert "omniglot-py" in str(caught.value)
    with pytest.raises(ValueError, match="split must be"):
        load_omniglot(tmp_path, "val", cache=tmp_path)
