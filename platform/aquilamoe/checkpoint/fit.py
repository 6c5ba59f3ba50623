"""Whether the tensors of a checkpoint are those of its config.json: none missing, none left over. Torch-free."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.raw_reader import HASH_BYTES, RawReader
from aquilamoe.checkpoint.safetensors_header import TensorInfo
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE, ModelConfig

# What older files repeat, and config.json decides: the frequencies of the rotary embedding, and tables of them.
FIXED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
REMEDY = "take config.json and weights from the same checkpoint"


def check(
    directory: Path, model: ModelConfig, tensors: Mapping[str, TensorInfo], *, needs_fillers: bool = True
) -> None:
    """UserError, naming the tensor, unless `tensors` are those of `model`: from headers alone.

    needs_fillers: whether what the format demands and the model does not have must be there, and of its shape.
    """
    expected = tensor_names.tensor_shapes(model)
    fillers = set() if needs_fillers else _fillers(model)
    for name, shape in expected.items():
        if name in fillers:
            continue
        if name not in tensors:
            raise UserError(
                f"{directory}: there is no tensor '{name}' among its {len(tensors)}, config.json requires it; {REMEDY}"
            )
        if tensors[name].shape != shape:
            raise UserError(
                f"{directory}: tensor '{name}' has shape {tensors[name].shape}, config.json declares {shape}; {REMEDY}"
            )
    _refuse_further(directory, model, [name for name in tensors if name not in expected])


def _fillers(model: ModelConfig) -> set[str]:
    return {
        tensor_names.layer_name(model, layer, role)
        for layer in range(model.num_hidden_layers)
        for role in tensor_names.filler_roles(model)
    }


def _refuse_further(directory: Path, model: ModelConfig, further: Collection[str]) -> None:
    """What has no place would be lost silently: a bias, a value head, layers for several tokens at once."""
    is_tied = model.tie_word_embeddings
    lost = [name for name in further if not (name.endswith(FIXED) or (is_tied and name == tensor_names.HEAD))]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{directory}: tensor '{lost[0]}'{more} has no place in {tensor_names.architecture(model)} as "
            f"config.json describes it and would be lost; {REMEDY}, or remove what is not part of the model"
        )


def check_fillers(source: RawReader, model: ModelConfig) -> None:
    """UserError where a shared expert is not the zeros that its size implies: reads these few small tensors."""
    if tensor_names.SHARED_DOWN not in tensor_names.filler_roles(model):
        return
    for layer in range(model.num_hidden_layers):
        name = tensor_names.layer_name(model, layer, tensor_names.SHARED_DOWN)
        if model.is_sparse(layer) and name in source.tensors and not _is_zero(source, name):
            raise UserError(
                f"{source.directory}: tensor '{name}' is not zero, but shared_expert_intermediate_size "
                f"{ABSENT_SHARED_EXPERT_SIZE} marks a model without a shared expert; choose another checkpoint"
            )


def _is_zero(source: RawReader, name: str) -> bool:
    """Whether all elements of a tensor are 0 or -0."""
    import numpy as np  # a plan does without it

    info = source.info(name)
    size = info.num_bytes // max(1, math.prod(info.shape))
    room = bytearray(min(HASH_BYTES, info.num_bytes))
    for position in range(0, info.num_bytes, HASH_BYTES):
        piece = memoryview(room)[: info.num_bytes - position]
        source.read_into(name, position, piece)
        if (np.frombuffer(piece, f"<u{size}") << 1).any():
            return False
    return True
