"""Batches: every sample once an epoch, in an order of the seed alone."""

from __future__ import annotations

import pytest
import torch

from jiio_plugins.adversarial.batches import TensorBatches
from tests.adversarial.helpers import data


def test_every_sample_is_seen_once_an_epoch_in_another_order() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    batches = TensorBatches(x, y, 4, seed=1)
    epochs = [torch.cat([labels for _, labels in batches.epoch(k)]) for k in (0, 1, 0)]
    assert len(batches) == 3
    assert all(torch.equal(e.sort().values, y) for e in epochs)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    rest = torch.cat([labels for _, labels in batches.epoch(0, skip=2)])
    assert torch.equal(rest, epochs[0][8:])
    assert len(TensorBatches(x, y, 4, drop_last=True)) == 2


def test_bad_batches() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="batch_size"):
        TensorBatches(x, y, 0)
    with pytest.raises(ValueError, match="same length"):
        TensorBatches(x, y[:5], 4)
    with pytest.raises(ValueError, match="no batch"):
        TensorBatches(x[:3], y[:3], 4, drop_last=True)
