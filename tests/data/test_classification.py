"""Digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING

import pytest
import torch

from jiio_plugins.data.classification import load_digits, load_fashion_mnist

if TYPE_CHECKING:
    from pathlib import Path


def test_digits_are_split_once() -> None:
    x, y = load_digits("test")
    x_train, y_train = load_digits("train")
    assert x.shape == (500, 1, 8, 8)
    assert x_train.shape == (1297, 1, 8, 8)
    assert y.dtype == y_train.dtype == torch.int64
    assert float(x.min()) == float(x_train.min()) == 0
    assert float(x.max()) == float(x_train.max()) == 1
    both = torch.cat([x, x_train]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797  # nobody is in both
    assert torch.equal(load_digits("test")[0], x)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        load_digits("val")


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "t10k-images-idx3-ubyte" in text
    assert "torchvision" in text
    assert "apt install dataset-fashion-mnist" in text
    with pytest.raises(ValueError, match="split must be"):
        load_fashion_mnist(tmp_path, "val")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_wherever_it_lies(tmp_path: Path, folder: str, packed: bool) -> None:
    pixels = bytes(range(256)) * 7  # 1792 bytes: enough for two images
    images = struct.pack(">IIII", 2051, 2, 28, 28) + pixels[: 2 * 784]
    labels = struct.pack(">II", 2049, 2) + bytes([3, 9])
    base = tmp_path / folder
    base.mkdir(parents=True, exist_ok=True)
    for stem, content in (("images-idx3", images), ("labels-idx1", labels)):
        name = f"t10k-{stem}-ubyte"
        if packed:
            (base / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (base / name).write_bytes(content)
    x, y = load_fashion_mnist(tmp_path)
    assert x.shape == (2, 1, 28, 28)
    assert x.dtype == torch.float32
    assert x.flatten()[:3].tolist() == pytest.approx([0, 1 / 255, 2 / 255])
    assert float(x.max()) == 1
    assert y.tolist() == [3, 9]
