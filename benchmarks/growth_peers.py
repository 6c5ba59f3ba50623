"""What benchmarks/growth.py measures beside this project; runs in a virtual environment of its own, without aquilamoe.

Each function grows the checkpoint in one directory into another, as its users do: on the CPU, in the checkpoint's type.
"""

import copy
import sys
import tempfile
from pathlib import Path

EXPERTS, TOP_K = 8, 2
NOISE = 0.1  # of the standard deviation of the weights


def mergekit(source: Path, target: Path, noise_scale: float | None = None) -> None:
    """mergekit-moe: every expert is the same model, with noise of its own where `noise_scale` is given."""
    import yaml
    from mergekit.scripts.moe import main

    experts = [{"source_model": str(source), "noise_scale": noise_scale} for _ in range(EXPERTS)]
    recipe = {"base_model": str(source), "gate_mode": "random", "experts": experts, "experts_per_token": TOP_K}
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump(recipe | {"dtype": "bfloat16"}, file)
        file.flush()
        allowed = "--i-understand-this-is-not-useful-without-training"
        main([file.name, str(target), allowed, "--clone-tensors", "--quiet"], standalone_mode=False)


def mergekit_noise(source: Path, target: Path) -> None:
    """mergekit-moe with noise, which it takes on an absolute scale; the weights' standard deviation is 0.02."""
    mergekit(source, target, noise_scale=NOISE * 0.02)


def transformers_in_memory(source: Path, target: Path) -> None:
    """The usual script: load the dense model, make a Mixtral of its size, copy feed-forwards into experts, save."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    values = dense.config.to_dict()
    shared = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    )
    config = MixtralConfig(
        **{key: values[key] for key in shared},
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        sparse = MixtralForCausalLM(config).bfloat16()
    sparse = sparse.to_empty(device="cpu")
    weights = dense.state_dict()
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            layer, _, role = name.partition(".mlp.")
            if role == "experts.gate_up_proj":
                both = torch.cat([weights[f"{layer}.mlp.gate_proj.weight"], weights[f"{layer}.mlp.up_proj.weight"]])
                parameter.copy_(both.expand_as(parameter))
            elif role == "experts.down_proj":
                parameter.copy_(weights[f"{layer}.mlp.down_proj.weight"].expand_as(parameter))
            elif role == "gate.weight":
                parameter.normal_(0.0, 0.02)
            else:
                parameter.copy_(weights[name])
    sparse.save_pretrained(target)


def hypercloning(source: Path, target: Path, snr_db: float | None = None) -> None:
    """HyperCloning to twice the width, as its published code goes about it; the code itself is on no package index.

    Load the model; make one of twice the sizes by `_from_config`, which initialises it; for every matrix repeat the old
    one, divide by the repeats of its columns, and with `snr_db` add noise to one block and take it from the next one
    beside it; assign; save.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = copy.deepcopy(model.config)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, key, 2 * getattr(config, key))
    grown = type(model)._from_config(config)
    old = dict(model.named_modules())
    for name, module in grown.named_modules():
        if isinstance(module, nn.Linear):
            noisy = snr_db if name != "lm_head" else None
            module.weight.data = _clone(module.weight.shape, old[name].weight.data, True, noisy)
        elif isinstance(module, nn.Embedding):
            module.weight.data = _clone(module.weight.shape, old[name].weight.data, False, None)
        elif name.endswith("norm"):
            module.weight.data = old[name].weight.data.repeat(2)
    grown.save_pretrained(target)


def hypercloning_noise(source: Path, target: Path) -> None:
    """HyperCloning with noise at a signal-to-noise ratio of 10 decibels."""
    hypercloning(source, target, snr_db=10.0)


def _clone(shape, weight, divide, snr_db):  # type: ignore[no-untyped-def]  # torch is imported by the contestants only
    import torch

    (rows, columns), repeats = weight.shape, (shape[0] // weight.shape[0], shape[1] // weight.shape[1])
    grown = weight.repeat(*repeats)
    if divide:
        grown = grown / repeats[1]
    if snr_db is not None:
        for row in range(0, shape[0], rows):
            for column in range(0, shape[1] - columns, 2 * columns):
                block = grown[row : row + rows, column : column + columns]
                power = (block**2).mean() / 10 ** (snr_db / 10)
                noise = torch.randn_like(block)
                noise = (noise * (power / (noise**2).mean()).sqrt()).to(block.dtype)
                block += noise
                grown[row : row + rows, column + columns : column + 2 * columns] -= noise
    return grown


PEERS = {
    "mergekit-moe": mergekit,
    "mergekit-moe with noise": mergekit_noise,
    "transformers in memory": transformers_in_memory,
    "HyperCloning": hypercloning,
    "HyperCloning with noise": hypercloning_noise,
}
IMPORTS = {"mergekit-moe": "mergekit.scripts.moe", "mergekit-moe with noise": "mergekit.scripts.moe"}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
