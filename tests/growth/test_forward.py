"""Checkpoints that compute without being loaded: what they compute, and in how much memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquilamoe.checkpoint import reader, tensor_names
from aquilamoe.checkpoint.hf_config import write_config
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth.bounds import certificate_bytes
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.forward import StreamedDecoder, opened
from aquilamoe.growth.scale_out import scale_out

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NARROW = EXPERTS | {"moe_intermediate_size": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"head_dim": 6, "sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen2Moe": NARROW | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [1], "norm_topk_prob": False},
    "Qwen3Moe": NARROW | {"head_dim": 8, "norm_topk_prob": True},
    "Olmoe": EXPERTS | {"norm_topk_prob": False},
}
TOKENS_BT = torch.arange(52).view(4, 13) * 7 % 48


def save(directory: Path, family: str, seed: int) -> Any:
    """A model of transformers in which every part matters, and its directory."""
    import transformers

    transformers.logging.disable_progress_bar()
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def streamed_logits(directory: Path) -> Tensor:
    with opened(directory) as (checkpoint,):
        decoder = StreamedDecoder(*checkpoint)
        x_btd = decoder.embed(TOKENS_BT[:, :-1])
        for layer in range(decoder.config.num_hidden_layers):
            x_btd, _ = decoder.run_layer(layer, x_btd)
        return decoder.normalize(x_btd) @ decoder.head_rows(0, decoder.config.vocab_size).T


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_logits_and_losses_that_a_certificate_is_made_of(tmp_path: Path, family: str) -> None:
    models = [save(tmp_path / name, family, seed) for name, seed in (("source", 0), ("target", 1))]
    with torch.no_grad():
        logits = [model(TOKENS_BT[:, :-1]).logits.flatten(0, 1) for model in models]
    assert (streamed_logits(tmp_path / "source") - logits[0]).abs().max() < 1e-5 * logits[0].abs().max()
    found = certify(tmp_path / "source", tmp_path / "target", TOKENS_BT, Claim(preserving=False, tolerance=1e-3))
    losses = [torch.nn.functional.cross_entropy(each, TOKENS_BT[:, 1:].flatten()).item() for each in logits]
    assert [found["source_loss"], found["target_loss"]] == pytest.approx(losses, rel=1e-5)
    assert found["max_abs_dlogit"] == pytest.approx((logits[0] - logits[1]).abs().max().item(), rel=1e-4)
    divergence = torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found["kl"] == pytest.approx(divergence.item(), rel=1e-4)


DENSE = ModelConfig(
    vocab_size=40_000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=128,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    qkv_bias=False,
    tie_word_embeddings=False,
    num_experts=0,
    num_experts_per_tok=0,
    moe_intermediate_size=0,
)
SPARSE = DENSE.model_copy(update={"num_experts": 24, "num_experts_per_tok": 2, "moe_intermediate_size": 512})
UPCYCLING = UpcyclingConfig(method="copy", noise=0.0, drop_ratio=0.0, router_init="normal", router_std=0.02)
SEQUENCES, LENGTH = 4, 64
# VmHWM is the peak of a process itself; what getrusage returns may be that of the process that forked it.
MEASURE = """
import json, re, sys, torch
from pathlib import Path
from aquilamoe.config.schema import UpcyclingConfig
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
torch.set_num_threads(1)
source, target = map(Path, sys.argv[1:3])
tokens_bt = torch.arange(int(sys.argv[3]) * int(sys.argv[4])).view(int(sys.argv[3]), -1) * 7919 % 40_000
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
how = UpcyclingConfig(**json.loads(sys.argv[5]))
found = certify(source, target, tokens_bt, Claim(preserving=True, tolerance=0.5, growth=how))
print(json.dumps({"bytes": peak() - before, "found": found}))
"""


def write_cheaply(directory: Path, config: ModelConfig) -> None:
    """Weights of some size that are drawn once."""
    shapes, dtype = tensor_names.tensor_shapes(config), torch.bfloat16
    noise = (0.05 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).to(dtype)
    tensors = (
        (name, noise.repeat(-(-torch.Size(shape).numel() // len(noise)))[: torch.Size(shape).numel()].view(shape))
        for name, shape in shapes.items()
    )
    reader.write(directory, shapes, dtype, tensors)
    write_config(directory, config, "bfloat16", None)


@pytest.mark.process
def test_the_memory_of_a_certificate_is_bounded_whatever_the_size_of_the_models(tmp_path: Path) -> None:
    write_cheaply(tmp_path / "source", DENSE)
    scale_out(tmp_path / "source", tmp_path / "target", SPARSE, UPCYCLING, 0)
    size = sum(path.stat().st_size for path in (tmp_path / "target").glob("*.safetensors"))
    words = [tmp_path / "source", tmp_path / "target", SEQUENCES, LENGTH + 1, UPCYCLING.model_dump_json()]
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, words)], capture_output=True, text=True, check=True
    ).stdout
    measured = json.loads(output)
    bound = certificate_bytes(DENSE, SPARSE, SEQUENCES, LENGTH)
    assert measured["found"]["passed"] is True
    assert 0 < measured["bytes"] <= bound < size / 3


def test_a_certificate_of_16_billion_parameters_fits_a_machine_of_24_gigabytes() -> None:
    paper = DENSE.model_copy(
        update={
            "vocab_size": 151_851,
            "hidden_size": 5120,
            "intermediate_size": 20_480,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "qkv_bias": True,
        }
    )
    assert paper.num_params > 16e9
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20_480}
    for target in (paper, paper.model_copy(update=experts)):
        assert certificate_bytes(paper, target, sequences=64, sequence_length=128) < 8 * 2**30
