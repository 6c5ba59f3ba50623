"""Checkpoints of a training in progress: complete or absent, newest first, never pickled.

A checkpoint is what a finished stage is, and the hashes of all its bytes: `model/`, a Hugging Face directory, and
`training/`, the optimizer's state. All processes write it together, each what it holds, while training continues.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

from aquilamoe.checkpoint import sharding, tensor_names
from aquilamoe.checkpoint.dtensor import like, own_part
from aquilamoe.checkpoint.hf_config import write_config
from aquilamoe.checkpoint.state_dict import load_state, on_disk
from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import contents
from aquilamoe.config.schema import ModelConfig
from aquilamoe.files import sync_directory, take_lock
from aquilamoe.model.transformer import Decoder
from aquilamoe.training.dcp_storage import DTYPE, Files, FileSlice, PartsPlanner, SafetensorsWriter, Staged, TensorPart
from aquilamoe.training.optimizer import AnyOptimizer, read_state, write_state
from aquilamoe.training.parallel import ParallelContext

KEEP = 2  # should the newest turn out bad, there is one before it
WEIGHTS, TRAINING = "model", "training"
MILESTONES = "milestones"
HIDDEN = "."  # begins the name of a checkpoint that is being written or removed
MOMENTS = "optimizer.safetensors"
PROGRESS = "progress.json"
EXTRA = "extra.safetensors"
HASHES = "hashes.json"
ONE_FILE = 10**18  # bytes: the moments have one file whatever their size
NOTHING: Mapping[str, Tensor] = {}
log = logging.getLogger(__name__)
_in_flight: Future[Any] | None = None  # the checkpoint that this process is writing


# Writing


def save(
    directory: Path,
    model: Decoder,
    optimizer: AnyOptimizer,
    step: int,
    *,
    extra: Mapping[str, Tensor] = NOTHING,
    group: ParallelContext | None = None,
) -> None:
    """Leave `model/` (a Hugging Face directory, float32) and `training/` (optimizer state) in `directory`.

    All processes call it, and it returns when all files are written.

    Args:
        directory: of the stage.
        model: whose weights are saved.
        optimizer: whose moments are saved.
        step: optimizer steps taken; the position in the data and the learning rate are functions of it.
        extra: further small state, by name.
        group: the processes that train together; None is this one alone.

    Raises:
        UserError: the disk is full.
    """
    wait()
    built = directory / f"{HIDDEN}result"

    def publish(_: list[FileSlice]) -> None:
        _write_rest(built, model.config, step, extra)
        for part in (WEIGHTS, TRAINING):
            shutil.rmtree(directory / part, ignore_errors=True)
            (built / part).rename(directory / part)
        built.rmdir()

    if group is None or group.is_first:
        shutil.rmtree(built, ignore_errors=True)
    with _one_line():
        dcp.save(**_order(built, model, optimizer, publish=publish, group=group))


def save_checkpoint(
    out: Path,
    model: Decoder,
    optimizer: AnyOptimizer,
    step: int,
    *,
    extra: Mapping[str, Tensor] = NOTHING,
    group: ParallelContext | None = None,
    keep_in: Path | None = None,
) -> Path:
    """Start to add `checkpoints/step-N` beside the existing ones: built under another name, made durable, renamed.

    All processes call it. It first waits for a checkpoint that is still being written, and returns when the state has
    been copied; `wait` waits until this one is written. Arguments are those of `save`, with `out` as the directory, and
    `keep_in`, a folder where the checkpoint stays under the same name; None: nowhere.

    Returns:
        The path that the checkpoint will have.

    Raises:
        UserError: the checkpoint before could not be written.
    """
    global _in_flight
    wait()
    folder = out / "checkpoints"
    target = folder / f"step-{step:09d}"
    built = folder / f"{HIDDEN}{target.name}"

    def publish(spans: list[FileSlice]) -> None:
        _write_rest(built, model.config, step, kept)
        _write_hashes(built, spans)
        for path in [*contents(built), built]:
            sync_directory(path)
        built.rename(target)
        sync_directory(folder)
        if keep_in is not None:
            _keep(target, keep_in)
        for old in _complete(out)[KEEP:]:
            discard(old)

    if group is None or group.is_first:
        for leftover in folder.glob(f"{HIDDEN}step-*"):
            shutil.rmtree(leftover)
    kept = {name: tensor.to("cpu", copy=True) for name, tensor in extra.items()}
    order = _order(built, model, optimizer, publish=publish, group=group, copied=True)
    writing = dcp.async_save(**order, async_stager=Staged())
    assert isinstance(writing, Future)
    _in_flight = writing
    return target


def milestones(out: Path) -> Path:
    """The folder, outside of all outputs, of checkpoints of a stage that stay when it goes on."""
    return out.parent.parent / MILESTONES / out.stem


def _keep(checkpoint: Path, folder: Path) -> None:
    """Give the files of a checkpoint second names in a folder, or copies where the file system has no second names."""
    kept, built = folder / checkpoint.name, folder / f"{HIDDEN}{checkpoint.name}"
    shutil.rmtree(built, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, built, copy_function=os.link)
    except (shutil.Error, OSError):
        shutil.rmtree(built, ignore_errors=True)
        shutil.copytree(checkpoint, built)
    shutil.rmtree(kept, ignore_errors=True)  # of steps that a rollback has undone
    built.rename(kept)
    sync_directory(folder)


def wait() -> None:
    """Wait until no checkpoint of this process is being written. Raises the error of one that failed."""
    global _in_flight
    writing, _in_flight = _in_flight, None
    if writing:
        with _one_line():
            writing.result()


def _order(
    folder: Path,
    model: Decoder,
    optimizer: AnyOptimizer,
    *,
    publish: Callable[[list[FileSlice]], None],
    group: ParallelContext | None,
    copied: bool = False,
) -> dict[str, Any]:
    """The arguments of torch.distributed.checkpoint: the parts, where they go, and who takes part."""
    if group is None or group.world_size == 1:
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    if isinstance(model, FSDPModule):  # a forward pass leaves the outermost parameters whole
        model.reshard()
    moments = read_state(model, optimizer)
    rank, world_size = (group.rank, group.world_size) if group else (0, 1)
    parts = {
        key: TensorPart.of(tensor, copied)
        for index, (key, tensor) in enumerate([*model.named_parameters(), *moments.items()])
        # Of what all have alike, each writes a share; of what is cut, torch's planner sees to it.
        if hasattr(tensor, "device_mesh") or index % world_size == rank
    }
    return {
        "state_dict": parts,
        "storage_writer": SafetensorsWriter(folder, _files(model.config, moments), publish),
        "planner": PartsPlanner(),
        "process_group": group.background if group else None,
    }


def _files(config: ModelConfig, moments: Mapping[str, Tensor]) -> Files:
    weights = sharding.plan_shards(tensor_names.tensor_shapes(config), sharding.spell(DTYPE), sharding.MAX_SHARD_BYTES)
    shards = {f"{WEIGHTS}/{shard.file}": shard for shard in weights}
    if moments:
        shapes = {key: tuple(tensor.shape) for key, tensor in moments.items()}
        shards[f"{TRAINING}/{MOMENTS}"] = sharding.plan_shards(shapes, sharding.spell(DTYPE), ONE_FILE)[0]
    return Files.of(shards, on_disk(config) | {key: (key,) for key in moments})


def _write_rest(folder: Path, config: ModelConfig, step: int, extra: Mapping[str, Tensor]) -> None:
    """All of a checkpoint that is no tensor of the model or of the optimizer."""
    shapes = tensor_names.tensor_shapes(config)
    shards = sharding.plan_shards(shapes, sharding.spell(DTYPE), sharding.MAX_SHARD_BYTES)
    if (index := sharding.index(shards, shapes, sharding.spell(DTYPE))) is not None:
        (folder / WEIGHTS / sharding.INDEX_FILE).write_bytes(index)
    write_config(folder / WEIGHTS, config, str(DTYPE).removeprefix("torch."), None)
    (folder / TRAINING).mkdir(exist_ok=True)
    if extra:
        save_file({name: tensor.cpu().contiguous() for name, tensor in extra.items()}, folder / TRAINING / EXTRA)
    (folder / TRAINING / PROGRESS).write_text(json.dumps({"step": step}))


def _write_hashes(folder: Path, spans: list[FileSlice]) -> None:
    """What was written, and every other file as it is."""
    known = {span.file for span in spans}
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in contents(folder) if "." in path.name}
    small = [FileSlice.of(folder, file, 0, size) for file, size in sizes.items() if file not in known]
    (folder / HASHES).write_text(json.dumps([asdict(span) for span in [*spans, *small]]))


@contextmanager
def _one_line() -> Iterator[None]:
    """Raise what is wrong, and not that something is wrong on some rank."""
    try:
        yield
    except CheckpointException as failure:
        raise next(iter(failure.failures.values()))[0] from None


# Reading


def newest_intact(out: Path, group: ParallelContext) -> tuple[Path | None, int]:
    """The newest checkpoint whose bytes are those that were written, and how many newer ones were passed over.

    Those are removed, with a warning. All processes call it, and each reads a part of the bytes.

    Returns:
        The checkpoint, None if there is no intact one; and the number of those passed over.
    """
    for passed_over, path in enumerate(found := checkpoints(out)):
        damage = _damage(path, group)
        group.wait()  # all have seen it
        if damage is None:
            return path, passed_over
        if group.is_first:
            log.warning("%s: is passed over for the checkpoint before it, if there is one: %s", path, damage)
            discard(path)
    group.wait()
    return None, len(found)


def _damage(checkpoint: Path, group: ParallelContext) -> str | None:
    """What is wrong with a checkpoint, in the bytes of this process or of another; None if it is good."""
    found: str | None = None
    try:
        spans = [FileSlice(**entry) for entry in json.loads((checkpoint / HASHES).read_text())]
        bad = [span for span in spans[group.rank :: group.world_size] if not span.is_intact(checkpoint)]
        if bad:
            found = f"{bad[0].file} has other bytes than were written"
    except (OSError, ValueError, TypeError) as error:
        found = " ".join(str(error).split())
    num_bad = group.sum_(torch.tensor(int(found is not None), device=group.device)).item()
    return found or ("a part that another process has read is damaged" if num_bad else None)


def load(checkpoint: Path, model: Decoder, optimizer: AnyOptimizer) -> int:
    """Restore what `save` wrote, bit for bit.

    Returns:
        The optimizer step that the checkpoint was written after.

    Raises:
        UserError: a file is damaged.
    """
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


def load_extra(directory: Path) -> dict[str, Tensor]:
    """The `extra` of a checkpoint or a finished stage, by name; empty if it had none."""
    path = directory / TRAINING / EXTRA
    return load_file(path) if path.exists() else {}


def load_weights(directory: Path, model: Decoder) -> None:
    """Load into the model, or this process's part of it, the weights of a checkpoint, or of a finished stage."""
    load_state(model, directory / WEIGHTS)


