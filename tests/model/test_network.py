"""The arithmetic of a network against torch's own count of what it computes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aquilamoe.config.schema import ModelConfig
from aquilamoe.model import transformer

Network = Callable[..., ModelConfig]


def plain_attention(q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, kernel: str, window: None = None) -> Tensor:
    """Of all pairs of positions, with those that the mask takes away."""
    group, later_tt = q_bhtc.shape[1] // k_bgtc.shape[1], torch.ones(q_bhtc.shape[2:3] * 2).triu(1).bool()
    k_bhtc, v_bhtc = (each.repeat_interleave(group, dim=1) for each in (k_bgtc, v_bgtc))
    scores_bhtt = (q_bhtc @ k_bhtc.mT / q_bhtc.shape[-1] ** 0.5).masked_fill(later_tt, float("-inf"))
    return scores_bhtt.softmax(dim=-1) @ v_bhtc


def plain_experts(
    rows_sd: Tensor, counts_e: Tensor, gate_efd: Tensor, up_efd: Tensor, down_edf: Tensor, kernel: str
) -> Tensor:
    """Each expert on its rows, by products that torch counts; the kernels' own are opaque to it, or padded."""
    parts = rows_sd.split(counts_e.tolist())
    weights = zip(parts, gate_efd, up_efd, down_edf, strict=True)
    return torch.cat(
        [F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down) for rows, gate, up, down in weights]
    )


def counted_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward, as torch counts them; of its attention, which it counts with all the masked pairs, half."""
    decoder = transformer.Decoder(config)
    decoder.initialize(0)
    tokens_bt = torch.randint(config.vocab_size, (4, sequence_length))
    with FlopCounterMode(display=False) as counter:
        decoder(tokens_bt)[0].sum().backward()
    masked_too = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return (counter.get_total_flops() - masked_too / 2) / tokens_bt.numel()


@pytest.mark.parametrize("sequence_length", [8, 256])
def test_the_flops_of_a_token_are_exactly_what_torch_counts_for_every_architecture(
    network: Network, kind: str, sequence_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "expert_feed_forwards", plain_experts)
    monkeypatch.setattr(transformer, "causal_attention", plain_attention)
    config = network(kind, max_position_embeddings=256)
    counted = counted_flops_per_token(config, sequence_length)
    assert config.flops_per_token(sequence_length) == pytest.approx(counted, rel=1e-12)


def test_of_experts_those_that_a_token_meets_are_counted_and_the_routers_choice_among_all(network: Network) -> None:
    few, many = network("mixtral", num_experts=4), network("mixtral", num_experts=8)
    router = 6 * few.num_hidden_layers * few.hidden_size * 4
    assert many.flops_per_token(16) - few.flops_per_token(16) == router
