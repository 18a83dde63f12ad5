"""Pictures: what is drawn, and that it is a file of its kind."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from jiio_plugins import plots

if TYPE_CHECKING:
    from pathlib import Path


def test_rows_of_images() -> None:
    x = torch.rand(3, 3, 4, 4)
    figure = plots.images(
        {"x": x, "change": x[:2] - 0.5}, titles={"x": ["a", "b", "c"]}, signed=["change"]
    )
    above, below = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title() for axis in above] == ["a", "b", "c"]
    assert above[0].get_ylabel() == "x"
    shown = torch.from_numpy(above[1].get_images()[0].get_array().data)
    torch.testing.assert_close(shown, x[1].permute(1, 2, 0))
    low, high = below[0].get_images()[0].get_clim()
    assert low == -high == pytest.approx(-float((x[:2] - 0.5).mean(1).abs().max()))
    assert [len(axis.get_images()) for axis in below] == [1, 1, 0]  # none for the third
    with pytest.raises(ValueError, match="no images to show"):
        plots.images({"x": x[:0]})


def test_curves_and_residuals() -> None:
    figure = plots.curves({"a": ([1, 2], [3, 4])}, log="x", styles={"a": "o"}, title="t")
    (line,) = figure.axes[0].get_lines()
    assert (line.get_marker(), figure.axes[0].get_xscale()) == ("o", "log")
    figure = plots.residuals({"plain": [(0.5, 0.9), (0.1, 0.8)], "Anderson": [(0.2, 0.3)]})
    middle, worst = (figure.axes[0].get_lines()[k] for k in (0, 2))
    assert list(middle.get_ydata()) == [0.5, 0.1]
    assert list(worst.get_ydata()) == [0.9, 0.8]
    assert middle.get_color() == worst.get_color()
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_its_images(channels: int, tmp_path: Path) -> None:
    images = torch.rand(5, channels, 60, 60)
    plots.save(tmp_path / "sheet.png", plots.sheet(images, columns=3))
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.size == (3 * 61 + 1, 2 * 61 + 1)
        pixel = read.getpixel((61 + 1 + 7, 61 + 1 + 9))  # of the fifth image
    expected = (images[4, :, 9, 7] * 255).round().int().tolist()
    assert pixel == (expected[0] if channels == 1 else tuple(expected))


def test_files_by_their_ending(tmp_path: Path) -> None:
    figure, sheet = plots.curves({}), plots.sheet(torch.rand(1, 1, 8, 8))
    plots.save(tmp_path / "figure.svg", figure)
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    plots.save(tmp_path / "sheet.jpg", sheet)
    assert (tmp_path / "sheet.jpg").read_bytes()[:2] == b"\xff\xd8"
    for picture in (figure, sheet):
        with pytest.raises(ValueError, match="format"):
            plots.save(tmp_path / "picture.none", picture)
    assert {path.name for path in tmp_path.iterdir()} == {"figure.svg", "sheet.jpg"}


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def without(name: str, *args: Any, **kw: Any) -> Any:
        if name.partition(".")[0] in ("matplotlib", "PIL"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return there(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (lambda: plots.curves({}), lambda: plots.sheet(torch.rand(1, 1, 8, 8))):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jiio-plugins\[plots\]'"):
            draw()
