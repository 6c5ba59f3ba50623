"""What is minimised beside next-token cross-entropy: the router's balance loss and z-loss (METHODS section 5)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from aquilamoe.config.schema import RouterConfig
from aquilamoe.model.transformer import Routing
from aquilamoe.training.parallel import ParallelContext


def balance_loss(routing: Routing, counts_e: Tensor) -> Tensor:
    """experts * sum_i f_i * P_i: 1 at perfect balance, `experts / k` when all tokens go to the same k.

    f_i, the share of assignments in `counts_e`, may cover more than this batch (other ranks, other micro-batches:
    arXiv 2501.11873); P_i, the mean probability of this batch, carries the gradient.
    """
    share_e = counts_e.to(routing.logits_ne.dtype) / counts_e.sum()
    probability_e = routing.logits_ne.softmax(dim=-1).mean(dim=0)
    return counts_e.numel() * (share_e * probability_e).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-partition of the router's logits: keeps them small (ST-MoE, arXiv 2202.08906)."""
    return routing.logits_ne.logsumexp(dim=-1).square().mean()


class RouterObjective:
    """The router's losses of one optimizer step, and the expert load that they are weighed by.

    The balance loss's shares f_i cover, by scope:
    `global_batch`: all ranks and all micro-batches. A step of several micro-batches counts them first, by a pass
    without gradients (`count`), so that any division of the batch gives its loss and its gradient.
    `running`: all ranks, and the micro-batches so far (arXiv 2501.11873): no such pass, but the early ones are weighed
    by the shares of a part of the batch.
    `micro_batch`: one forward pass of one rank, the classic.
    Cross-entropy and z-loss are means over tokens, and the same for every division.
    """

    def __init__(self, config: RouterConfig, group: ParallelContext) -> None:
        self.config, self.group = config, group
        self.is_classic = config.balance_scope == "micro_batch"
        self.counts_le: Tensor | None = None  # by layer; of the whole batch once `counted`, or else of the step so far
        self.counted = False

    def counts_first(self, micro_batches: int) -> bool:
        """Whether a step of so many micro-batches must `count` before the first of them is weighed."""
        config = self.config
        return micro_batches > 1 and config.balance_scope == "global_batch" and config.balance_loss_coeff > 0

    def count(self, micro_batches: Iterable[Sequence[Routing]]) -> None:
        """Take the load of the whole batch: that of all these micro-batches, on all ranks."""
        self.counts_le = self.group.sum_(torch.stack([_counts(routings) for routings in micro_batches]).sum(dim=0))
        self.counted = True

    def __call__(self, routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
        """Return (balance loss, z-loss), each the unweighted mean over layers."""
        shares_of = self._shares(routings)
        balance = [balance_loss(routing, counts_e) for routing, counts_e in zip(routings, shares_of, strict=True)]
        return torch.stack(balance).mean(), torch.stack([z_loss(routing) for routing in routings]).mean()

    def _shares(self, routings: Sequence[Routing]) -> Tensor:
        if self.counted:
            assert self.counts_le is not None
            return self.counts_le
        counts_le = _counts(routings)
        if not self.is_classic:
            self.group.sum_(counts_le)
        self.counts_le = counts_le if self.counts_le is None else self.counts_le + counts_le
        return counts_le if self.is_classic else self.counts_le

    def load(self) -> Tensor:
        """Tokens given to each expert in this step, on all ranks: int64 of shape (layers, experts)."""
        assert self.counts_le is not None, "nothing was routed yet"
        return self.group.sum_(self.counts_le.clone()) if self.is_classic else self.counts_le


def _counts(routings: Sequence[Routing]) -> Tensor:
    return torch.stack([routing.counts_e for routing in routings])
