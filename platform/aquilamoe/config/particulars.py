"""What some families have beside the network of Llama: growth keeps it, training does not compute it."""

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from aquilamoe.config.numbers import Config, Float, Layer

# What GraniteMoe has; no other particulars are beside experts.
WITH_EXPERTS = frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"})
Multiplier = Annotated[Float, Field(gt=0.0, le=1e6)]


class Particulars(Config):
    """Parts of a network that only growth supports; what is not set, a network does not have."""

    nope_layers: tuple[Layer, ...] = Field(
        default=(), description="Layers without rotary embedding (SmolLM3), counted from 0 [list of layers]"
    )
    embedding_multiplier: Multiplier = Field(
        default=1.0, description="What the embedding is multiplied by (Granite) [dimensionless]"
    )
    residual_multiplier: Multiplier = Field(
        default=1.0, description="What each part of a layer adds is multiplied by this (Granite) [dimensionless]"
    )
    attention_multiplier: Multiplier | None = Field(
        default=None,
        description="What products of queries and keys are multiplied by (Granite); null: 1 / sqrt(head_dim) "
        "[dimensionless]",
    )
    logits_scaling: Multiplier = Field(
        default=1.0, description="What the logits are divided by (Granite) [dimensionless]"
    )
    partial_rotary_factor: Multiplier = Field(
        default=1.0, le=1.0, description="Part of a head's channels that rotates, the first ones (Phi-4-mini) [ratio]"
    )
    joined_projections: bool = Field(
        default=False, description="Whether files have q, k and v as one tensor, and gate and up (Phi-3)"
    )
    layer_norm: bool = Field(
        default=False, description="Whether norms subtract the mean and add a bias, as LayerNorm does (StableLM)"
    )

    @property
    def present(self) -> frozenset[str]:
        """Names of what a network has."""
        fields = type(self).model_fields
        return frozenset(name for name in fields if getattr(self, name) != fields[name].default)

    def check(self, model: Any) -> None:
        """Raise ValueError where no architecture of transformers has these beside what else a `ModelConfig` has."""
        layers = self.nope_layers
        if list(layers) != sorted(set(layers)) or (layers and layers[-1] >= model.num_hidden_layers):
            raise ValueError(
                f"particulars.nope_layers {list(layers)} is not a rising list of layers from 0 to "
                f"{model.num_hidden_layers - 1}; name each layer once"
            )
        if model.is_moe:
            self._check_experts(model)
        if model.rotary_dim % 2 or not model.rotary_dim:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {model.head_dim} are "
                f"{model.rotary_dim} channels, rotary embeddings need pairs; take it from the model's config.json"
            )
        channels, hidden = model.num_attention_heads * model.head_dim, model.hidden_size
        shown = f"hidden_size {hidden} with {model.num_attention_heads} heads of {model.head_dim} channels"
        if self.layer_norm and channels != hidden:
            raise ValueError(f"{shown}; the heads of a StableLM fill it, choose hidden_size {channels}")
        if self.joined_projections and model.rope_scaling is not None and channels != hidden:
            raise ValueError(
                f"{shown}; transformers scales the rotary embedding of a Phi-3 by hidden_size / num_attention_heads, "
                f"choose hidden_size {channels}"
            )

    def _check_experts(self, model: Any) -> None:
        lost = min(self.present - WITH_EXPERTS, default=None)
        if lost is not None:
            value = getattr(self, lost)
            shown = str(list(value) if isinstance(value, tuple) else value).lower()
            raise ValueError(
                f"num_experts {model.num_experts} with {lost} {shown}, which no architecture of transformers has "
                "beside experts and would be lost; grow it without experts"
            )
        if model.mlp_only_layers:
            raise ValueError(
                f"mlp_only_layers {list(model.mlp_only_layers)} with {min(self.present)}, beside which every layer has "
                "experts in transformers; use []"
            )

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Only what is set: what a network does not have is in no recipe."""
        if not isinstance(self, Particulars):  # pydantic calls this for whatever is in its place, unchecked
            return dump(self)
        return {key: value for key, value in dump(self).items() if key in self.present}
