"""What is to be known of an architecture of transformers, beside the network itself: how its files spell it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aquilamoe.config.network import ModelConfig


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
        qkv_bias: whether q, k and v have a bias; None where a key of that name states it, true by default.
        fixed: further keys of config.json, by what the network computes.
        windows: whether layers can look back a number of tokens: none, all of them alike, or each by itself.
        window_switch: whether use_sliding_window turns windows on.
        alternating_windows: whether every other layer below max_window_layers has a window where layers are not listed,
            and not those from max_window_layers on.
        default_window, default_theta, default_head_dim, default_balance, default_kv_heads: what the config class
            assumes where a file lacks sliding_window, rope_theta, head_dim (None: from the hidden size),
            router_aux_loss_coef, and num_key_value_heads (whether as many as heads).
        default_tokens: bos_token_id, eos_token_id and pad_token_id that it assumes.
        spelling: parts of the roles of feed-forwards (see `tensor_names`), and what stands for them in files.
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
    qkv_bias: bool | None = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    windows: Literal["none", "all", "each"] = "none"
    window_switch: bool = False
    alternating_windows: bool = False
    default_window: int | None = None
    default_theta: float = 1e4
    default_head_dim: int | None = None
    default_balance: float = 0.001
    default_kv_heads: bool = False
    default_tokens: tuple[int | None, int | None, int | None] = (None, None, None)
    spelling: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_moe(self) -> bool:
        return self.experts_key is not None

    def spell(self, role: str) -> str:
        """A role as it is named in files, after `model.layers.N.`."""
        if role.startswith("mlp."):
            for ours, theirs in self.spelling.items():
                role = role.replace(ours, theirs, 1)
        return role
