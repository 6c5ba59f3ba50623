"""Small checkpoints on disk that grow, and what they compute."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.model.transformer import Decoder

VOCABULARY = 32


def model(**changes: Any) -> ModelConfig:
    """A network with everything that growing has to treat: grouped queries, biases, a head of its own."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        "num_experts": 0,
        "num_experts_per_tok": 0,
    }
    return ModelConfig.model_validate(sizes | changes)


def growth(**changes: Any) -> GrowthConfig:
    plain = {"method": "fpi", "scope": "all", "norm": "exact", "maps": "circular", "noise": 0.0}
    return GrowthConfig.model_validate(plain | {"depth": "interpolate", "new_layers": "copy"} | changes)


def upcycling(**changes: Any) -> UpcyclingConfig:
    plain = {"method": "copy", "noise": 0.0, "drop_ratio": 0.0, "router_init": "normal", "router_std": 0.02}
    return UpcyclingConfig.model_validate(plain | changes)


def padded(source: ModelConfig, how: GrowthConfig, **sizes: Any) -> ModelConfig:
    """The source with other sizes, and the epsilon that goes with them."""
    target = source.model_copy(update=sizes)
    return target.model_copy(update={"rms_norm_eps": how.grown_eps(source, target.hidden_size)})


@torch.no_grad()
def write_source(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float64) -> Path:
    """A checkpoint as training leaves it: no gain is one, no bias zero, and every part of the network matters."""
    decoder = Decoder(config).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_matrix = parameter.dim() >= 2 and "embed" not in name
        parameter.copy_(
            noise / parameter.shape[-1] ** 0.5 if is_matrix else noise * 0.5 + (1.0 if "norm" in name else 0.0)
        )
    save_model(decoder, directory, dtype, eos_token_id=3)
    return directory


def grow(directory: Path, target: ModelConfig, how: GrowthConfig, seed: int = 0, name: str = "target") -> Path:
    """Grow `source` in the directory, and return where to."""
    scale_up(directory / "source", directory / name, target, how, seed)
    return directory / name


def upcycle(
    directory: Path, target: ModelConfig, how: UpcyclingConfig | None = None, seed: int = 0, name: str = "target"
) -> Path:
    """Give `source` in the directory experts, copies by default, and return where."""
    scale_out(directory / "source", directory / name, target, how or upcycling(), seed)
    return directory / name


def tokens() -> Tensor:
    """Two sequences of twelve tokens."""
    return torch.arange(24).view(2, 12) * 5 % VOCABULARY


@torch.no_grad()
def logits(directory: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    """What our model computes from the checkpoint."""
    return load_model(directory, dtype)(tokens())[0]


@torch.no_grad()
def transformers_logits(directory: Path, **how: Any) -> Tensor:
    """What transformers computes from it. how: of its `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **how).eval()(tokens()).logits


def difference(source: Path, target: Path) -> float:
    """The largest, of the logits of the source's tokens."""
    before, after = logits(source), logits(target)
    return (before - after[..., : before.shape[-1]]).abs().max().item()


def tensor(directory: Path, name: str) -> Tensor:
    """A tensor of a checkpoint."""
    with Reader(directory) as reader:
        return reader.get(name).clone()
