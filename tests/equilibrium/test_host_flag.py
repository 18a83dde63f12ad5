"""What the host knows of an accelerator that is behind it, seen without one."""

from __future__ import annotations

import pytest
import torch

from jiio_plugins.equilibrium.solvers import HostFlag


class Event:
    """Has passed once the device has caught up."""

    passed = False

    def record(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> HostFlag:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return HostFlag(torch.device("cuda"))


def test_the_last_answer_that_has_arrived_holds_until_the_next(flag: HostFlag) -> None:
    yes, no = torch.tensor(True), torch.tensor(False)
    assert not flag(yes)  # asked, not answered
    assert not flag(no)
    flag._event.passed = True
    assert flag(no)  # the answer to the first, and the next question
    assert flag(no)
    flag._event.passed = True
    assert not flag(yes)


def test_nothing_is_asked_while_the_device_only_records(
    flag: HostFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag(torch.tensor(True))
    flag._event.passed = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not flag(torch.tensor(True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert flag(torch.tensor(True))


def test_before_the_first_answer_it_is_what_is_said_of_it(flag: HostFlag) -> None:
    assert HostFlag(torch.device("cuda"), known=True)(torch.tensor(False))


def test_a_cpu_answers_at_once() -> None:
    flag = HostFlag(torch.device("cpu"))
    assert flag(torch.tensor(True))
    assert not flag(torch.tensor(False))
