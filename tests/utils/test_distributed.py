"""The training script on two processes: the data is split, the weights stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from jiio_plugins.adversarial.step import AdversarialTraining
from jiio_torchdeq import adapt
from tests.adapters.torchdeq.toys import Net as TorchDEQNet
from tests.helpers import ROOT, Net, Series, rand

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "examples" / "distributed_training.py"),
        "--images",
        "160",
        "--batch-size",
        "20",
        "--epochs",
        "4",
        "--report",
        str(tmp_path),
    ]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        timeout=300,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout
    assert "2 processes" in run.stdout
    ranks = [json.loads((tmp_path / f"rank{k}.json").read_text()) for k in (0, 1)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for epoch in range(4):
        batches = [rank["seen"][4 * epoch : 4 * epoch + 4] for rank in ranks]
        one, two = ({i for batch in part for i in batch} for part in batches)
        assert len(one) == len(two) == 80
        assert not one & two
        assert one | two == set(range(160))
    assert ranks[0]["seen"][:4] != ranks[0]["seen"][4:8]  # shuffled anew
    assert ranks[0]["losses"] != ranks[1]["losses"]  # each has its own images
    for rank in ranks:
        first, last = sum(rank["losses"][:4]), sum(rank["losses"][-4:])
        assert last < 0.8 * first
        assert all(0 < loss < 20 for loss in rank["losses"])


def torchdeq_net(seed: int) -> torch.nn.Module:
    """With a layer of TorchDEQ's; its weights are what they are."""
    del seed
    return adapt(TorchDEQNet())


@pytest.mark.parametrize("options", [{}, {"trades": 2.0}, {"jacobian_weight": 0.0}])
@pytest.mark.parametrize("build", [Net, Series, torchdeq_net])
def test_a_distributed_module_can_be_given_as_it_is(
    build: Callable[..., torch.nn.Module], options: dict[str, float], tmp_path: Path
) -> None:
    """Its gradients are those of the bare module, also where it looks for unused parameters."""
    x, y = rand(4, 5, seed=1), torch.tensor([0, 2, 1, 2])
    training = AdversarialTraining(norm=2, eps=0.5, **options)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        gradients = []
        for wrap in (None, False, True):
            model = build(seed=3)
            outer = model
            if wrap is not None:
                outer = DistributedDataParallel(model, find_unused_parameters=wrap)
            generator = torch.Generator().manual_seed(0)
            training(outer, x, y, generator=generator).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for own in gradients[1:]:
            for a, b in zip(own, gradients[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    finally:
        distributed.destroy_process_group()
