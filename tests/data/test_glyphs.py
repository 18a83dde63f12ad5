"""Glyphs of fonts as few-shot classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jiio_plugins.data.glyphs import SPLITS, load_glyphs, script_of, split_scripts
from jiio_plugins.data.tasks import ClassImages, sample_tasks


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two faces of matplotlib's: enough scripts, quickly drawn."""
    import matplotlib

    folder = tmp_path_factory.mktemp("fonts")
    for name in ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"):
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def glyphs(fonts: Path, cache: Path, split: str = "train", **settings: Any) -> ClassImages:
    return load_glyphs(split, fonts=fonts, cache=cache, **{"samples": 4, "size": 14, **settings})


def test_glyphs_are_split_by_script(fonts: Path, cache: Path) -> None:
    splits = {split: glyphs(fonts, cache, split) for split in SPLITS}
    scripts = {s: {name.split(" ")[0] for name in data.names} for s, data in splits.items()}
    assert "LATIN" in scripts["train"]
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not scripts[first] & scripts[second]
    for data in splits.values():
        assert data.images.shape[1:] == (4, 1, 14, 14)
        assert data.images.dtype == torch.uint8
        assert len(data.names) == len(data) >= 5
        ink = data.images.flatten(2).float().mean(2)
        assert float(ink.min()) > 0  # nothing is blank
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_equal_shapes_are_one_class(fonts: Path, cache: Path) -> None:
    names = {name for split in SPLITS for name in glyphs(fonts, cache, split).names}
    assert "LATIN CAPITAL LETTER A" in names
    assert "GREEK CAPITAL LETTER ALPHA" not in names
    assert "CYRILLIC CAPITAL LETTER A" not in names
    assert "LATIN SMALL LETTER A WITH ACUTE" not in names
    # without any jitter, all classes differ as they were promised to
    still = [glyphs(fonts, cache, split, jitter=0.0, samples=1) for split in SPLITS]
    images = torch.cat([data.images for data in still]).flatten(1).float()
    images = images / images.norm(dim=1, keepdim=True)
    alike = images @ images.T - torch.eye(len(images))
    assert float(alike.max()) < 0.99


def test_glyphs_depend_on_the_seed_alone(fonts: Path, cache: Path, tmp_path: Path) -> None:
    first = glyphs(fonts, cache)
    assert torch.equal(first.images, glyphs(fonts, cache).images)  # from the cache
    assert torch.equal(first.images, glyphs(fonts, tmp_path).images)  # drawn anew
    assert not torch.equal(first.images, glyphs(fonts, cache, seed=1).images)


def test_samples_of_a_class_differ_and_belong_together(fonts: Path, cache: Path) -> None:
    data = glyphs(fonts, cache)
    tasks = sample_tasks(data, 100, queries=2, generator=torch.Generator().manual_seed(0))
    x, q = tasks.x_support.flatten(2), tasks.x_query.flatten(2)
    distance = torch.cdist(q, x)
    assert float(distance.min()) > 0.1
    nearest = float((distance.argmin(2) == tasks.y_query).double().mean())
    assert 0.4 < nearest < 0.95  # well above chance, and far from trivial


def test_scripts_are_dealt_out() -> None:
    scripts = ["LATIN"] * 60 + ["GREEK"] * 20 + ["LAO"] * 10 + ["NKO"] * 5
    assert split_scripts(scripts) == {
        "LATIN": "train",
        "GREEK": "test",
        "LAO": "validation",
        "NKO": "test",
    }
    assert script_of("Ω") == "GREEK"
    with pytest.raises(ValueError, match="at least three scripts, got LATIN, GREEK"):
        split_scripts(["LATIN", "LATIN", "GREEK"])


def test_bad_font_folders(fonts: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-core"):
        load_glyphs(fonts=tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        load_glyphs("val", cache=tmp_path)
    with pytest.raises(ValueError, match="no letter is in 3 of these 2 faces: lower min_faces"):
        glyphs(fonts, tmp_path, min_faces=3)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "broken.ttf").write_bytes(b"not a font")
    with (
        pytest.warns(UserWarning, match=r"skipped the font .*broken\.ttf"),
        pytest.raises(ValueError, match="no letter is in"),
    ):
        load_glyphs(fonts=broken, cache=tmp_path)
