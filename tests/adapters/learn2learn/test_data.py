"""Real learn2learn Tasksets over our data."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from jiio_learn2learn.data import (
    glyph_tasksets,
    meta_dataset,
    omniglot_tasksets,
    sinusoid_taskset,
    taskset,
)
from jiio_plugins.data.tasks import ClassImages, Sinusoids


def classes(count: int = 8, samples: int = 5) -> ClassImages:
    """Class c, sample s: an image whose pixels are c and s."""
    images = torch.zeros(count, samples, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = torch.arange(count)[:, None, None, None].to(torch.uint8)
    images[..., 1] = torch.arange(samples)[:, None, None].to(torch.uint8)
    return ClassImages(images, tuple(map(str, range(count))))


def test_meta_dataset_knows_its_labels() -> None:
    dataset = meta_dataset(classes())
    assert len(dataset) == 40
    assert dataset.labels == list(range(8))
    for index in (0, 7, 39):
        image, label = dataset[index]
        assert label == dataset.indices_to_labels[index] == round(255 * float(image[0, 0, 0]))
        assert index in dataset.labels_to_indices[label]


def test_tasks_are_sorted_and_relabelled() -> None:
    random.seed(0)
    tasks = taskset(classes(), ways=4, samples=3, num_tasks=20)
    assert len(tasks) == 20
    seen = set()
    for x, y in tasks:
        assert x.shape == (12, 1, 1, 2)
        assert len(y.unique()) == 4
        of_class = (255 * x[:, 0, 0, 0]).round().long()
        for block in range(4):  # sorted by class, so that a loop can take the first k of each
            rows = slice(3 * block, 3 * block + 3)
            assert len(of_class[rows].unique()) == len(y[rows].unique()) == 1
        assert len(x.flatten(1).unique(dim=0)) == 12
        seen.update(of_class.tolist())
    assert seen == set(range(8))
    first = tasks[3]
    assert torch.equal(first[0], tasks[3][0])  # a task is remembered
    endless = taskset(classes(), ways=4, samples=3)
    assert not torch.equal(endless.sample()[0], endless.sample()[0])


def test_too_much_asked_for() -> None:
    with pytest.raises(ValueError, match=r"tasks of 9 ways .* there are 8 classes of 5"):
        taskset(classes(), ways=9, samples=1)
    with pytest.raises(ValueError, match="6 samples a class"):
        taskset(classes(), ways=2, samples=6)
    with pytest.raises(ValueError, match="50 samples asked for, a sinusoid has 40 points"):
        sinusoid_taskset(Sinusoids(tasks=3), samples=50)


def test_glyph_tasksets(tmp_path: Path) -> None:
    import matplotlib

    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for name in ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"):
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, fonts)
    tasksets = glyph_tasksets(ways=5, samples=2, fonts=fonts, size=14, cache=tmp_path)
    for split in tasksets:
        x, y = split.sample()
        assert x.shape == (10, 1, 14, 14)
        assert 0 <= float(x.min()) < float(x.max()) <= 1
        assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    sizes = [len(split.dataset.labels) for split in tasksets]
    assert sizes[0] > sizes[2] > 5


def test_missing_omniglot(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download=True"):
        omniglot_tasksets(tmp_path, cache=tmp_path)


def test_sinusoid_tasks_are_one_sinusoid_each() -> None:
    random.seed(0)
    data = Sinusoids(tasks=6)
    tasks = sinusoid_taskset(data, samples=7)
    x, y = tasks.sample()
    assert x.shape == y.shape == (7, 1)
    fits = [torch.allclose(data.curve(k)(x), y, atol=1e-5) for k in range(6)]
    assert sum(fits) == 1
