"""The network, dense and Mixture of Experts: RMSNorm, RoPE, grouped-query attention, SwiGLU, top-k router.

Modules carry Hugging Face's names, so that a dense state dict *is* a Hugging Face state dict; only the experts differ,
which live stacked here (one tensor for all experts) and one by one in files (see `checkpoint.tensor_names`).

Shape legend, written at the end of tensor names: b batch, t positions, n = b*t tokens, d hidden, f intermediate,
h query heads, g key-value heads, c head_dim, e experts, k experts per token, v vocabulary, s = n*k routed rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.kernels.attention import causal_attention
from aquilamoe.model.kernels.choice import Kernels
from aquilamoe.model.kernels.cross_entropy import head_cross_entropy
from aquilamoe.model.kernels.experts import count_rows, expert_feed_forwards, gather_rows, sort_rows, weigh_rows
from aquilamoe.model.kernels.norm import rms_norm


@dataclass(frozen=True)
class Routing:
    """What a router decided for one layer: what the balance and z-losses and the load metrics need."""

    logits_ne: Tensor  # float32
    experts_nk: Tensor  # int64
    counts_e: Tensor  # int64, rows that each expert was given


class RMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32 (or wider)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_btd: Tensor) -> Tensor:
        return rms_norm(x_btd, self.weight, self.eps)


def rotary_table(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute how far the pairs of a head are turned at every position.

    Args:
        config: of the model; its rope_scaling may be of any type.
        length: tokens of the sequences.
        device: of the tables.
        dtype: that they are rounded to; they are computed in float64.

    Returns:
        cos and sin of shape (length, rotary_dim), multiplied by the attention factor of the scaling.
    """
    scale = 1.0
    if config.rope_scaling is None:
        pairs = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float64)
        frequencies = config.rope_theta ** (-pairs / config.rotary_dim)
    else:
        sizes = config.rope_theta, config.rotary_dim, config.max_position_embeddings
        scaled, scale = config.rope_scaling.frequencies(*sizes, length)
        frequencies = torch.tensor(scaled, device=device, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float64), frequencies).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    return (cos.mul_(scale).to(dtype), sin.mul_(scale).to(dtype)) if scale != 1 else (cos.to(dtype), sin.to(dtype))


def rotate(x_bhtc: Tensor, cos_tc: Tensor, sin_tc: Tensor) -> Tensor:
    """Apply rotary position embedding, Hugging Face's half-split pairing."""
    first, second = x_bhtc.chunk(2, dim=-1)
    return x_bhtc * cos_tc + torch.cat((-second, first), dim=-1) * sin_tc


class Attention(nn.Module):
    """Causal grouped-query attention, over the window that the layer has, if it has one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.window(layer)
        self.kernels = Kernels()
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.norm_per_head = config.qk_norm == "head"
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            self.q_norm = RMSNorm(config.head_dim if self.norm_per_head else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if self.norm_per_head else kv_size, config.rms_norm_eps)

    def forward(self, x_btd: Tensor, cos_tc: Tensor, sin_tc: Tensor) -> Tensor:
        batch, length, _ = x_btd.shape
        q, k = self._heads(self.q_proj(x_btd), self.q_norm), self._heads(self.k_proj(x_btd), self.k_norm)
        v = self._heads(self.v_proj(x_btd), None)
        q, k = rotate(q, cos_tc, sin_tc), rotate(k, cos_tc, sin_tc)
        mixed_bhtc = causal_attention(q, k, v, self.kernels.attention_on(x_btd.device.type, length), self.window)
        return self.o_proj(mixed_bhtc.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, projected_btq: Tensor, norm: nn.Module | None) -> Tensor:
        """(b, heads, t, c), normalised over each head or over all of them."""
        if norm is not None and not self.norm_per_head:
            projected_btq = norm(projected_btq)
        heads_bthc = projected_btq.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_per_head:
            heads_bthc = norm(heads_bthc)
        return heads_bthc.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd))


class Experts(nn.Module):
    """All experts of a layer, stacked; each gets the rows of the tokens that chose it, and none is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernels = Kernels()
        shape = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, rows_sd: Tensor, counts_e: Tensor) -> Tensor:
        """Rows sorted by expert, and how many each has, to the experts' outputs in the same order."""
        kernel = self.kernels.experts_on(rows_sd.device.type)
        return expert_feed_forwards(rows_sd, counts_e, self.gate_proj, self.up_proj, self.down_proj, kernel=kernel)


