"""How many operations an iteration dispatches, and how much it holds, beside the model's own.

On the meta device the loop takes the branches of an accelerator, where the host starts a kernel for
each operation. So these counts hang on no machine.
"""

from __future__ import annotations

import pytest

from benchmarks.loop import Cell, Operations, counted, flags_unread, loop_of

# of one iteration, beside two evaluations of f, encoder, head, and their backward passes
GLUE = {"L2": 136, "Linf": 88, "L1": 121}
SHARE = {"L2": 1.65, "Linf": 1.42, "L1": 1.58}


@pytest.mark.parametrize("norm", GLUE)
def test_operations_on_the_path_of_an_accelerator(norm: str) -> None:
    with flags_unread():
        for name in ("tiny", "digits"):
            cell = Cell(name, 4, "meta")
            own = counted(lambda n, cell=cell: cell.bare(n, 0, 0)).all
            found = counted(loop_of(cell, norm)).all
            assert found <= own + GLUE[norm]
    assert found <= SHARE[norm] * own


def test_no_more_is_held_than_in_a_forward_and_backward_pass_of_the_model() -> None:
    cell = Cell("digits", 16)
    with Operations() as own:
        cell.plain()
    with Operations() as found:
        loop_of(cell, "L2")(8)
    assert found.peak <= 1.3 * own.peak
