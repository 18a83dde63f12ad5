"""The joint mode: what equilibrium layers do while an optimisation runs.

This is the API for someone who writes an adapter. There are two kinds.

An adapter of a *toolkit* translates its words into an objective and a constraint, and calls
:func:`jiio_plugins.optimize_input`. Where that is not enough it builds a :class:`Problem` of a
:class:`Variable`, and runs a method on it with :func:`jiio_plugins.methods.solve`. What is around
the call and must not disturb the caller's model goes into ``with guarded(model):``.

An adapter of another library's *layer* gives it a joint mode. The layer asks :func:`current_mode`.
If there is one, it answers with ``mode.on_layer(layer, f, z0)``, where f is its map as a
:class:`jiio_plugins.equilibrium.CellMap`.
"""

from jiio_plugins.equilibrium.layer import LayerDefaults, Mode
from jiio_plugins.equilibrium.mode import current_mode, layer_mode
from jiio_plugins.equilibrium.recognition import no_layer
from jiio_plugins.joint.guard import Replay, buffers_kept, flags_kept, guarded
from jiio_plugins.joint.inputs import check_gradients_possible, check_input, problem_of, unwrap
from jiio_plugins.joint.linearization import Linearization
from jiio_plugins.joint.modes import PenaltyMode, RecordMode, SolveMode, layers_as
from jiio_plugins.joint.problem import FlatState, Objective, Problem
from jiio_plugins.joint.variables import Groups, ParameterVariable, Variable
from jiio_plugins.joint.weights import Computation, computes_weights

__all__ = [
    "Computation",
    "FlatState",
    "Groups",
    "LayerDefaults",
    "Linearization",
    "Mode",
    "Objective",
    "ParameterVariable",
    "PenaltyMode",
    "Problem",
    "RecordMode",
    "Replay",
    "SolveMode",
    "Variable",
    "buffers_kept",
    "check_gradients_possible",
    "check_input",
    "computes_weights",
    "current_mode",
    "flags_kept",
    "guarded",
    "layer_mode",
    "layers_as",
    "no_layer",
    "problem_of",
    "unwrap",
]
