"""The weights of a `Decoder`, to and from a Hugging Face directory."""

from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.checkpoint import fit, tensor_names
from aquilamoe.checkpoint import reader as reading
from aquilamoe.checkpoint.dtensor import own_part
from aquilamoe.checkpoint.hf_config import read_config, write_config
from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.transformer import Decoder


def on_disk(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Names in files of every parameter of a `Decoder`: one, or of stacked experts one for each."""
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in tensor_names.outer_shapes(config)}
    for layer in range(config.num_hidden_layers):
        of_role = tensor_names.layer_names(config, layer)
        for filler in tensor_names.filler_roles(config):
            of_role.pop(filler, None)
        prefix = f"model.layers.{layer}."
        for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN) if config.is_sparse(layer) else ():
            projection = role.removeprefix("mlp.").removesuffix(".weight")
            experts = [of_role.pop(tensor_names.expert_role(expert, role)) for expert in range(config.num_experts)]
            found[f"{prefix}mlp.experts.{projection}"] = tuple(experts)
        found |= {prefix + role: (name,) for role, name in of_role.items()}
    return found


def _views(model: Decoder) -> dict[str, Tensor]:
    """Every parameter of the model by on-disk name: of stacked experts, the slice of each."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        file_name: view
        for name, file_names in on_disk(model.config).items()
        for file_name, view in zip(
            file_names, parameters[name].unbind() if parameters[name].ndim == 3 else (parameters[name],), strict=True
        )
    }


def save_model(
    model: Decoder, directory: Path, dtype: torch.dtype | None = None, eos_token_id: int | None = None
) -> None:
    """Write weights (in `dtype`, or the model's own) and config; tokenizer files come by `copy_companions`."""
    config, views = model.config, _views(model)
    dtype = dtype or model.lm_head.weight.dtype
    shapes = tensor_names.tensor_shapes(config)
    tensors = ((name, views[name] if name in views else torch.zeros(shape)) for name, shape in shapes.items())
    reading.write(directory, shapes, dtype, tensors)
    write_config(directory, config, str(dtype).removeprefix("torch."), eos_token_id)


@torch.no_grad()
def load_state(model: Decoder, directory: Path) -> None:
    """Copy the weights of a checkpoint directory into the model, or this process's part of it, cast to its dtype.

    Only what the process holds is read.

    Raises:
        UserError: the files lack a tensor, have one that the model does not have, or one of another shape.
    """
    with reading.Reader(directory) as reader:
        check(model.config, reader)
        for name, file_names in on_disk(model.config).items():
            part, place = own_part(model.get_parameter(name))
            if part.ndim < 3:
                part.copy_(reader.get(file_names[0])[place])
            else:
                for expert, file_name in zip(part, file_names[place[0]], strict=True):
                    expert.copy_(reader.get(file_name)[place[1:]])


def check(config: ModelConfig, reader: reading.Reader) -> None:
    """Refuse tensors that are missing or of another shape, and those that the model would silently leave out."""
    fit.check(reader.directory, config, reader.tensors, needs_fillers=False)
    fit.check_fillers(reader, config)


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Load the model of a checkpoint directory, on the CPU in `dtype`.

    Raises:
        UserError: the model cannot be computed, or its files do not match its config.json.
    """
    with torch.device("meta"):  # no time for initial values that the files replace
        model = Decoder(read_config(directory)).to(dtype)
    model.to_empty(device="cpu")
    if model.config.tie_word_embeddings:  # `to_empty` gives the two names a tensor each
        model.lm_head.weight = model.model.embed_tokens.weight
    load_state(model, directory)
    return model
