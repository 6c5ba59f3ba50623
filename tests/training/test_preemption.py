"""A worker that is told to end: it saves first, and then ends."""

import signal
import subprocess
import sys
import time

import pytest

WORKER = """
import sys, time
from aquilamoe.training import preemption
preemption.GRACE_S = 0.5
preemption.listen()
if sys.argv[1] == "busy":
    with preemption.at_work():
        print("listening", flush=True)
        while not preemption.is_due():
            time.sleep(0.01)
        print("saves", preemption.is_due(), flush=True)
        time.sleep(20)
print("listening", flush=True)
time.sleep(20)
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_sigterm_lets_a_worker_that_is_at_work_save_and_ends_it_soon(state: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER, state], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        # It is told once: a second question is answered by no.
        assert process.stdout.readline() == ("saves False\n" if state == "busy" else "")
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert (time.monotonic() - told > 0.5) == (state == "busy")
