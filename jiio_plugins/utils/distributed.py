"""Several processes, by lightning-fabric: what torchrun started, and an orderly end."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from jiio_plugins.utils.device import check_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch(accelerator: str = "auto", **options: Any) -> Fabric:
    """Fabric on one process, or DistributedDataParallel on those that torchrun started.

    Args:
        accelerator: a kind of device, such as cpu, gpu, cuda, or auto. One process takes a certain
            one too, such as cuda:1.
        **options: further arguments of ``Fabric``, such as ``precision``.

    Returns:
        Fabric, launched.

    Raises:
        ValueError: no such device, or none here. A certain one for several processes.
        ModuleNotFoundError: lightning-fabric is missing: ``pip install jiio-plugins[distributed]``.
    """
    try:
        from lightning_fabric import Fabric
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lightning-fabric, which starts the training, is not installed: "
            "pip install 'jiio-plugins[distributed]'",
            name="lightning_fabric",
        ) from error
    if accelerator == "gpu" and not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    ):
        raise ValueError("--device gpu cannot be used: torch finds none here. There is cpu")
    kind, _, index = accelerator.partition(":")
    if kind not in ("auto", "gpu"):
        check_device(accelerator)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if index and world > 1:
        raise ValueError(
            f"--device {accelerator} is one device, for {world} processes: give {kind}, of which "
            "each takes its own"
        )
    fabric = Fabric(
        accelerator=kind,
        devices=[int(index)] if index and kind != "cpu" else local,
        num_nodes=max(1, world // local),
        strategy="ddp" if world > 1 else "auto",
        **options,
    )
    theirs = _is_open()
    fabric.launch()
    if _is_open() and not theirs:
        # gloo's threads must end before the interpreter does: otherwise a process that has done its
        # work now and then dies with SIGABRT. Fabric sees to it for NCCL alone.
        atexit.register(_close)
    return fabric


def _is_open() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _close() -> None:
    if _is_open():
        distributed.destroy_process_group()
