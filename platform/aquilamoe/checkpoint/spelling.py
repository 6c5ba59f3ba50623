"""Types and magnitudes of what is read of a config.json: it is of anybody's making, and refused before it is used."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from aquilamoe.config.messages import first_problem
from aquilamoe.config.numbers import (
    Epsilon,
    Experts,
    HeadDim,
    Heads,
    InitialStd,
    Layer,
    Layers,
    Length,
    Neurons,
    PositiveNeurons,
    RopeTheta,
    Vocabulary,
    Width,
)
from aquilamoe.config.particulars import Multiplier


def _tokens(value: Any) -> Any:
    """A token, several, or none."""
    several = value if isinstance(value, list) else [value]
    if value is not None and not all(type(token) is int and abs(token) < 2**31 for token in several):
        raise ValueError(f"{str(value)[:60]} is no token and no list of tokens; use the checkpoint's own config.json")
    return value


Tokens = Annotated[Any, BeforeValidator(_tokens)]
# Of a list with a million mistakes, one is enough.
Names = Annotated[list[str], Field(fail_fast=True)]
# Zero stands for no window in files by transformers 5.
Window = Annotated[int, Field(ge=0, le=2**40)]


class Spelled(BaseModel):
    """The fields of a config.json that are read, by their types; null is as good as absent."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    architectures: Names | None = None
    model_type: str | None = None
    vocab_size: Vocabulary | None = None
    hidden_size: Width | None = None
    intermediate_size: PositiveNeurons | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: HeadDim | None = None
    max_position_embeddings: Length | None = None
    rms_norm_eps: Epsilon | None = None
    initializer_range: InitialStd | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    qkv_bias: bool | None = None
    use_qkv_bias: bool | None = None
    use_parallel_residual: bool | None = None
    qk_layernorm: bool | None = None
    layer_norm_eps: Epsilon | None = None
    clip_qkv: float | None = None
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    num_experts_per_tok: Experts | None = None
    moe_intermediate_size: Neurons | None = None
    shared_expert_intermediate_size: Neurons | None = None
    norm_topk_prob: bool | None = None
    mlp_only_layers: Annotated[list[Layer], Field(fail_fast=True)] | None = None
    decoder_sparse_step: Annotated[int, Field(le=2**31)] | None = None
    embedding_multiplier: Multiplier | None = None
    residual_multiplier: Multiplier | None = None
    attention_multiplier: Multiplier | None = None
    logits_scaling: Multiplier | None = None
    rope_theta: RopeTheta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Length | None = None
    sliding_window: Window | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Window | None = None
    layer_types: Names | None = None
    no_rope_layers: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(fail_fast=True)] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=2**31)] | None = None
    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    pad_token_id: Tokens = None


def check(values: Mapping[str, Any], where: str) -> None:
    """UserError, with one line that begins with `where`, for a value of another type or beyond all measure."""
    try:
        Spelled.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, Spelled, values, where) from None