class MixtureOfExperts(nn.Module):
    """Router in float32, the experts it chooses, and perhaps a shared one that every token goes through.

    Shares of the chosen are in Mixtral's order (top-k of the logits, then softmax over these), or probabilities among
    all experts (`norm_topk_prob: false`). The shared expert's share is a sigmoid of its own score, as in Qwen2-MoE.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.selection_bias_e: Tensor | None = None  # of the training in progress, see training.router_bias
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert: FeedForward | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_btd: Tensor) -> tuple[Tensor, Routing]:
        x_nd = x_btd.flatten(0, 1)
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        with torch.autocast(x_nd.device.type, enabled=False):
            logits_ne = F.linear(x_nd.to(wide), self.gate.weight.to(wide))
        top_nk, experts_nk = self._choose(logits_ne)
        among = top_nk if self.norm_topk_prob else logits_ne
        gates_nk = (top_nk - among.logsumexp(dim=-1, keepdim=True)).exp()
        counts_e = count_rows(experts_nk, self.gate.out_features)
        out_nd = self._mix(x_nd, experts_nk, gates_nk, counts_e)
        if self.shared_expert is not None:
            out_nd = out_nd + self.shared_expert_gate(x_nd).sigmoid() * self.shared_expert(x_nd)
        return out_nd.view_as(x_btd), Routing(logits_ne, experts_nk, counts_e)

    def _mix(self, x_nd: Tensor, experts_nk: Tensor, gates_nk: Tensor, counts_e: Tensor) -> Tensor:
        """The outputs of each token's experts, weighed by its gates: one sort, one gather in, one weighted sum out."""
        device = x_nd.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_nd.dtype
        token_s, slots_nk = sort_rows(experts_nk)
        rows_sd = gather_rows(x_nd.to(precision), token_s, slots_nk)
        rows_sd = self.experts(rows_sd, counts_e)
        return weigh_rows(rows_sd, gates_nk, token_s, slots_nk).to(x_nd.dtype)

    def _choose(self, logits_ne: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' logits and the experts; a selection bias changes which are chosen and nothing else."""
        if self.selection_bias_e is None:
            return logits_ne.topk(self.num_experts_per_tok, dim=-1)
        scores_ne = logits_ne.detach().softmax(dim=-1) + self.selection_bias_e
        experts_nk = scores_ne.topk(self.num_experts_per_tok, dim=-1).indices
        return logits_ne.gather(1, experts_nk), experts_nk


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream; `layer` counts from 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = (
            MixtureOfExperts(config)
            if config.is_sparse(layer)
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x_btd: Tensor, cos_tc: Tensor, sin_tc: Tensor) -> tuple[Tensor, Routing | None]:
        x_btd = x_btd + self.self_attn(self.input_layernorm(x_btd), cos_tc, sin_tc)
        out = self.mlp(self.post_attention_layernorm(x_btd))
        mixed_btd, routing = out if isinstance(out, tuple) else (out, None)
        return x_btd + mixed_btd, routing


class Backbone(nn.Module):
    """Embedding, blocks and the final norm: everything below the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # With room of its own it draws no unneeded numbers, nor imports torch's compiler to draw them nowhere.
        room_vd = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=room_vd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_bt: Tensor) -> tuple[Tensor, list[Routing]]:
        x_btd = self.embed_tokens(tokens_bt)
        table = rotary_table(self.config, tokens_bt.shape[1], x_btd.device, x_btd.dtype)
        routings = []
        for layer in self.layers:
            x_btd, routing = layer(x_btd, *table)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_btd), routings


class Decoder(nn.Module):
    """The language model: tokens to logits, or to their loss, and the routing of every MoE layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """Logits (b, t, v); with targets, instead, their mean loss in nats per token, computed without whole logits."""
        hidden_btd, routings = self.model(tokens_bt)
        if targets_bt is None:
            return self.lm_head(hidden_btd), routings
        return head_cross_entropy(hidden_btd.flatten(0, 1), self.lm_head.weight, targets_bt.flatten()), routings

    def route(self, tokens_bt: Tensor) -> list[Routing]:
        """The routing of every MoE layer alone."""
        return self.model(tokens_bt)[1]

    def use(self, kernels: Kernels) -> None:
        """Compute with these kernels from now on. None changes the function, but for rounding."""
        for module in self.modules():
            if isinstance(module, Attention | Experts):
                module.kernels = kernels

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices normal with `initializer_range`, biases zero, gains one; the same for a seed on every machine."""
        for name, values in self.initial_values(seed):
            self.get_parameter(name).copy_(values)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """The values of `initialize` by name, a whole tensor at a time, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            if name.endswith("norm.weight"):
                yield name, values.fill_(1.0)
            elif name.endswith(".bias"):
                yield name, values.zero_()
            else:
                yield name, values.normal_(0.0, self.config.initializer_range, generator=generator)
