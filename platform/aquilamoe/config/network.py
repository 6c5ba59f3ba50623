"""The shape of a network, and its arithmetic: parameters and FLOPs, without torch."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.numbers import (
    MAX_TENSORS,
    Epsilon,
    Experts,
    Extended,
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
from aquilamoe.config.particulars import Particulars
from aquilamoe.config.rope import STRETCHED, TRAINED, RopeScaling

LayerType = Literal["full_attention", "sliding_attention"]
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"
# What transformers computes and training does not: the remedy of messages.
ONLY_GROWN = (
    "which is grown and upcycled (efficientscale grow), but not computed by training, evaluation and generation"
)

# Qwen2-MoE, the architecture that transformers and vLLM both open for experts beside a QKV bias, always has a shared
# expert. One that is all zeros adds nothing to the output, gets no gradient, and is no part of our model. Size 0 does
# not do in a file: transformers then needs empty tensors (and torch warns about them), for which vLLM has no place and
# stops. Size 1 would do, but not for tensor-parallel serving; 8 is the smallest that 2, 4 and 8 devices can share.
ABSENT_SHARED_EXPERT_SIZE = 8


class ModelConfig(Extended):
    """A Llama-style decoder, dense (`num_experts: 0`) or Mixture of Experts, in Hugging Face's spelling."""

    vocab_size: Vocabulary = Field(description="Size of the vocabulary; at least the tokenizer's [tokens]")
    hidden_size: Width = Field(description="Width of the residual stream [channels]")
    intermediate_size: PositiveNeurons = Field(description="Width of a dense feed-forward layer [neurons]")
    num_hidden_layers: Layers = Field(description="Depth of the network [layers]")
    num_attention_heads: Heads = Field(description="Query heads of a layer [heads]")
    num_key_value_heads: Heads = Field(
        description="Key-value heads of a layer (grouped-query attention); divides num_attention_heads [heads]"
    )
    head_dim: HeadDim = Field(description="Width of a head, even; null: hidden_size / num_attention_heads [channels]")
    max_position_embeddings: Length = Field(description="Longest context [tokens]")
    rope_theta: RopeTheta = Field(description="Base of the rotary frequencies [dimensionless]")
    rms_norm_eps: Epsilon = Field(description="Added to the mean square in every RMSNorm [dimensionless]")
    initializer_range: InitialStd = Field(description="Standard deviation of the initial matrices [dimensionless]")
    qkv_bias: bool = Field(description="Whether q, k and v (never o) have a bias, as in Qwen2 and AquilaMoE")
    tie_word_embeddings: bool = Field(description="Whether the output head is the embedding")
    num_experts: Experts = Field(description="Experts of a layer; 0: a dense network [experts]")
    num_experts_per_tok: Experts = Field(description="Experts that a token is routed to; 0: a dense network [experts]")
    moe_intermediate_size: Neurons = Field(description="Width of an expert; null: intermediate_size [neurons]")
    # What most networks do not have is left out by default.
    qk_norm: Literal["none", "head", "projection"] = Field(
        default="none",
        description="RMSNorm on queries and keys. none | head: of each head (Qwen3) | projection: of all heads (OLMoE)",
    )
    shared_expert_intermediate_size: Neurons = Field(
        default=0, description="Width of an expert that every token is routed to (Qwen2-MoE); 0: none [neurons]"
    )
    norm_topk_prob: bool = Field(
        default=True,
        description="Whether the routing weights of a token's top-k experts sum to 1 (Mixtral); false: they are "
        "probabilities among all experts",
    )
    mlp_only_layers: tuple[Layer, ...] = Field(
        default=(), description="Layers of a Mixture of Experts that stay dense, counted from 0 [list of layers]"
    )
    rope_scaling: RopeScaling | None = Field(
        default=None,
        description="Stretched rotary embedding, e.g. {rope_type: yarn, factor: 4.0}; training computes linear, yarn "
        "and llama3, with the fields of transformers; null: none",
    )
    sliding_window: Length | None = Field(
        default=None, description="Positions that a position attends to, itself included; null: all before it [tokens]"
    )
    layer_types: tuple[LayerType, ...] = Field(
        default=(),
        description="full_attention or sliding_attention for each layer; []: sliding_window in all [list of layers]",
    )
    particulars: Particulars | None = Field(
        default=None,
        description="What a family has beside the network of Llama, as a growth reads it from a checkpoint; training "
        "computes none of it; null: nothing",
    )
    added = ("rope_scaling", "sliding_window", "layer_types", "particulars")

    @model_validator(mode="before")
    @classmethod
    def _derive_positions(cls, values: Any) -> Any:
        """One form of each network: the context before it was stretched, and layer types only where layers differ."""
        if not isinstance(values, dict):
            return values
        scaling, types = values.get("rope_scaling"), values.get("layer_types")
        if isinstance(scaling, Mapping) and scaling.get("rope_type") in STRETCHED:
            most = values.get("max_position_embeddings")
            trained = scaling.get("original_max_position_embeddings") or most
            scaling = {**scaling, "original_max_position_embeddings": trained}
            if scaling["rope_type"] == "yarn" and isinstance(most, int) and isinstance(trained, int) and trained > 0:
                scaling = {**scaling, "factor": scaling.get("factor") or most / trained}
            values = {**values, "rope_scaling": scaling}
        if types is None or (types and all(each == SLIDING for each in types)):
            values = {**values, "layer_types": ()}
        elif types and all(each == FULL for each in types):
            values = {**values, "layer_types": (), "sliding_window": None}
        return values

    @model_validator(mode="before")
    @classmethod
    def _derive_expert_size(cls, values: Any) -> Any:
        """`moe_intermediate_size: null` means that experts are as large as a dense feed-forward.

        Where no layer is dense, intermediate_size has no effect, and is the experts' size too, as files have it.
        """
        if not isinstance(values, dict):
            return values
        dense, experts = values.get("intermediate_size"), values.get("moe_intermediate_size")
        if not values.get("num_experts"):
            return {**values, "moe_intermediate_size": 0 if experts is None else experts}
        experts = dense if experts is None else experts
        return {
            **values,
            "moe_intermediate_size": experts,
            "intermediate_size": dense if values.get("mlp_only_layers") else experts or dense,
        }

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, values: Any) -> Any:
        """`head_dim: null` means hidden_size / num_attention_heads."""
        if isinstance(values, dict) and values.get("head_dim", 0) is None:
            hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set head_dim, "
                        f"or choose {heads} heads for a hidden size of {hidden // heads * heads or heads}"
                    )
                values = {**values, "head_dim": hidden // heads}
        return values

    @field_validator("particulars")
    @classmethod
    def _leave_out_nothing(cls, particulars: Particulars | None) -> Particulars | None:
        """One form of each network: without particulars where all are as in Llama."""
        return particulars if particulars is not None and particulars.present else None

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
                f"choose num_key_value_heads from {fits}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, rotary embeddings need pairs; choose an even head_dim")
        if self.num_experts:
            self._check_experts()
        else:
            self._check_dense()
        self._check_norms()
        if self.particulars is not None:
            self.particulars.check(self)
        self._check_positions()
        tensors = self.num_hidden_layers * 9 + self.num_sparse_layers * 3 * self.num_experts
        if tensors > MAX_TENSORS:
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} with num_experts {self.num_experts} are {tensors} "
                f"tensors or more, a checkpoint can have {MAX_TENSORS}; choose fewer layers or experts"
            )
        return self

    def _check_norms(self) -> None:
        """Refuse a network that no architecture of transformers computes."""
        if self.qk_norm == "none":
            return
        for field in ("qkv_bias", "shared_expert_intermediate_size"):
            if value := getattr(self, field):
                raise ValueError(
                    f"qk_norm {self.qk_norm} with {field} {str(value).lower()} is no known architecture; choose one"
                )
        if self.qk_norm == "projection" and (not self.num_experts or self.mlp_only_layers):
            raise ValueError("qk_norm projection is OLMoE's, where every layer has experts; use head or none")
        if self.qk_norm == "projection" and self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"qk_norm projection is OLMoE's, where {self.num_attention_heads} heads of {self.head_dim} channels "
                f"make the hidden_size {self.hidden_size}; use head or none"
            )

    def _check_positions(self) -> None:
        """Refuse a rotary embedding without frequencies, and windows that no architecture of transformers computes."""
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope_theta, self.rotary_dim)
        types = self.layer_types
        if types and self.sliding_window is None:
            raise ValueError(f"layer_types has '{SLIDING}' without sliding_window; set that, in tokens")
        if types and len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(types)} entries, num_hidden_layers is {self.num_hidden_layers}; name a type for "
                "each layer"
            )
        if self.sliding_window is None:
            return
        if self.qk_norm == "projection":
            raise ValueError(f"qk_norm projection with sliding_window {self.sliding_window} is no known architecture")
        if types and (self.qk_norm == "head" if self.is_moe else self.qk_norm == "none" and not self.qkv_bias):
            of = f"num_experts {self.num_experts} and qk_norm head" if self.is_moe else "neither qkv_bias nor qk_norm"
            raise ValueError(
                f"layer_types has {types.count(SLIDING)} of {len(types)} layers with sliding_window "
                f"{self.sliding_window}, with {of} that is no known architecture; use one window for all layers"
            )

    def _check_experts(self) -> None:
        if self.num_experts == 1:
            raise ValueError("num_experts 1 is a dense model with a router; use 0 for dense, or at least 2")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts {self.num_experts}; "
                "set it to how many experts a token goes through"
            )
        if not self.moe_intermediate_size:
            raise ValueError("moe_intermediate_size 0 leaves experts without neurons; use null for intermediate_size")
        if self.shared_expert_intermediate_size == ABSENT_SHARED_EXPERT_SIZE:
            raise ValueError(
                f"shared_expert_intermediate_size {ABSENT_SHARED_EXPERT_SIZE} marks a file without a shared expert; "
                "use another size, or 0 for none"
            )
        dense = self.mlp_only_layers
        if list(dense) != sorted(set(dense)) or (dense and dense[-1] >= self.num_hidden_layers):
            raise ValueError(
                f"mlp_only_layers {list(dense)} is not a rising list of layers from 0 to {self.num_hidden_layers - 1}; "
                "name each dense layer once"
            )
        if len(dense) == self.num_hidden_layers:
            raise ValueError(
                f"mlp_only_layers names all {len(dense)} layers and leaves none for the {self.num_experts} experts; "
                "name fewer layers, or set num_experts to 0"
            )

    def _check_dense(self) -> None:
        if self.num_experts_per_tok:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} without experts; set num_experts, or both to 0"
            )
        for field in ("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers"):
            if value := getattr(self, field):
                raise ValueError(
                    f"{field} {list(value) if isinstance(value, tuple) else value} without experts; set num_experts, "
                    f"or {field} to {[] if isinstance(value, tuple) else 0}"
                )

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def with_experts(self) -> Particulars | None:
        """The particulars of what this becomes with experts: files with experts do not join projections."""
        return self.particulars and self.particulars.model_copy(update={"joined_projections": False})

    @property
    def has_layer_norm(self) -> bool:
        """Whether norms subtract the mean and add a bias."""
        return self.particulars is not None and self.particulars.layer_norm

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate, the first ones."""
        return int(self.head_dim * self.particulars.partial_rotary_factor) if self.particulars else self.head_dim

    @property
    def _attention_matrices(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return self.is_moe and layer not in self.mlp_only_layers

    @property
    def num_sparse_layers(self) -> int:
        return self.num_hidden_layers - len(self.mlp_only_layers) if self.is_moe else 0

    def window(self, layer: int) -> int | None:
        """Tokens that a position sees in a layer, its own included; None is all before it."""
        return self.sliding_window if not self.layer_types or self.layer_types[layer] == SLIDING else None

    @property
    def uncomputed(self) -> str | None:
        """What growth supports and training, evaluation and generation do not; None where they compute the model."""
        if self.particulars is not None:
            return f"{', '.join(sorted(self.particulars.present))} in its config.json, {ONLY_GROWN}"
        if self.rope_scaling is None or self.rope_scaling.rope_type in TRAINED:
            return None
        return f"rope_scaling of rope_type '{self.rope_scaling.rope_type}', {ONLY_GROWN}"

    def _ffn_matrices(self, experts: int) -> int:
        """Parameters of all feed-forwards, routers left out, when a sparse layer has so many experts."""
        shared = self.shared_expert_intermediate_size
        sparse = experts * self.moe_intermediate_size + shared
        dense_layers = self.num_hidden_layers - self.num_sparse_layers
        neurons = dense_layers * self.intermediate_size + self.num_sparse_layers * sparse
        return 3 * self.hidden_size * neurons

    @property
    def _router_matrices(self) -> int:
        rows = self.num_experts + (1 if self.shared_expert_intermediate_size else 0)
        return self.num_sparse_layers * rows * self.hidden_size

    def _params(self, experts: int) -> int:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        biases = self.head_dim * (heads + 2 * kv_heads) if self.qkv_bias else 0
        gains = {"none": 0, "head": 2 * self.head_dim, "projection": self.head_dim * (heads + kv_heads)}[self.qk_norm]
        norm = self.hidden_size * (2 if self.has_layer_norm else 1)
        layer = self._attention_matrices + biases + gains + 2 * norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        feed_forwards = self._ffn_matrices(experts) + self._router_matrices
        return self.num_hidden_layers * layer + feed_forwards + embeddings + norm

    @property
    def num_params(self) -> int:
        """All parameters."""
        return self._params(self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: of the experts, only its top-k."""
        return self._params(self.num_experts_per_tok)

    def flops_per_token(self, sequence_length: int) -> int:
        """Model FLOPs of one training token (forward and backward) at `sequence_length`.

        6 per matrix parameter that the token meets (the embedding look-up multiplies nothing, the head does) plus the
        causal attention products: 6 * heads * head_dim * sequence_length in each layer. A layer with a window has the
        share of them that it sees: of w < sequence_length positions, w * (2 - w / sequence_length) in the place of
        sequence_length.
        """
        matrices = self._ffn_matrices(self.num_experts_per_tok) + self._router_matrices
        seen = sum(_seen(self.window(layer), sequence_length) for layer in range(self.num_hidden_layers))
        attention = self.num_hidden_layers * self._attention_matrices + self.num_attention_heads * self.head_dim * seen
        head = self.vocab_size * self.hidden_size
        return 6 * (matrices + attention + head)


def _seen(window: int | None, length: int) -> int:
    """Twice the mean number of keys of a query in a sequence: `length` without a window, or with a wider one."""
    return length if window is None or window >= length else window * (2 * length - window) // length
