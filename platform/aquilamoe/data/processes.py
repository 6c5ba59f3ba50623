"""Processes of this machine that share a list of tasks, each of which is a function call that leaves files."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from aquilamoe.config.messages import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

PARENT_POLL_S = 0.5


def available() -> int:
    """How many processes this machine runs at a time: the cores that this one may use."""
    return len(os.sched_getaffinity(0))


def share_out(function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """Yield `function(task)` of every task, in the order in which they are done; with one process, here.

    function: of a module, so that other processes find it. What it raises is raised here, after the tasks that run are
    done. UserError if a process is killed. The processes end when this one does, however it ends.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        yield from map(function, tasks)
        return
    # Not forked: this process has threads, of torch and of Ray, whose locks a copy would never see released.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (os.getpid(),)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that prepares data was killed, perhaps for lack of memory; run again, finished shards stay "
                "(with fewer processes: cluster.data_processes)"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    """In a new process: one thread for the tokenizer, the keyboard is the parent's, and no life after it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)
