"""A worker that is to end: it saves first, and then ends."""

import signal
import subprocess
import sys
import time

import pytest

WORKER = """
import sys, time
from aquilamoe.training import preemption
preemption.GRACE_S = float(sys.argv[2])
preemption.listen()
if sys.argv[1] == "busy":
    with preemption.at_work():
        print("listening", flush=True)
        while not preemption.is_due():
            time.sleep(0.01)
        print("saves", preemption.is_due(), flush=True)
        time.sleep(600)
print("listening", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("state", "grace_s"), [("busy", 0.5), ("idle", 1e6)])
def test_sigterm_lets_a_worker_that_is_at_work_save_and_ends_it_soon(state: str, grace_s: float) -> None:
    words = [sys.executable, "-c", WORKER, state, str(grace_s)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        # It is reported once: a second query returns False.
        assert process.stdout.readline() == ("saves False\n" if state == "busy" else "")
        assert process.wait() == 128 + signal.SIGTERM
        assert state == "idle" or time.monotonic() - started >= grace_s
