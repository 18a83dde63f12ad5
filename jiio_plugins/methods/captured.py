"""Steady iterations as a CUDA graph: one launch where the host would dispatch hundreds of kernels.

Once a run has begun, its iterations are the same operations on other numbers. :class:`Captured`
records one of them and replays it. What an iteration takes to the next one lies in buffers, which
the recorded iteration reads and, at its end, writes over. What the host has to decide it decides
between two replays. Where it decides that an iteration is not like the others, that one runs as it
would without a graph.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jiio_plugins.methods.best import BestSoFar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jiio_plugins.joint.problem import Problem
    from jiio_plugins.methods.round import Round


def can_capture(device: torch.device) -> bool:
    """Whether what a device does can be recorded."""
    return device.type == "cuda"


class CudaGraph:
    """What a device is told to do in a block, to be done again by one call.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the block. Nothing in it is computed yet."""
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                # other threads may go on to allocate memory, as those of a data loader do
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    self._graph.capture_end()
            here.wait_stream(aside)

    def replay(self) -> None:
        """Compute what was recorded, with what its inputs hold now."""
        with torch.cuda.device(self._device):
            self._graph.replay()


class Captured:
    """Takes the place of a :class:`Round`: steady ones are replayed, the others run.

    Args:
        turn: one round of the run.
        problem: what is optimised.
    """

    def __init__(self, turn: Round, problem: Problem) -> None:
        self.turn, self.problem = turn, problem
        of_iteration = [(turn.iteration, name) for name in turn.iteration.carried]
        of_best = [(turn.best, name) for name in BestSoFar.carried]
        self._places: list[tuple[Any, str]] = [(turn, "v"), *of_iteration, *of_best]
        self._graph: CudaGraph | None = None
        self._refused = False

    def __call__(self, k: int, step: Tensor) -> None:
        """See :class:`Round`."""
        steady = not self._refused and self.turn.iteration.steady(k)
        if steady and self._graph is None:
            self._capture(k, step)
        if not steady or self._graph is None:
            self.turn(k, step)
            return
        self._step.copy_(step)
        for buffer, now in zip(self._buffers, self._read(), strict=True):
            if now is not buffer:  # a round has run since the last replay
                buffer.copy_(now)
        self._write(self._buffers)
        self._graph.replay()
        self.turn.at = self._at

    def _read(self) -> list[Tensor]:
        """What an iteration takes to the next one."""
        own = [getattr(owner, name) for owner, name in self._places]
        return [*own, self.problem.f_evals, self.problem.vjps]

    def _write(self, tensors: Sequence[Tensor]) -> None:
        *own, f_evals, vjps = tensors
        for (owner, name), tensor in zip(self._places, own, strict=True):
            setattr(owner, name, tensor)
        self.problem.cost = self.problem.cost._replace(f_evals=f_evals, vjps=vjps)

    def _capture(self, k: int, step: Tensor) -> None:
        """Record a round between the buffers. Where that is refused, all rounds run."""
        before = self._read()
        self._buffers, self._step = [t.clone() for t in before], step.clone()
        self._write(self._buffers)
        graph = CudaGraph(step.device)
        try:
            with graph.record():
                self.turn(k, self._step)
                self._write_over(self._buffers, self._read())
        except RuntimeError as error:
            self._refused = True
            self._write(before)
            warnings.warn(
                "the iteration cannot be captured as a CUDA graph, and runs without one: "
                f"{str(error).splitlines()[0]}. A model or an objective that reads a number back "
                "from the device, or copies one to it, is refused. capture=False does without",
                stacklevel=2,
            )
            return
        self._graph, self._at = graph, self.turn.at
        self._write(self._buffers)

    @staticmethod
    def _write_over(buffers: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Copy the new tensors into the buffers, also where one is a view of another's buffer."""
        memory = {t.untyped_storage().data_ptr() for t in buffers}
        own = [t is buffer for t, buffer in zip(new, buffers, strict=True)]
        safe = [
            t.clone() if not same and t.untyped_storage().data_ptr() in memory else t
            for t, same in zip(new, own, strict=True)
        ]
        for buffer, t, same in zip(buffers, safe, own, strict=True):
            if not same:
                buffer.copy_(t)
