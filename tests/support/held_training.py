"""Training on Ray's workers that waits at named steps, so that whatever disturbs it finds it there."""

import pickle
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from aquilamoe.training.job import Job, Rank
from aquilamoe.training.loop import train


class HeldTraining:
    """A training that waits before some of its steps, and takes its time for the others, until a file `go` is there.

    It travels to the workers with its code, for they have no tests: pass it to `run_on_workers`.
    """

    def __init__(self, job: Job, folder: Path, holds: Collection[int] = (), pace_s: float = 0.0) -> None:
        """Hold a job.

        Args:
            job: what is trained.
            folder: of the files `go` and `at-STEP`, which a worker makes when it waits before a step.
            holds: the steps before which it waits.
            pace_s: seconds that every other step takes at least.
        """
        folder.mkdir(parents=True, exist_ok=True)

        def work(rank: Rank) -> dict[str, Any]:
            from aquilamoe.training.step import TrainStep

            original = TrainStep.step

            def step(self: TrainStep, step: int, rows: np.ndarray) -> dict[str, float]:
                if step in holds:
                    (folder / f"at-{step}").touch()
                    while not (folder / "go").exists():
                        time.sleep(0.01)
                elif pace_s and not (folder / "go").exists():
                    time.sleep(pace_s)
                return original(self, step, rows)

            TrainStep.step = step  # type: ignore[method-assign]
            try:
                return train(job, rank)
            finally:
                TrainStep.step = original  # type: ignore[method-assign]

        self.folder, self.out, self.code = folder, job.out, cloudpickle.dumps(work)

    def is_at(self, step: int) -> bool:
        """Whether it waits before this step, or has."""
        return (self.folder / f"at-{step}").exists()

    def go(self) -> None:
        """Let it wait no more."""
        (self.folder / "go").touch()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        return pickle.loads, (self.code,)

    def __call__(self, _: Rank) -> dict[str, Any]:
        raise AssertionError("only what it becomes in a worker is called")
