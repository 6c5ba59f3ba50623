"""Ctrl-C and SIGTERM end a run in order, and no signal is lost, wherever in the program it arrives.

Their handler raises KeyboardInterrupt. Python swallows what is raised inside a destructor, a weak reference's callback
or the garbage collector, and libraries have `except` clauses of their own. A swallowed interruption is therefore
repeated until it gets through, and long loops also poll it with `check`.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

REPEAT_S = 0.05
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[signal.Signals] = []
_is_ending = False


def handle() -> None:
    """Let these signals raise KeyboardInterrupt in the main thread, but for those that the caller ignores (`nohup`)."""
    for number in HANDLED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    sys.unraisablehook = _on_swallowed


def check() -> None:
    """Raise KeyboardInterrupt if a signal has arrived that did not end the program. Polling it costs nothing."""
    if _received:
        raise KeyboardInterrupt


def end() -> int:
    """The program ends: return its exit status. Another signal from then on ends it at once."""
    global _is_ending
    _is_ending = True
    return 128 + (_received[-1] if _received else signal.SIGINT)


def _on_signal(number: int, _: FrameType | None) -> None:
    if _is_ending:
        os._exit(128 + number)
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def _on_swallowed(swallowed: Any) -> None:
    """What Python does with an exception that cannot go anywhere: print it, or come again if it was an interruption."""
    if not _received or swallowed.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(swallowed)
    elif not _is_ending:
        # Not here: what this raises is swallowed, too. To the main thread itself, which may be in a system call.
        again = threading.Timer(REPEAT_S, signal.pthread_kill, (threading.main_thread().ident, _received[-1]))
        again.daemon = True
        again.start()
