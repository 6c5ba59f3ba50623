"""What a checkpoint takes over from the one that it continues."""

import json
from collections.abc import Callable
from pathlib import Path

from aquilamoe.checkpoint.continuing import carry
from aquilamoe.checkpoint.hf_config import write_config
from aquilamoe.config.network import ModelConfig


def test_of_a_checkpoint_trained_here_config_and_generation_config_are_the_bytes_that_training_writes(
    network: Callable[..., ModelConfig], kind: str, tmp_path: Path
) -> None:
    model = network(kind)
    write_config(tmp_path / "source", model, "float32", eos_token_id=7)
    carry(tmp_path / "source", tmp_path / "target", model, "float32")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_of_a_checkpoint_from_elsewhere_all_that_training_does_not_change_is_kept(
    network: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = network("llama")
    write_config(tmp_path, model, "bfloat16", eos_token_id=7)
    stated = json.loads((tmp_path / "config.json").read_text())
    stated |= {"bos_token_id": 1, "eos_token_id": [2, 3], "pretraining_tp": 1, "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(stated | {"auto_map": {"AutoConfig": "code.py"}}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    carry(tmp_path, tmp_path / "target", model, "float32")
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert written == stated | {"dtype": "float32", "torch_dtype": "float32"}
    assert (tmp_path / "target" / "chat_template.jinja").is_file()
