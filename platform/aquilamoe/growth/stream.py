"""A checkpoint in, a grown checkpoint out, without either ever being in memory as a whole."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.weights import configuration, names, store

Progress = Callable[[int, int], None]  # (tensors written, tensors of the target)
Stream = Iterator[tuple[str, Tensor]]  # on-disk names with tensors, in the order of the target's files


def silent(done: int, total: int) -> None:
    """The progress that nobody watches."""


def rewrite(
    source: Path,
    target: Path,
    configs: tuple[ModelConfig, ModelConfig],
    grow: Callable[[store.Reader], Stream],
    progress: Progress,
) -> None:
    """Write to `target` what `grow` yields while reading `source`, in the source's dtype; then config and tokenizer.

    configs: of the source and of the target.
    Raises UserError when the source's weights are not what its config.json says, or source and target are the same.
    """
    source_config, target_config = configs
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is source and target at once, 2 directories are needed; choose another target")
    shapes = names.tensor_shapes(target_config)
    with store.Reader(source) as reader:
        _check_weights(source, reader, source_config)
        dtype = reader.dtype(names.EMBEDDING)
        store.write(target, shapes, dtype, _watch(grow(reader), len(shapes), progress))
    # The source's own generation settings, if it has any, take the place of the plain ones.
    eos_token_id = configuration.read_eos_token_id(source)
    configuration.write_config(target, target_config, str(dtype).removeprefix("torch."), eos_token_id)
    configuration.copy_companions(source, target)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of weights are taken in float32 or wider, and rounded once, when they are written."""
    return torch.promote_types(dtype, torch.float32)


def _watch(tensors: Stream, total: int, progress: Progress) -> Stream:
    for done, item in enumerate(tensors):
        progress(done, total)
        yield item
    progress(total, total)


def _check_weights(source: Path, reader: store.Reader, config: ModelConfig) -> None:
    for name, shape in names.tensor_shapes(config).items():
        if reader.shape(name) != shape:
            raise UserError(
                f"{source}: tensor '{name}' has shape {reader.shape(name)}, config.json says {shape}; "
                "take config.json and weights from the same checkpoint"
            )
