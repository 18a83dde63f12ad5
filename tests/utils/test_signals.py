"""SIGINT and SIGTERM: one line, a checkpoint where there is one to write, the right exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from jiio_plugins.utils import checkpoint
from jiio_plugins.utils.signals import Interrupted, Stop, one_line_end
from tests.adversarial.helpers import assert_equal_weights, build, train
from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@both
def test_a_training_finishes_its_step_writes_a_checkpoint_and_says_so(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, path = build(), tmp_path / "run.pt"
    optimizer = torch.optim.AdamW(parts.parameters(), lr=0.01)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # between the update of the weights and the record of it
            os.kill(os.getpid(), number)

    reference = build()
    train(reference, optimizer=torch.optim.AdamW(reference.parameters(), lr=0.01))
    hook = optimizer.register_step_post_hook(interrupt)
    words = rf"stopped by {number.name}: epoch 1, step 2 is done, and in .*run.pt. Go on with resu"
    with pytest.raises(Interrupted, match=words) as caught:
        train(parts, optimizer=optimizer, checkpoint=path)
    hook.remove()
    assert "\n" not in str(caught.value)
    assert checkpoint.read(path)["progress"]["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    fresh = build(seed=7)
    again = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    train(fresh, optimizer=again, checkpoint=path, resume=True)
    assert_equal_weights(reference, fresh)


@both
def test_a_second_signal_does_not_wait(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        os.kill(os.getpid(), number)
        assert stop.number == number
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
            os.kill(os.getpid(), number)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_handler_of_the_programs_own_stays() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with Stop() as stop, one_line_end("program", "again"):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


@both
def test_a_program_ends_in_one_line(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, one_line_end("program", "run it again"):
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    said = capsys.readouterr().err
    assert said.strip() == f"program: stopped by {number.name}: run it again"


@both
def test_a_script_that_catches_nothing_prints_one_line(number: signal.Signals) -> None:
    script = f"""if True:
        import os, signal
        from jiio_plugins.utils.signals import Interrupted, Stop
        with Stop() as stop:
            os.kill(os.getpid(), {int(number)})
            raise Interrupted(stop.number, "go on with resume=True")
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"stopped by {number.name}: go on with resume=True\n"
