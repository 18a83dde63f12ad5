"""The device that a command is to run on."""

from __future__ import annotations

import torch


def check_device(device: str) -> torch.device:
    """The device, which torch can use.

    Args:
        device: as torch names it: cpu, cuda, cuda:1, ...

    Raises:
        ValueError: no such device, or none here.
    """
    try:
        there_is = torch.zeros(1, device=device)
        there_is.item()  # nothing can be read from a meta tensor
        return there_is.device
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {device} cannot be used: {said}. There is {', '.join(there)}"
        ) from error
