"""Weights that a model computes from others, computed once while it stands still.

Weight and spectral normalisation compute a weight anew wherever it is used, which is many times in
an iteration. While a model's parameters are constants that is always the same. So for as long as a
block runs, an object stands in the place of each such computation (:class:`Once`), which returns
what has been computed already. Where a parameter is another than then, has been changed in place or
requires a gradient, it computes.

PyTorch's own normalisations are known here, as parametrisations and as hooks. An adapter makes
those of its host known (:func:`computes_weights`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Finder = Callable[[nn.Module], Iterable["Computation"]]

# of others nobody knows whether they give the same again
_KNOWN = "torch.nn.utils.parametrizations"


class Computation(NamedTuple):
    """Where a module computes weights.

    Attributes:
        place: what holds the function that computes, such as the attributes of a module.
        key: of the function in there.
        function: it. What it returns or sets is the same again for the same parameters, unless
            ``module`` is in train mode.
        arguments: that it is called with.
        module: whose own parameters it computes from.
    """

    place: dict[Any, Any]
    key: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    module: nn.Module


_finders: list[Finder] = []


def computes_weights(finder: Finder) -> Finder:
    """Make known where modules of a kind compute weights.

    Args:
        finder: returns the computations of a module itself, not of those in it.
    """
    _finders.append(finder)
    return finder


@computes_weights
def _parametrizations(module: nn.Module) -> Iterator[Computation]:
    # an attribute of the list itself comes before the method of its class
    if not isinstance(module, parametrize.ParametrizationList) or "forward" in vars(module):
        return
    if all(type(way).__module__ == _KNOWN for way in module):
        yield Computation(vars(module), "forward", module.forward, (), module)


@computes_weights
def _hooks(module: nn.Module) -> Iterator[Computation]:
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            hooks: dict[Any, Any] = module._forward_pre_hooks
            yield Computation(hooks, key, hook, (module, None), module)


class Once:
    """What a computation of weights has returned, for as long as it would return it again.

    Args:
        computation: in whose place it stands.
    """

    def __init__(self, computation: Computation) -> None:
        self.function, self.module = computation.function, computation.module
        with torch.no_grad():
            self.result = self.function(*computation.arguments)
        own = self.module._parameters.items()
        self._made_of = [(name, p, p._version) for name, p in own if p is not None]

    def __call__(self, *arguments: Any) -> Any:
        """The result, or where something has changed a new one."""
        own = self.module._parameters
        for name, p, version in self._made_of:
            if own.get(name) is not p or p._version != version or p.requires_grad:
                return self.function(*arguments)
        return self.function(*arguments) if self.module.training else self.result


def _stands_still(module: nn.Module) -> bool:
    own: Iterable[Tensor] = [p for p in module._parameters.values() if p is not None]
    return not module.training and not any(p.requires_grad or p.is_inference() for p in own)


@contextmanager
def weights_once(model: nn.Module) -> Iterator[None]:
    """Compute each weight once in the block, and put all back, also after an exception.

    Weights of modules in train mode, or whose parameters require gradients, are left alone, and so
    is a model of which something is compiled.

    Args:
        model: whose weights.
    """
    modules = list(model.modules())
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules):
        modules = []
    with ExitStack() as stack:
        for module in filter(_stands_still, modules):
            for computation in [c for finder in _finders for c in finder(module)]:
                stack.callback(_put_back, computation, dict(vars(module)), dict(computation.place))
                computation.place[computation.key] = Once(computation)
        yield


def _put_back(computation: Computation, attributes: dict[str, Any], place: dict[Any, Any]) -> None:
    if computation.key in place:
        computation.place[computation.key] = computation.function
    else:
        computation.place.pop(computation.key, None)
    now = vars(computation.module)
    for name, value in attributes.items():  # a hook sets the weight
        if isinstance(value, Tensor) and now.get(name) is not value:
            now[name] = value
