"""Checkpoints of a training in progress: complete or absent, newest first, never pickled."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aquilamoe.config.messages import UserError
from aquilamoe.model import Decoder
from aquilamoe.training.optimizer import AnyOptimizer, read_state, write_state
from aquilamoe.weights.huggingface import load_state, save_model

KEEP = 2  # should the newest turn out bad, there is one before it
WEIGHTS, TRAINING = "model", "training"
HIDDEN = "."  # begins the name of a checkpoint that is being written or removed
MOMENTS, PROGRESS, EXTRA = "optimizer.safetensors", "progress.json", "extra.safetensors"
NOTHING: Mapping[str, Tensor] = {}


def save(
    directory: Path, model: Decoder, optimizer: AnyOptimizer, step: int, extra: Mapping[str, Tensor] = NOTHING
) -> None:
    """Write `model/` (a Hugging Face directory, float32) and `training/` (optimizer moments) into `directory`.

    extra: the little that is state besides; the position in the data and the learning rate are functions of `step`.
    """
    save_model(model, directory / WEIGHTS)
    training = directory / TRAINING
    training.mkdir(parents=True, exist_ok=True)
    save_file(_moments(model, optimizer), training / MOMENTS)
    if extra:
        save_file({name: tensor.cpu().contiguous() for name, tensor in extra.items()}, training / EXTRA)
    (training / PROGRESS).write_text(json.dumps({"step": step}))


def load_extra(directory: Path) -> dict[str, Tensor]:
    """What was `extra` when a checkpoint or a finished stage was saved."""
    path = directory / TRAINING / EXTRA
    return load_file(path) if path.exists() else {}


def load(checkpoint: Path, model: Decoder, optimizer: AnyOptimizer) -> int:
    """Restore what `save` wrote, bit for bit, and return its step. UserError if a file is damaged."""
    try:
        load_weights(checkpoint, model)
        load_moments(checkpoint, model, optimizer)
        return int(json.loads((checkpoint / TRAINING / PROGRESS).read_text())["step"])
    except (UserError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(";")[0]
        raise UserError(
            f"{checkpoint}: cannot continue from this checkpoint ({reason}); remove it and run again: "
            "the one before it takes its place"
        ) from error


def load_weights(directory: Path, model: Decoder) -> None:
    """Give the model the weights of a checkpoint, or of a finished stage."""
    load_state(model, directory / WEIGHTS)


def load_moments(directory: Path, model: nn.Module, optimizer: AnyOptimizer) -> None:
    """Give the optimizer the moments of a checkpoint whose tensors have the model's shapes."""
    path = directory / TRAINING / MOMENTS
    if not path.exists():
        raise UserError(f"{path}: there is no optimizer state; set optimizer_state=reset")
    try:
        moments = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); make it again, or set optimizer_state=reset") from error
    try:
        write_state(model, optimizer, moments)
    except KeyError as error:
        raise UserError(
            f"{path}: there is no {error}, it is the state of another optimizer; use that one, or set "
            "optimizer_state=reset"
        ) from error


def _moments(model: nn.Module, optimizer: AnyOptimizer) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in read_state(model, optimizer).items()}


def save_checkpoint(
    out: Path, model: Decoder, optimizer: AnyOptimizer, step: int, extra: Mapping[str, Tensor] = NOTHING
) -> Path:
    """Add `checkpoints/step-N` beside what is there: built under another name, made durable, renamed."""
    folder = out / "checkpoints"
    for leftover in folder.glob(f"{HIDDEN}step-*"):
        shutil.rmtree(leftover)
    target = folder / f"step-{step:09d}"
    temporary = folder / f"{HIDDEN}{target.name}"
    save(temporary, model, optimizer, step, extra)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    temporary.rename(target)
    _sync(folder)
    for old in checkpoints(out)[KEEP:]:
        discard(old)
    return target


def discard(checkpoint: Path) -> None:
    """Take a checkpoint away: never half of it."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{HIDDEN}{checkpoint.name}")))


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a stage in progress, newest first."""
    return sorted((out / "checkpoints").glob("step-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def only_writer(out: Path, wait_s: float = 60.0) -> Iterator[None]:
    """Wait until no other process trains in this directory, and keep it so.

    The workers of a killed driver live for some seconds more. The kernel drops the lock with the process.
    """
    lock = out / "checkpoints" / "writer.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{out}: another process has been training here for {wait_s:.0f} s; end it and run again"
                    ) from None
                time.sleep(0.1)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
