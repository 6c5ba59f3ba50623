"""What the routers of a Mixture of Experts did between two log points: load, entropy, dropped tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aquilamoe.model.transformer import Routing
from aquilamoe.training.parallel import ParallelContext

DIGITS = 6  # of shares and entropies in the table


class RouterLoad:
    """Sums over steps, kept on the device: the host waits for them at log points alone.

    layers, experts: of the network, its dense layers not counted.
    """

    def __init__(self, layers: int, experts: int, group: ParallelContext) -> None:
        self.group, self.experts = group, experts
        # By layer: tokens of each expert; the routers' entropy in nats, tokens, and choices, that is k for a token.
        self.sums_lc = torch.zeros(layers, experts + 3, dtype=torch.float64, device=group.device)
        self.is_empty = True

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count one forward pass of this rank."""
        self.is_empty = False
        for routing, sums_c in zip(routings, self.sums_lc, strict=True):
            entropy = torch.special.entr(routing.logits_ne.softmax(dim=-1)).sum()
            sums_c[: self.experts] += routing.counts_e
            sums_c[self.experts] += entropy
            sums_c[self.experts + 1] += routing.logits_ne.shape[0]
            sums_c[self.experts + 2] += routing.experts_nk.numel()

    def gather(self) -> Tensor:
        """Let the first rank hold the sums of all, which a checkpoint keeps: (layers, experts + 3)."""
        self.group.sum_(self.sums_lc)
        found_lc = self.sums_lc.clone()
        if not self.group.is_first:
            self.sums_lc.zero_()
        return found_lc

    def restore(self, sums_lc: Tensor) -> None:
        """Resume from what `gather` returned before an interruption."""
        self.is_empty = False
        if self.group.is_first:
            self.sums_lc.copy_(sums_lc)

    def read_and_reset(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Means over layers for metrics.jsonl, and the table of layers and experts for router.jsonl."""
        sums_lc = self.group.sum_(self.sums_lc).clone().cpu()
        self.sums_lc.zero_()
        self.is_empty = True
        counts_le, (entropy_l, tokens_l, choices_l) = sums_lc[:, : self.experts], sums_lc[:, self.experts :].unbind(1)
        shares_le = counts_le / counts_le.sum(dim=1, keepdim=True)
        entropy_l = entropy_l / tokens_l
        dropped_l = choices_l - counts_le.sum(dim=1)
        means = {
            "router/load_max_over_mean": (shares_le.max(dim=1).values * self.experts).mean().item(),
            "router/load_min_over_mean": (shares_le.min(dim=1).values * self.experts).mean().item(),
            "router/entropy": entropy_l.mean().item(),
            "router/dropped_tokens": dropped_l.sum().item(),
        }
        table = {
            "load": [[round(share, DIGITS) for share in layer] for layer in shares_le.tolist()],
            "entropy": [round(entropy, DIGITS) for entropy in entropy_l.tolist()],
            "dropped": [int(dropped) for dropped in dropped_l.tolist()],
        }
        return means, table
