"""The shape of a network, and its arithmetic: parameters and FLOPs, without torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _refuse_bool(value: Any) -> Any:
    """Python counts with true and false; a configuration that does is mistaken."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number; give it one")
    return value


# More than any network that will fit on a disk; what is larger is a mistake, and would keep every loop busy for hours.
MAX_LAYERS = 2**12
MAX_EXPERTS = 2**15
MAX_HEADS = 2**14
MAX_WIDTH = 2**18
MAX_NEURONS = 2**21
MAX_VOCABULARY = 2**24
MAX_HEAD_DIM = 2**13
MAX_POSITIONS = 2**40
MAX_TENSORS = 200_000  # of one checkpoint

Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0.0)]
NonNegativeFloat = Annotated[Float, Field(ge=0.0)]
Seed = Annotated[Int, Field(ge=0, lt=10**18)]  # what every generator takes
Divisor = Annotated[Int, Field(gt=0, le=10**15)]
Fraction = Annotated[Float, Field(ge=0.0, le=1.0)]
# Numbers that float32 computes something with: a frequency that rises or is 0, a norm that is all epsilon, and weights
# that overflow in the first product are mistakes.
RopeTheta = Annotated[Float, Field(ge=1.0, le=1e15)]
Epsilon = Annotated[Float, Field(gt=0.0, le=1.0)]
InitialStd = Annotated[Float, Field(gt=0.0, le=1e3)]
Layers = Annotated[Int, Field(gt=0, le=MAX_LAYERS)]
Layer = Annotated[Int, Field(ge=0, lt=MAX_LAYERS)]
Experts = Annotated[Int, Field(ge=0, le=MAX_EXPERTS)]
Heads = Annotated[Int, Field(gt=0, le=MAX_HEADS)]
HeadDim = Annotated[Int, Field(gt=0, le=MAX_HEAD_DIM)]
Width = Annotated[Int, Field(gt=0, le=MAX_WIDTH)]
Neurons = Annotated[Int, Field(ge=0, le=MAX_NEURONS)]
PositiveNeurons = Annotated[Int, Field(gt=0, le=MAX_NEURONS)]
Vocabulary = Annotated[Int, Field(gt=0, le=MAX_VOCABULARY)]
Length = Annotated[Int, Field(gt=0, le=MAX_POSITIONS)]

# Qwen2-MoE, the architecture that transformers and vLLM both open for experts beside a QKV bias, always has a shared
# expert. One that is all zeros adds nothing to the output, gets no gradient, and is no part of our model. Size 0 does
# not do in a file: transformers then needs empty tensors (and torch warns about them), for which vLLM has no place and
# stops. Size 1 would do, but not for tensor-parallel serving; 8 is the smallest that 2, 4 and 8 devices can share.
ABSENT_SHARED_EXPERT_SIZE = 8


class Config(BaseModel):
    """Base of all configuration: immutable, and a key that is not read is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Config):
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

    def _check_experts(self) -> None:
        if self.num_experts == 1:
            raise ValueError("num_experts 1 is a dense model with a router; use 0 for dense, or at least 2")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts {self.num_experts}"
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
    def _attention_matrices(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return self.is_moe and layer not in self.mlp_only_layers

    @property
    def num_sparse_layers(self) -> int:
        return self.num_hidden_layers - len(self.mlp_only_layers) if self.is_moe else 0

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
        layer = self._attention_matrices + biases + gains + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        feed_forwards = self._ffn_matrices(experts) + self._router_matrices
        return self.num_hidden_layers * layer + feed_forwards + embeddings + self.hidden_size

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
        causal attention products: 6 * layers * heads * head_dim * sequence_length.
        """
        matrices = self._ffn_matrices(self.num_experts_per_tok) + self._router_matrices
        attention = self._attention_matrices + self.num_attention_heads * self.head_dim * sequence_length
        head = self.vocab_size * self.hidden_size
        return 6 * (matrices + self.num_hidden_layers * attention + head)
