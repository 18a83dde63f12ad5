"""Pictures of what was found: images in rows, curves, residuals, sheets.

Each function returns a figure of matplotlib or a picture of Pillow, to be changed, shown or saved.
The commands, the examples and the trainers draw with these. Needs ``pip install
'jiio-plugins[plots]'``.

Example:
    >>> from jiio_plugins import attack, plots
    >>> x_adv = attack(model, x, y, norm=2, eps=0.5).x
    >>> rows = {"clean": x, "perturbation": x_adv - x, "adversarial": x_adv}
    >>> figure = plots.images(rows, signed=["perturbation"])
    >>> len(figure.axes)
    12
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.utils.files import replacing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["curves", "images", "residuals", "save", "sheet"]


@contextmanager
def _needed(library: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"plots need {library}: pip install 'jiio-plugins[plots]'", name=error.name
        ) from error


def need_matplotlib() -> None:
    """Raise now, and not after hours, where there is none to draw with.

    Raises:
        ModuleNotFoundError: matplotlib is missing. The message says what to install.
    """
    with _needed("matplotlib"):
        import matplotlib  # noqa: F401


def _figure(width: float, height: float) -> Figure:
    need_matplotlib()
    from matplotlib.figure import Figure  # not pyplot: no window, and nothing global

    return Figure(figsize=(width, height), layout="constrained")


def images(
    rows: Mapping[str, Tensor],
    *,
    titles: Mapping[str, Sequence[str]] | None = None,
    signed: Collection[str] = (),
) -> Figure:
    """Images in rows, one row under the other.

    Args:
        rows: by name, which stands at the left: images ``(images, c, h, w)`` in [0, 1], with one or
            three channels.
        titles: by name of a row: what stands above each of its images.
        signed: names of rows that hold differences. They are shown as the mean of their channels,
            red below zero and blue above, each row up to its largest.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: no images.
    """
    columns = max((len(row) for row in rows.values()), default=0)
    if not columns:
        raise ValueError("no images to show: give one row of them at least")
    figure = _figure(1.3 * columns + 0.1 * max(map(len, rows)), 1.5 * len(rows) + 0.1)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        shown, style = row.detach().float().cpu(), {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}
        if name in signed:
            shown = shown.mean(1, keepdim=True)
            limit = float(shown.abs().max()) or 1.0
            style = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
        else:
            shown = shown.clamp(0, 1)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, title in zip(line, (titles or {}).get(name, ()), strict=False):
            axis.set_title(title)
        for k, axis in enumerate(line):
            axis.set(xticks=[], yticks=[])
            if k < len(shown):
                axis.imshow(shown[k].permute(1, 2, 0), **style)
            else:
                axis.set_frame_on(False)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log: str = "",
    styles: Mapping[str, str] | None = None,
) -> Figure:
    """Lines in one plot, with a legend.

    Args:
        lines: by label: x and y of the points.
        xlabel: of the axis.
        ylabel: of the axis.
        title: of the plot.
        log: which axes are logarithmic: "", "x", "y" or "xy".
        styles: by label: format of matplotlib, such as ``"o-"``. A line without one is plain.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for label, (x, y) in lines.items():
        axes.plot(x, y, (styles or {}).get(label, "-"), label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for axis in log:
        axes.set(**{f"{axis}scale": "log"})
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    return figure


def residuals(solves: Mapping[str, Sequence[tuple[float, float]]], *, title: str = "") -> Figure:
    """Relative residuals over evaluations of f: the median row, and dotted the worst.

    Args:
        solves: by name: median and largest residual after each evaluation.
        title: of the plot.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    steps = {name: range(1, len(curve) + 1) for name, curve in solves.items()}
    figure = curves(
        {name: (steps[name], [pair[0] for pair in curve]) for name, curve in solves.items()},
        xlabel="evaluations of f",
        ylabel="relative residual",
        title=title,
        log="y",
    )
    axes = figure.axes[0]
    for line, (name, curve) in zip(axes.get_lines(), solves.items(), strict=True):
        axes.plot(steps[name], [pair[1] for pair in curve], ":", color=line.get_color())
    return figure


def sheet(images: Tensor, columns: int = 8) -> Image:
    """Images side by side in one picture, small ones enlarged.

    Args:
        images: ``(images, c, h, w)`` in [0, 1]. What is outside is clipped.
        columns: images in a line.

    Raises:
        ModuleNotFoundError: Pillow is missing.
    """
    with _needed("Pillow"):
        from PIL import Image
    n, c, h, w = images.shape
    rows, gap = -(-n // columns), 1
    whole = torch.ones(c, rows * (h + gap) + gap, columns * (w + gap) + gap)
    for i, image in enumerate(images.detach().cpu().clamp(0, 1)):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        whole[:, y : y + h, x : x + w] = image
    pixels = (whole * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if c == 1 else pixels)
    zoom = max(1, 56 // h)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def save(path: str | Path, picture: Figure | Image) -> None:
    """Write a picture in the format that the name's ending says, PNG without one.

    Args:
        path: the file, which replaces the one before once it is whole.
        picture: what a function of this module returned.

    Raises:
        OSError: it could not be written. An older file is kept.
        ValueError: there is no such format.
    """
    drawn, kind = io.BytesIO(), Path(path).suffix[1:] or "png"
    write: Any = getattr(picture, "savefig", None)
    if write is not None:
        write(drawn, format=kind, dpi=150)
    else:
        from PIL import Image

        name = Image.registered_extensions().get(f".{kind.lower()}")
        if name is None:
            raise ValueError(f"Pillow writes no format {kind!r}: give a name that ends in .png")
        picture.save(drawn, name, optimize=True)  # type: ignore[union-attr]
    with replacing(path) as file:
        file.write(drawn.getvalue())
