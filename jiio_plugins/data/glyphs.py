"""Few-shot classes that need no download: characters rendered from the fonts that are there.

A class is a character. Its samples are the faces it exists in, each moved, turned, sheared, scaled
and bent a little. Classes are split by script, so the characters of a test task belong to alphabets
that training never saw. It is type, not handwriting: accuracies on it do not compare with those on
Omniglot.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

from jiio_plugins.data.tasks import ClassImages, cache_folder
from jiio_plugins.utils.console import progress_bar
from jiio_plugins.utils.files import load_tensors, save_tensors, understood

if TYPE_CHECKING:
    from collections.abc import Sequence

SPLITS = ("train", "validation", "test")


_FORMAT = 2  # part of the cache's name: raise it when rendering or file change
_OVERSAMPLING = 2  # drawn and deformed so much larger, then averaged: edges stay smooth
_ALIKE = 0.96  # cosine of two characters' images above which they count as one shape
_SMALLEST = 5  # characters a script needs
_LETTERS = ("Lu", "Ll", "Lo")  # Unicode categories: upper case, lower case, without case


def load_glyphs(
    split: str = "train",
    *,
    fonts: str | Path | None = None,
    size: int = 28,
    samples: int = 20,
    min_faces: int | None = None,
    jitter: float = 1.0,
    seed: int = 0,
    cache: str | Path | None = None,
) -> ClassImages:
    """Letters as few-shot classes, rendered at the first call and cached.

    Args:
        split: "train", "validation" or "test". The largest scripts with three fifths of the classes
            are for training, the others go to test and validation in turn.
        fonts: a folder of ``.ttf`` and ``.otf`` files (``apt install fonts-noto-core``:
            ``/usr/share/fonts/truetype/noto``). None: the DejaVu faces that matplotlib brings.
        size: pixels a side.
        samples: images of each class, spread over its faces.
        min_faces: faces a character needs. None: 4 with DejaVu, 2 with a folder.
        jitter: strength of the deformations. At 1 there are up to 12° of rotation, 15 % of scale
            and shear, 6 % of the side in shift, and a smooth bend of about 4 %.
        seed: of the jitter.
        cache: folder of the cache. None: the user's (``XDG_CACHE_HOME``, else ``~/.cache``).

    Returns:
        Images and names ("GREEK SMALL LETTER ALPHA"). Accented forms are left out, and of
        characters that look the same in some face (Latin A, Greek Α) one is kept.

    Raises:
        ValueError: an unknown split, too few characters or scripts for three splits, or a damaged
            cache.
        FileNotFoundError: no fonts in the folder.
        OSError: the cache could not be written.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    faces = _find_faces(fonts)
    settings = {
        "format": _FORMAT,
        "size": size,
        "samples": samples,
        "seed": seed,
        "jitter": jitter,
        "min_faces": (4 if fonts is None else 2) if min_faces is None else min_faces,
        "faces": [(face.name, face.stat().st_size) for face in faces],
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = cache_folder(cache) / f"glyphs-{key}.safetensors"
    if not path.is_file():
        images, characters = _render_all(faces, settings)
        _store(path, images, characters)
    return _load(path, split)


def script_of(character: str) -> str:
    """The script a character's Unicode name begins with, e.g. "GREEK"."""
    return unicodedata.name(character, "?").split(" ")[0]


def split_scripts(scripts: Sequence[str]) -> dict[str, str]:
    """Script -> split, from one entry per class.

    The largest scripts train, until they have three fifths of the classes. The others go to test
    and validation in turn.

    Raises:
        ValueError: fewer than three scripts.
    """
    counts = sorted(Counter(scripts).items(), key=lambda item: (-item[1], item[0]))
    if len(counts) < 3:
        raise ValueError(
            f"three splits need at least three scripts, got {', '.join(s for s, _ in counts)}: use "
            "fonts with more scripts, or lower min_faces"
        )
    out: dict[str, str] = {}
    seen = rest = 0
    for script, count in counts:
        if seen < 0.6 * len(scripts) and len(out) < len(counts) - 2:
            out[script], seen = "train", seen + count
        else:
            out[script], rest = ("test", "validation")[rest % 2], rest + 1
    return out


def _find_faces(folder: str | Path | None) -> list[Path]:
    if folder is None:
        import matplotlib

        base = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        found = [p for p in base.glob("DejaVuS*.ttf") if "Display" not in p.name]
    else:
        base = Path(folder)
        found = [p for p in base.rglob("*") if p.suffix.lower() in (".ttf", ".otf") and p.is_file()]
    if not found:
        raise FileNotFoundError(
            f"no .ttf or .otf fonts in {base}: give a folder of fonts, e.g. after 'apt install "
            "fonts-noto-core' /usr/share/fonts/truetype/noto"
        )
    return sorted(found, key=lambda p: (p.name, str(p)))


def _open_faces(paths: Sequence[Path]) -> list[Any]:
    from matplotlib.ft2font import FT2Font

    faces = []
    for path in paths:
        try:
            faces.append(FT2Font(str(path)))
        except (OSError, RuntimeError) as error:
            warnings.warn(f"skipped the font {path}: {error}", stacklevel=4)
    return faces


def _render_all(paths: Sequence[Path], settings: dict[str, Any]) -> tuple[Tensor, list[str]]:
    """Images ``(classes, samples, 1, size, size)`` uint8, and their characters."""
    faces = _open_faces(paths)
    where: dict[str, list[Any]] = defaultdict(list)
    for face in faces:
        for code in face.get_charmap():
            character = chr(code)
            if unicodedata.category(character) in _LETTERS and not unicodedata.decomposition(
                character
            ):
                where[character].append(face)
    big = _OVERSAMPLING * settings["size"]
    drawn = {}
    for character in progress_bar(sorted(where), desc="rendering glyphs", unit="character"):
        candidates = (_draw(face, character, big) for face in where[character])
        shapes = [shape for shape in candidates if shape is not None]
        if len(shapes) >= settings["min_faces"]:
            drawn[character] = torch.stack(shapes)
    characters = _in_large_scripts(_distinct(drawn))
    if not characters:
        raise ValueError(
            f"no letter is in {settings['min_faces']} of these {len(faces)} faces: lower min_faces"
        )
    generator = torch.Generator().manual_seed(settings["seed"])
    images = []
    for character in progress_bar(characters, desc="deforming glyphs", unit="character"):
        by_face = drawn[character]
        many = by_face[torch.arange(settings["samples"]) % len(by_face)]
        images.append(_deform(many, settings["jitter"], generator))
    return torch.stack(images), characters


def _draw(face: Any, character: str, side: int) -> Tensor | None:
    """One character, centred and scaled to fill 70 % of ``(side, side)``. None if it is blank."""
    inner = round(0.7 * side)
    face.set_size(inner, 72)
    face.set_text(character)
    face.draw_glyphs_to_bitmap(antialiased=True)
    ink = torch.from_numpy(np.asarray(face.get_image(), dtype=np.float32) / 255)
    rows, columns = (ink.amax(1 - k).nonzero().squeeze(1) for k in range(2))
    if not len(rows):
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = inner / max(ink.shape)
    height, width = (max(1, round(n * scale)) for n in ink.shape)
    ink = interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    out = torch.zeros(side, side)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = ink
    return out


def _distinct(drawn: dict[str, Tensor]) -> list[str]:
    """The characters that differ from every earlier one, by their image in the first face."""
    if not drawn:
        return []
    first = torch.stack([shapes[0] for shapes in drawn.values()])
    small = avg_pool2d(first[:, None], _OVERSAMPLING).flatten(1)
    small = small / small.norm(dim=1, keepdim=True)
    alike = (small @ small.T) > _ALIKE
    kept: list[int] = []
    for k in range(len(alike)):
        if not bool(alike[k, kept].any()):
            kept.append(k)
    characters = list(drawn)
    return [characters[k] for k in kept]


def _in_large_scripts(characters: Sequence[str]) -> list[str]:
    """Without the scripts that could not fill a task."""
    counts = Counter(script_of(character) for character in characters)
    return [character for character in characters if counts[script_of(character)] >= _SMALLEST]


def _deform(shapes: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random affine maps and smooth bends, then down to the final size, as uint8."""

    def uniform(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(shape, generator=generator) - 1)

    n, side = len(shapes), shapes.shape[1]
    angle = math.radians(12) * uniform(n)
    scale, shear, shift = torch.exp(0.15 * uniform(n, 2)), 0.15 * uniform(n), 0.12 * uniform(n, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    skew = torch.eye(2).repeat(n, 1, 1)
    skew[:, 0, 1] = shear
    theta = torch.cat([turn @ skew * scale[:, None], shift[:, :, None]], dim=2)
    grid = torch.nn.functional.affine_grid(theta, [n, 1, side, side], align_corners=False)
    bend = interpolate(0.08 * uniform(n, 2, 4, 4), (side, side), mode="bicubic")
    warped = grid_sample(shapes[:, None], grid + bend.permute(0, 2, 3, 1), align_corners=False)
    return avg_pool2d(warped, _OVERSAMPLING).mul(255).round().clamp(0, 255).to(torch.uint8)


def _store(path: Path, images: Tensor, characters: Sequence[str]) -> None:
    codes = torch.tensor([ord(character) for character in characters])
    save_tensors(path, {"images": images, "codes": codes})


def _load(path: Path, split: str) -> ClassImages:
    tensors, _ = load_tensors(path)
    with understood(path):
        images, codes = tensors["images"], tensors["codes"]
    characters = [chr(code) for code in codes.tolist()]
    scripts = [script_of(character) for character in characters]
    assigned = split_scripts(scripts)
    keep = [k for k, script in enumerate(scripts) if assigned[script] == split]
    names = tuple(unicodedata.name(characters[k]) for k in keep)
    return ClassImages(images[keep], names)
