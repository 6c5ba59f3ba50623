"""The shape of a network, which knows its own arithmetic: parameters and FLOPs, without torch."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _refuse_bool(value: Any) -> Any:
    """Python counts with true and false; a configuration that does is mistaken."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number; give it one")
    return value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0.0)]
NonNegativeFloat = Annotated[Float, Field(ge=0.0)]
Fraction = Annotated[Float, Field(ge=0.0, le=1.0)]


class Config(BaseModel):
    """Base of all configuration: immutable, and a key that nobody reads is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Config):
    """A Llama-style decoder, dense (`num_experts: 0`) or Mixture of Experts, in Hugging Face's spelling.

    `qkv_bias` adds a bias to q, k and v (never to o), as in Qwen2 and AquilaMoE. Every layer of an MoE is sparse.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat
    rms_norm_eps: PositiveFloat
    initializer_range: PositiveFloat
    qkv_bias: bool
    tie_word_embeddings: bool
    num_experts: NonNegativeInt
    num_experts_per_tok: NonNegativeInt

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
        if self.num_experts == 1:
            raise ValueError("num_experts 1 is a dense model with a router; use 0 for dense, or at least 2")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts {self.num_experts}"
            )
        if not self.num_experts and self.num_experts_per_tok:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} without experts; set num_experts, or both to 0"
            )
        return self

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def _attention_matrices(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    @property
    def _ffn_matrices(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def _params(self, experts: int) -> int:
        biases = self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads) if self.qkv_bias else 0
        router, norms = self.hidden_size * self.num_experts, 2 * self.hidden_size
        layer = self._attention_matrices + biases + experts * self._ffn_matrices + router + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters."""
        return self._params(self.num_experts or 1)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: of the experts, only its top-k."""
        return self._params(self.num_experts_per_tok or 1)

    def flops_per_token(self, sequence_length: int) -> int:
        """Model FLOPs of one training token (forward and backward) at `sequence_length`.

        6 per matrix parameter that the token meets (the embedding look-up multiplies nothing, the head does) plus the
        causal attention products: 6 * layers * heads * head_dim * sequence_length.
        """
        matrices = self._attention_matrices + self._ffn_matrices * (self.num_experts_per_tok or 1)
        router = self.hidden_size * self.num_experts
        attention = self.num_attention_heads * self.head_dim * sequence_length
        head = self.vocab_size * self.hidden_size
        return 6 * (self.num_hidden_layers * (matrices + router + attention) + head)
