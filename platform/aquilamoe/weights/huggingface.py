"""The weights of a `Decoder`, to and from a Hugging Face directory."""

from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE
from aquilamoe.config.schema import ModelConfig
from aquilamoe.model import Decoder
from aquilamoe.weights import names, store
from aquilamoe.weights.configuration import CONFIG_FILE, read_config, write_config


@torch.no_grad()
def _views(model: Decoder) -> dict[str, Tensor]:
    """Every parameter of the model by on-disk name: of stacked experts, the slice of each."""
    config, parameters = model.config, dict(model.named_parameters())
    views: dict[str, Tensor] = {name: parameters[name] for name in names.outer_shapes(config)}
    fillers = set(names.filler_roles(config))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        stacked: dict[str, Tensor] = {}
        if config.is_sparse(layer):
            for role in (names.GATE, names.UP, names.DOWN):
                projection = role.removeprefix("mlp.").removesuffix(".weight")
                experts = parameters[f"{prefix}mlp.experts.{projection}"].unbind()
                stacked |= {names.expert_role(index, role): expert for index, expert in enumerate(experts)}
        for role, name in names.layer_names(config, layer).items():
            if role not in fillers:
                views[name] = stacked[role] if role in stacked else parameters[prefix + role]
    return views


def save_model(
    model: Decoder, directory: Path, dtype: torch.dtype | None = None, eos_token_id: int | None = None
) -> None:
    """Write weights (in `dtype`, or the model's own) and config; tokenizer files come by `copy_companions`."""
    config, views = model.config, _views(model)
    dtype = dtype or model.lm_head.weight.dtype
    shapes = names.tensor_shapes(config)
    tensors = ((name, views[name] if name in views else torch.zeros(shape)) for name, shape in shapes.items())
    store.write(directory, shapes, dtype, tensors)
    write_config(directory, config, str(dtype).removeprefix("torch."), eos_token_id)


@torch.no_grad()
def load_state(model: Decoder, directory: Path) -> None:
    """Copy the weights of a checkpoint directory into the model, cast to the model's dtype.

    Raises `UserError` when the files lack a tensor, have one that the model does not have, or of another shape.
    """
    views = _views(model)
    with store.Reader(directory) as reader:
        check(model.config, reader)
        for name, view in views.items():
            view.copy_(reader.get(name))


def check(config: ModelConfig, reader: store.Reader) -> None:
    """Refuse tensors that are missing or of another shape, and those that the model would silently leave out."""
    expected = names.tensor_shapes(config)
    fillers = {
        names.layer_name(config, layer, role)
        for layer in range(config.num_hidden_layers)
        for role in names.filler_roles(config)
    }
    for name in reader.names:
        if name in fillers and name.endswith(names.SHARED_DOWN) and reader.get(name).any():
            raise UserError(
                f"{reader.directory}: tensor '{name}' is not zero, but shared_expert_intermediate_size "
                f"{ABSENT_SHARED_EXPERT_SIZE} marks a model without a shared expert; choose another checkpoint"
            )
        # Older files repeat a tied head, and the fixed frequencies of the rotary embedding.
        redundant = (name == names.HEAD and config.tie_word_embeddings) or name.endswith(".rotary_emb.inv_freq")
        if name not in expected and not redundant:
            raise UserError(
                f"{reader.directory}: tensor '{name}' has no place in {names.architecture(config)} as configured; "
                f"take {CONFIG_FILE} and weights from the same checkpoint"
            )
    for name, shape in expected.items():
        if name not in fillers and reader.shape(name) != shape:
            raise UserError(
                f"{reader.directory}: tensor '{name}' has shape {reader.shape(name)}, the model {shape}; "
                f"take {CONFIG_FILE} and weights from the same checkpoint"
            )


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a checkpoint directory, on the CPU in `dtype`. Raises `UserError` for what it cannot compute."""
    with torch.device("meta"):  # no time for initial values that the files replace
        model = Decoder(read_config(directory)).to(dtype)
    model.to_empty(device="cpu")
    if model.config.tie_word_embeddings:  # `to_empty` gives the two names a tensor each
        model.lm_head.weight = model.model.embed_tokens.weight
    load_state(model, directory)
    return model
