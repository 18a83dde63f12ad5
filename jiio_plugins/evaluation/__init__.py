"""Robustness figures that a sceptical reader accepts: several attacks, an independent judge."""

from jiio_plugins.evaluation.against_nested import compare_with_nested
from jiio_plugins.evaluation.attack import Attack
from jiio_plugins.evaluation.comparison import Comparison, Row
from jiio_plugins.evaluation.report import (
    AttackResult,
    Finding,
    Interval,
    RobustnessReport,
    paired_difference,
    paired_shares,
    wilson,
)
from jiio_plugins.evaluation.robustness import robust_accuracy
from jiio_plugins.evaluation.suites import default_suite, engine_attack, host_attack, quick_suite
from jiio_plugins.joint.modes import layers_as
from jiio_plugins.methods.backpropagated import (
    Backpropagated,
    through_intermediate,
    through_unrolled,
)

__all__ = [
    "Attack",
    "AttackResult",
    "Backpropagated",
    "Comparison",
    "Finding",
    "Interval",
    "RobustnessReport",
    "Row",
    "compare_with_nested",
    "default_suite",
    "engine_attack",
    "host_attack",
    "layers_as",
    "paired_difference",
    "paired_shares",
    "quick_suite",
    "robust_accuracy",
    "through_intermediate",
    "through_unrolled",
    "wilson",
]
