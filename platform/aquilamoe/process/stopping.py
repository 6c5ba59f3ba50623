"""Requests from other processes that a training saves and stops: a file in its stage's directory."""

from pathlib import Path

STOP = "stop"


def request_stop(directory: Path) -> None:
    """Have the training in this directory save and stop after its current step."""
    (directory / STOP).touch()


def is_requested(directory: Path) -> bool:
    """Whether the training in this directory is to stop."""
    return (directory / STOP).exists()


def forget_request(directory: Path) -> None:
    """Drop a request that was made to an earlier run, or that came too late."""
    (directory / STOP).unlink(missing_ok=True)
