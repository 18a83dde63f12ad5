"""The judge: values by independent solves, never from the state that an optimisation ended in.

Where an optimisation ends, z has not settled, and the loss that it saw there may be far off. So its
end is only a candidate. A :class:`Judge` evaluates it twice: by the solver that the model carries,
as a user of ``model(x)`` would, and by a tight solve that no method had a part in. :func:`verified`
makes a :class:`jiio_plugins.Solution` of that. It judges the best iterate and the start as well
where they may be better, so that nothing returned is worse than its start. What did not converge,
and where the two solves disagree, is a status.

Statuses and their remedies are in :mod:`jiio_plugins.solution`. Methods are judged here for
:func:`jiio_plugins.optimize_input`, attacks of any library for
:func:`jiio_plugins.evaluation.robust_accuracy`.
"""

from jiio_plugins.verification.candidates import Candidate, Judge, default_verifier
from jiio_plugins.verification.results import check_verify, unverified, verified
from jiio_plugins.verification.samples import Verdict, judge

__all__ = [
    "Candidate",
    "Judge",
    "Verdict",
    "check_verify",
    "default_verifier",
    "judge",
    "unverified",
    "verified",
]
