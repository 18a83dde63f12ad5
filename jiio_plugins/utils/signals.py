"""SIGINT and SIGTERM end a program in one line that says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt, SystemExit):
    """A signal has ended the program, or asked a training to end.

    As a KeyboardInterrupt it is caught where those are. As a SystemExit it prints its one line
    where nobody catches it.

    Args:
        number: the signal.
        message: what is kept, and how to go on. Empty: whoever catches it knows.
    """

    def __init__(self, number: int, message: str = "") -> None:
        self.number, self.message = signal.Signals(number), message
        super().__init__(f"stopped by {self.number.name}" + f": {message}" * bool(message))
        self.code = str(self)


def _raise(number: int, frame: Any) -> None:
    raise Interrupted(number)


@contextmanager
def one_line_end(name: str, message: str) -> Iterator[None]:
    """End a program that is interrupted in one line, with the exit code that shells expect.

    Args:
        name: of the program.
        message: how to go on, where nobody knows better.

    Raises:
        SystemExit: 128 and the number of the signal.
    """
    with _handled(_raise, signal.SIGTERM):
        try:
            yield
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            said = getattr(stopped, "message", "") or message
            print(f"\n{name}: {Interrupted(number, said)}", file=sys.stderr)
            raise SystemExit(128 + number) from None


class Stop:
    """In its block a signal waits until the loop asks. A second one does not.

    It takes over the signals of the main thread where the program has no handler of its own.

    Attributes:
        number: the signal that has arrived, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> Self:
        self._handled = _handled(self._note, *_SIGNALS)
        self._handled.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handled.__exit__(None, None, None)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker, which has no loop of ours
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.number is not None:
            raise Interrupted(number)
        self.number = number


@contextmanager
def _handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Have signals handled so, but those that somebody else handles already."""
    usual = (signal.SIG_DFL, signal.default_int_handler, _raise)
    ours = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if ours and signal.getsignal(n) in usual}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