def load_moments(directory: Path, model: Decoder, optimizer: AnyOptimizer) -> None:
    """Load the state of a checkpoint whose tensors have the model's shapes into the optimizer: what this process holds.

    Raises:
        UserError: there is no state, it is damaged, or it is another optimizer's.
    """
    path = directory / TRAINING / MOMENTS
    if not path.exists():
        raise UserError(f"{path}: there is no optimizer state; set optimizer_state=reset")
    try:
        with safe_open(path, framework="pt") as file:
            write_state(model, optimizer, _Stored(file, model))
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); make it again, or set optimizer_state=reset") from error
    except KeyError as error:
        raise UserError(
            f"{path}: there is no {error}, it is the state of another optimizer; use that one, or set "
            "optimizer_state=reset"
        ) from error


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file of moments, read on request, and cut as the parameters are."""

    def __init__(self, file: Any, model: Decoder) -> None:
        self._file, self._keys = file, set(file.keys())
        self._parameters = dict(model.named_parameters())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        stored, parameter = self._file.get_slice(key), self._parameters[key.rpartition("/")[0]]
        if not stored.get_shape():
            return self._file.get_tensor(key)
        _, place = own_part(parameter)
        return like(stored[place].contiguous().to(parameter.device), parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


# Existing checkpoints


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint atomically."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{HIDDEN}{checkpoint.name}")))


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a stage in progress, newest first, with the one that this process is writing."""
    wait()
    return _complete(out)


def _complete(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def only_writer(out: Path, wait_s: float = 60.0) -> Iterator[None]:
    """Wait until no other process trains in this directory, and keep it so.

    The workers of a killed driver run for some seconds more. The kernel drops the lock with the process.

    Raises:
        UserError: another process still trains here after `wait_s` seconds.
    """
    lock = out / "checkpoints" / "writer.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        if not take_lock(file, wait_s):
            raise UserError(f"{out}: another process has been training here for {wait_s:.0f} s; end it and run again")
        yield
