"""What is to be known of an architecture of transformers, beside the network itself: how its files spell it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aquilamoe.config.network import ModelConfig

Values = Mapping[str, Any]  # of a config.json


def rotated_part(values: Values, default: float) -> Any:
    """partial_rotary_factor of a config.json: beside the scaling of the rotary embedding, or in it."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    found = [each.get("partial_rotary_factor") for each in (rope, values)]
    return next((each for each in found if each is not None), default)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: which networks it computes, and how its config.json and its tensors are spelled.

    Attributes:
        architecture: the class in transformers.
        model_type: of its config.json.
        computes: whether a network is written as this architecture; of every network exactly one family is.
        same_as: an architecture that spells the same tensors and computes what this one computes without its own
            options; a checkpoint that could be that one stays this one.
        experts_key: the key that counts the experts; None for a dense network.
        is_mixed: whether layers may be dense and experts have a size of their own.
        has_shared_expert: whether every layer with experts has a shared one in files.
        norm_topk_prob: whether shares of the chosen experts sum to 1; None where a key states it.
        qk_norm: the norm of queries and keys.
        qkv_bias: whether q, k and v have a bias, by default where `qkv_bias_key` of config.json states it.
        norm_key: the key of the epsilon of norms.
        fixed: further keys of config.json, by what the network computes.
        windows: whether layers can look back a number of tokens: none, all of them alike, or each by itself.
        window_switch: whether use_sliding_window turns windows on.
        slides: whether a layer has a window where config.json has no list of layers: of its values, the number of the
            layer, and max_window_layers.
        rope_types: other names of kinds of scaled rotary embeddings.
        default_window, default_theta, default_head_dim, default_balance, default_kv_heads, default_tied: what the
            config class assumes where a file lacks sliding_window, rope_theta, head_dim (None: from the hidden size),
            router_aux_loss_coef, num_key_value_heads (whether as many as heads), and tie_word_embeddings.
        default_tokens: bos_token_id, eos_token_id and pad_token_id that it assumes.
        particulars: what the family can have of `Particulars`; what others have, it does not compute.
        read_particulars: these of the values of a config.json.
        spell_particulars: the keys of config.json for them, beside those that have the same names.
        spelling: parts of the roles of feed-forwards (see `tensor_names`), and what stands for them in files.
        joined: tensors of a layer that files have as one, and the roles whose rows follow each other in it.
        joined_experts: tensors of all experts, and the roles that each expert has in it.
    """

    architecture: str
    model_type: str
    computes: Callable[[ModelConfig], bool]
    same_as: str | None = None
    experts_key: str | None = None
    is_mixed: bool = False
    has_shared_expert: bool = False
    norm_topk_prob: bool | None = None
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool = False
    qkv_bias_key: str | None = None
    norm_key: str = "rms_norm_eps"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    windows: Literal["none", "all", "each"] = "none"
    window_switch: bool = False
    slides: Callable[[Values, int, int], bool] = lambda _values, layer, first: layer >= first
    rope_types: Mapping[str, str] = field(default_factory=dict)
    default_window: int | None = None
    default_theta: float = 1e4
    default_head_dim: int | None = None
    default_balance: float = 0.001
    default_kv_heads: bool = False
    default_tied: bool = False
    default_tokens: tuple[int | None, int | None, int | None] = (None, None, None)
    particulars: frozenset[str] = frozenset()
    read_particulars: Callable[[Values], dict[str, Any]] = lambda _values: {}
    spell_particulars: Callable[[ModelConfig], dict[str, Any]] = lambda _model: {}
    spelling: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joined_experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_moe(self) -> bool:
        return self.experts_key is not None

    def spell(self, role: str) -> str:
        """A role as it is named in files, after `model.layers.N.`."""
        if role.startswith("mlp."):
            for ours, theirs in self.spelling.items():
                role = role.replace(ours, theirs, 1)
        return role
