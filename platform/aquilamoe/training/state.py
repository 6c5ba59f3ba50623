"""Checkpoints of a training in progress: complete or absent, newest first, never pickled."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from aquilamoe.config.messages import UserError
from aquilamoe.model import Decoder
from aquilamoe.weights.huggingface import load_state, save_model

KEEP = 2
WEIGHTS, TRAINING = "model", "training"


@dataclass(frozen=True)
class Progress:
    """How far a stage has come. Data position and learning rate are functions of `step`."""

    step: int
    tokens: int


def save(directory: Path, model: Decoder, optimizer: Optimizer, progress: Progress) -> None:
    """Write `model/` (a Hugging Face directory, float32) and `training/` (optimizer moments) into `directory`."""
    save_model(model, directory / WEIGHTS)
    training = directory / TRAINING
    training.mkdir(parents=True, exist_ok=True)
    save_file(_moments(model, optimizer), training / "optimizer.safetensors")
    (training / "progress.json").write_text(json.dumps(asdict(progress)))


def load(directory: Path, model: Decoder, optimizer: Optimizer) -> Progress:
    """Restore what `save` wrote, bit for bit."""
    load_state(model, directory / WEIGHTS)
    load_moments(directory, model, optimizer)
    return Progress(**json.loads((directory / TRAINING / "progress.json").read_text()))


def load_moments(directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Give the optimizer the moments of a checkpoint whose tensors have the model's shapes."""
    path = directory / TRAINING / "optimizer.safetensors"
    if not path.exists():
        raise UserError(f"{path}: the source has no optimizer state; set optimizer_state=reset")
    moments = load_file(path)
    for name, parameter in model.named_parameters():
        state = {key: moments[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def save_checkpoint(out: Path, model: Decoder, optimizer: Optimizer, progress: Progress) -> Path:
    """Add `checkpoints/step-N` beside what is there: built under another name, made durable, renamed."""
    target = out / "checkpoints" / f"step-{progress.step:09d}"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary, model, optimizer, progress)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _sync(target.parent)
    for old in checkpoints(out)[KEEP:]:
        shutil.rmtree(old)
    return target


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a stage in progress, newest first."""
    return sorted((out / "checkpoints").glob("step-*"), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def device_of(gpus_per_worker: int, local_rank: int) -> torch.device:
    """The accelerator of a rank, or the CPU."""
    return torch.device("cuda", local_rank) if gpus_per_worker else torch.device("cpu")
