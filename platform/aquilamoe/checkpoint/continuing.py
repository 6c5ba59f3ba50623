"""What a checkpoint takes over from the one that it continues: all but weights and their type."""

from pathlib import Path

from aquilamoe.checkpoint import carrying, companions, hf_config
from aquilamoe.config.network import ModelConfig


def carry(source: Path, target: Path, model: ModelConfig, dtype: str) -> None:
    """Copy tokenizer, templates, generation settings and licences, and write config.json.

    Args:
        source: directory of the checkpoint that is continued.
        target: directory of the checkpoint that continues it, with the same network.
        model: the network of both.
        dtype: of the target's weights, e.g. `bfloat16`.

    Raises:
        UserError: the source's config.json is damaged.
    """
    companions.copy_companions(source, target)
    found = hf_config.read_checkpoint_config(source)
    values = carrying.carried(found, model, range(model.num_hidden_layers), dtype)
    plain = hf_config.config_to_dict(model, dtype=dtype, architecture=values["architectures"][0])
    # In the order of a checkpoint that continues none: of one trained here, these are the same bytes.
    ordered = {key: values[key] for key in (*plain, *values) if key in values}
    hf_config.write_json(target / hf_config.CONFIG_FILE, ordered)
