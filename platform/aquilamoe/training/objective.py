"""What is minimised: next-token cross-entropy, plus the router's balance loss and z-loss (METHODS section 5)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.config.schema import RouterConfig
from aquilamoe.model import Routing
from aquilamoe.training.parallel import Group


def cross_entropy(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per token, at least in float32."""
    wide = torch.promote_types(logits_btv.dtype, torch.float32)
    return F.cross_entropy(logits_btv.flatten(0, 1).to(wide), targets_bt.flatten())


def expert_counts(routing: Routing) -> Tensor:
    """How many tokens each expert was given: int64 of shape (experts,)."""
    return torch.bincount(routing.experts_nk.flatten(), minlength=routing.logits_ne.shape[1])


def balance_loss(routing: Routing, counts_e: Tensor) -> Tensor:
    """experts * sum_i f_i * P_i: 1 at perfect balance, `experts / k` when all tokens go to the same k.

    f_i, the share of assignments in `counts_e`, may cover more than this batch (other ranks, earlier micro-batches:
    arXiv 2501.11873); P_i, the mean probability of this batch, carries the gradient.
    """
    share_e = counts_e.to(routing.logits_ne.dtype) / counts_e.sum()
    probability_e = routing.logits_ne.softmax(dim=-1).mean(dim=0)
    return counts_e.numel() * (share_e * probability_e).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-partition of the router's logits: keeps them small (ST-MoE, arXiv 2202.08906)."""
    return routing.logits_ne.logsumexp(dim=-1).square().mean()


class RouterObjective:
    """The router's losses of one optimizer step, and the expert load they are computed from.

    With the scope `global_batch`, the shares f_i cover all ranks, and the micro-batches of the step so far: any number
    of ranks gives the loss and the gradient of the whole batch. Micro-batches do not: an early one is weighed by the
    shares of a part of the batch, because the rest has not been routed yet. Cross-entropy and z-loss are means over
    tokens, and the same for every division of the batch.
    """

    def __init__(self, config: RouterConfig, group: Group) -> None:
        self.config, self.group = config, group
        self.counts_le: Tensor | None = None  # of the step so far, by layer

    def __call__(self, routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
        """Return (balance loss, z-loss), each the unweighted mean over layers."""
        counts_le = torch.stack([expert_counts(routing) for routing in routings])
        is_global = self.config.balance_scope == "global_batch"
        if is_global:
            self.group.sum_(counts_le)
        self.counts_le = counts_le if self.counts_le is None else self.counts_le + counts_le
        shares_of = self.counts_le if is_global else counts_le
        balance = [balance_loss(routing, counts_e) for routing, counts_e in zip(routings, shares_of, strict=True)]
        return torch.stack(balance).mean(), torch.stack([z_loss(routing) for routing in routings]).mean()

    def load_max_over_mean(self) -> float:
        """The busiest expert's tokens over the mean, averaged over layers: 1 at perfect balance."""
        assert self.counts_le is not None, "nothing was routed yet"
        counts_le = self.counts_le.double()
        return (counts_le.max(dim=1).values / counts_le.mean(dim=1)).mean().item()
