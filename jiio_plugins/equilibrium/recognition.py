"""Which modules of a model are equilibrium layers, by their form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jiio_plugins.equilibrium.layer import EquilibriumLayer

if TYPE_CHECKING:
    from torch import nn

SOLVERS = ("f_solver", "solver", "b_solver")  # attributes of a layer that solve
_CELLS = ("f", "func", "cell", "fn")  # beside a plain ``solver``: what it is to solve
_LOOKED_AT = 12  # modules that an error names

NO_LAYER = (
    "the model has no equilibrium layer that its forward reaches, so there is no fixed point to "
    "optimise through. Put jiio_plugins.Equilibrium(cell) where the fixed point z = cell(z, u) is: "
    "in __init__ 'self.equilibrium = jiio_plugins.Equilibrium(cell)', in forward "
    "'z = self.equilibrium(self.encoder(x))'. A TorchDEQ model: jiio_torchdeq.adapt(model)"
)


def recognise(model: nn.Module) -> dict[str, str]:
    """The equilibrium layers of a model: name in it -> what it is.

    "ready" for one that has a joint mode.
    """
    found = {name: _kind(module) for name, module in model.named_modules()}
    return {name: kind for name, kind in found.items() if kind is not None}


def servable(model: nn.Module) -> dict[str, str]:
    """The layers that :func:`adapt` would change: name in the model -> what it is."""
    return {name: kind for name, kind in recognise(model).items() if kind != "ready"}


def no_layer(model: nn.Module) -> str:
    """The error of a model without an equilibrium layer: what it has, and the lines to write."""
    found = servable(model)
    if found:
        layers = ", ".join(f"{name or 'itself'} ({kind})" for name, kind in found.items())
        return (
            f"{NO_LAYER}. It has layers that can be served as they are: {layers}. Write 'model = "
            "jiio_plugins.adapt(model)'"
        )
    modules = [(name, module) for name, module in model.named_modules() if name]
    looked = ", ".join(f"{n} ({type(m).__name__})" for n, m in modules[:_LOOKED_AT]) or "none"
    more = len(modules) - _LOOKED_AT
    return (
        f"{NO_LAYER}. Looked at {type(model).__name__} and its modules: {looked}"
        f"{f' and {more} more' if more > 0 else ''}. None has a solver of its own, an attribute "
        "f_solver, or solver beside f, which jiio_plugins.adapt(model) would serve. A solver that "
        "forward calls as a function is held first: self.solver = anderson in __init__, "
        "self.solver(...) in forward, then adapt. A loop in a forward becomes such a function. "
        "'Your own DEQ' in the documentation shows both"
    )


def _kind(module: nn.Module) -> str | None:
    kinds = type(module).__mro__
    if isinstance(module, EquilibriumLayer):
        return "ready"
    if any(k.__name__ == "DEQBase" and k.__module__.startswith("torchdeq.") for k in kinds):
        return "TorchDEQ"
    iterates = hasattr(getattr(module, "fixed_point", None), "single_iteration")
    named = getattr(module, "DEQ", False) or any(k.__name__ == "BaseDEQ" for k in kinds)
    if iterates and named:
        return f"{type(module).__name__}, deepinv's"
    solvers = [name for name in SOLVERS if callable(getattr(module, name, None))]
    cells = [name for name in _CELLS if callable(getattr(module, name, None))]
    if "f_solver" in solvers or ("solver" in solvers and cells):
        return type(module).__name__
    return None
