"""Few-shot tasks of images and of sinusoids."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jiio_plugins.data.tasks import ClassImages, Sinusoids, cache_folder, sample_tasks


def toy_classes(classes: int = 7, samples: int = 4) -> ClassImages:
    """Class c, sample s: an image that says so."""
    images = torch.zeros(classes, samples, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0, 0] = torch.arange(classes)[:, None].to(torch.uint8)
    images[:, :, 0, 0, 1] = torch.arange(samples).to(torch.uint8)
    return ClassImages(images, tuple(f"c{k}" for k in range(classes)))


def test_tasks_are_what_they_say() -> None:
    data = toy_classes()
    tasks = sample_tasks(
        data, 30, ways=5, shots=1, queries=2, generator=torch.Generator().manual_seed(3)
    )
    assert tasks.x_support.shape == (30, 5, 1, 2, 2)
    assert tasks.x_query.shape == (30, 10, 1, 2, 2)
    assert tasks.y_support.tolist() == [[0, 1, 2, 3, 4]] * 30
    for x, y, x_query, y_query in zip(*tasks, strict=True):
        classes = (255 * x[:, 0, 0, 0]).round().long()
        assert len(classes.unique()) == 5
        assert torch.equal(classes[y_query], (255 * x_query[:, 0, 0, 0]).round().long())
        both = torch.cat([x, x_query]).flatten(1)
        assert len(both.unique(dim=0)) == 15  # no image is in both sets
        assert torch.equal(y, torch.arange(5))
    again = sample_tasks(
        data, 30, ways=5, shots=1, queries=2, generator=torch.Generator().manual_seed(3)
    )
    assert all(torch.equal(a, b) for a, b in zip(tasks, again, strict=True))
    with pytest.raises(ValueError, match="cannot draw 8 ways of 1 shots"):
        sample_tasks(data, 1, ways=8, queries=1)
    with pytest.raises(ValueError, match="from 7 classes of 4 images"):
        sample_tasks(data, 1, shots=4, queries=1)


def test_rotations_are_classes_of_their_own() -> None:
    data = toy_classes()
    turned = data.with_rotations()
    assert len(turned) == 28
    assert len(set(turned.names)) == 28
    assert torch.equal(turned.images[:7], data.images)
    assert torch.equal(turned.images[9], torch.rot90(data.images[2], 1, (2, 3)))


def test_sinusoids_are_the_published_ones() -> None:
    data = Sinusoids(tasks=400, points=5, seed=1)
    assert 0.1 <= float(data.amplitude.min()) < 0.3
    assert 4.8 < float(data.amplitude.max()) <= 5
    assert 0 <= float(data.phase.min()) < 0.1
    assert 3.0 < float(data.phase.max()) <= math.pi
    assert -5 <= float(data.x.min()) < -4.9
    x, y = data[5 * 3 + 2]
    assert x.shape == y.shape == (1,)
    assert float(y) == pytest.approx(
        float(data.amplitude[3] * torch.sin(x - data.phase[3])), abs=1e-5
    )
    assert torch.allclose(data.curve(3)(data.x[3]), data.y[3])
    tasks = data.sample(6, 2, torch.Generator().manual_seed(0))
    assert tasks.x_support.shape == (6, 2, 1)
    assert tasks.y_query.shape == (6, 3, 1)
    with pytest.raises(IndexError):
        data[2000]
    with pytest.raises(ValueError, match="tasks and points must be at least 1"):
        Sinusoids(tasks=0)
    with pytest.raises(ValueError, match="cannot draw 2 tasks of 5 shots"):
        data.sample(2, 5)


def test_images_are_tensors_of_tasks() -> None:
    tasks = sample_tasks(toy_classes(), 2, queries=1)
    moved = tasks.to("cpu")
    assert all(isinstance(t, Tensor) for t in moved)
    assert moved.x_support.dtype == torch.float32


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "jiio-plugins"
    assert cache_folder("here") == Path("here")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "jiio-plugins"
