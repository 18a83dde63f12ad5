"""One task: its adapted parameters, where they stand in the module, and its objective."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from jiio_plugins.joint import FlatState, Groups, Problem, Variable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager


class Slots:
    """Named parameters of a module, in every place where the module holds them.

    After an adaptation they are results of a computation, not ``nn.Parameter``s, as with MAML.

    Args:
        module: what holds them.
        names: of ``module.named_parameters()``.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        everywhere = list(_places(module))
        self._places = {}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            value = module.get_submodule(owner)._parameters[leaf]
            self._places[name] = [(m, k) for m, k in everywhere if m._parameters[k] is value]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self._places)

    def some(self, names: Sequence[str]) -> Slots:
        """The slots of some of the names."""
        slots = copy.copy(self)
        slots._places = {name: self._places[name] for name in names}
        return slots

    def get(self) -> list[Tensor]:
        """The tensors that stand there now."""
        return [place[0][0]._parameters[place[0][1]] for place in self._places.values()]  # type: ignore[misc]

    def put(self, values: Sequence[Tensor]) -> None:
        """Put others there, in the order of the names."""
        for place, value in zip(self._places.values(), values, strict=True):
            for module, key in place:
                module._parameters[key] = value  # type: ignore[assignment]


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for owner in module.modules():
        for key, value in owner._parameters.items():
            if value is not None:
                yield owner, key


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Put all parameters back afterwards."""
    before = [(owner, key, owner._parameters[key]) for owner, key in _places(module)]
    try:
        yield
    finally:
        for owner, key, value in before:
            owner._parameters[key] = value


@contextmanager
def frozen(module: nn.Module, adapted: Slots) -> Iterator[None]:
    """Meanwhile all parameters are constants, put back afterwards.

    Weights of torch's weight normalisation are computed once instead of at every call, where no
    adapted parameter enters them. Other parametrisations may draw random numbers or depend on more
    than their parameters.

    Args:
        module: whose parameters.
        adapted: the ones that move.
    """
    moving = {id(t) for t in adapted.get()}
    computed = [
        part
        for part in module.modules()
        if isinstance(part, ParametrizationList)
        and all(type(step) is _WeightNorm for step in part)
        and "forward" not in part.__dict__
        and not any(id(t) in moving for t in part.parameters())
    ]
    with kept(module):
        constants: dict[int, Tensor] = {}
        for owner, key in _places(module):
            value = owner._parameters[key]
            assert value is not None
            constant = constants.setdefault(id(value), value.detach())
            owner._parameters[key] = constant  # type: ignore[assignment]
        try:
            for part in computed:
                part.forward = _constantly(part().detach())  # type: ignore[method-assign]
            yield
        finally:
            for part in computed:
                part.__dict__.pop("forward", None)


def _constantly(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


class TaskVariable(Variable):
    """``v -> loss + reg/2 ‖v − v0‖²`` for the adapted parameters v, flat ``(1, d)``.

    Args:
        slots: where v goes.
        loss: the support loss at whatever stands in the slots.
        anchor: v0, a live function of the meta-parameters.
        reg: in units of loss / v².
        states: of each equilibrium layer at the current v, flat. All rows belong to this one
            problem.
        module: what holds the slots.
        repeatable: draw the same random numbers at every call.

    Raises:
        ValueError: the layers see batches of different size.
    """

    rows_see_v_alone = False

    def __init__(
        self,
        slots: Slots,
        loss: Callable[[], Tensor],
        anchor: Sequence[Tensor],
        reg: float,
        states: Sequence[Tensor],
        module: nn.Module,
        *,
        repeatable: bool = False,
    ) -> None:
        rows = len(states[0])
        if any(len(z) != rows for z in states):
            raise ValueError(
                "the model's equilibrium layers see batches of different size, "
                f"{[len(z) for z in states]}: the loss must come from one support batch"
            )
        self._set(module, rows, (), repeatable)
        self.slots, self.loss, self.reg = slots, loss, reg
        self.z = torch.cat(list(states), dim=1)
        self.anchor = _flat(anchor)
        now = slots.get()
        self.like = [(t.shape, t.dtype) for t in now]
        self.origin = self.start = _flat(now).detach()
        self.groups = Groups(rows, torch.zeros(rows, dtype=torch.long, device=self.start.device))

    def guarded(self, *, freeze: bool = True) -> AbstractContextManager[None]:
        """All parameters but the adapted ones are constants, see :func:`frozen`."""
        return frozen(self.model, self.slots)

    def _call(self, v: Tensor, rows: Tensor | None) -> Tensor:
        self.slots.put(self.parts(v))
        # with reg = 0 the term still connects v to v0, whose gradient then is 0 and not None
        return self.loss() + 0.5 * self.reg * (v - self.anchor).square().sum()

    def parts(self, v: Tensor) -> list[Tensor]:
        """The variable ``(1, d)`` as the parameters it is made of."""
        flats = v.split([shape.numel() for shape, _ in self.like], dim=1)
        return [
            flat.reshape(shape).to(dtype)
            for flat, (shape, dtype) in zip(flats, self.like, strict=True)
        ]

    def problem(self, state: FlatState, fixed: Sequence[Tensor] | None = None) -> Problem:
        """The task as the engine takes it. Its objective is one number for all rows.

        Args:
            state: where the layers' states and adjoint start.
            fixed: flat states of the layers, where v reaches none of them. None: it reaches one.
        """

        def objective(value: Tensor) -> Tensor:
            return (value / self.rows).expand(self.rows)

        return Problem(self, objective, state=state, fixed=fixed)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(1, -1) for t in tensors], dim=1)
