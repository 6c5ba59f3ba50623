"""Killing a process, or having it wait, at a point of its work: where it touches a certain file."""

import os
from collections.abc import Collection
from pathlib import Path

# Python imports this when it starts: it watches over which files the process opens, makes, renames and removes.
SCRIPT = """
import glob, os, re, signal, sys, time
from pathlib import Path

pattern, deed, left = re.compile(os.environ["AMBUSH_PATH"]), os.environ["AMBUSH"], int(os.environ["AMBUSH_TIMES"])
after, parent = os.environ["AMBUSH_AFTER"].split(os.pathsep), os.getppid()

def wait():
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)  # the test that would have ended this has ended

def watch(event, arguments):
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.remove"):
        touched = arguments[1] if event == "os.rename" else arguments[0]
        if left > 0 and pattern.search(str(touched)) and (after == [""] or any(map(glob.glob, after))):
            left -= 1
            if left == 0 and deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif left == 0 and not Path(deed).exists():
                Path(deed).touch()  # the test that waits for this file stops the process
                wait()

sys.addaudithook(watch)
"""


def prepare(folder: Path) -> None:
    """Write the script into the folder."""
    (folder / "sitecustomize.py").write_text(SCRIPT)


def environment(folder: Path, path: str, deed: str, times: int = 1, after: Collection[str] = ()) -> dict[str, str]:
    """What has a process, and those that it starts, ambushed.

    Args:
        folder: where the script is.
        path: a pattern; the process is ambushed where it touches such a path.
        deed: `kill`, or a file: the first process that comes by makes it, and waits for good. Others pass then.
        times: how often such a path is touched, the time of the deed included.
        after: globs; what is touched before there is a file that matches one of them is not counted.
    """
    python_path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    values = {"AMBUSH_PATH": path, "AMBUSH": deed, "AMBUSH_TIMES": str(times), "AMBUSH_AFTER": os.pathsep.join(after)}
    return {"PYTHONPATH": python_path, **values}
