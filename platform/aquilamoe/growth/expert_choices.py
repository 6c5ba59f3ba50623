"""What more experts did to the choices of tokens: source and target side by side, for the certificate."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import directions, rules
from aquilamoe.model.transformer import Routing

# An expert with fewer tokens is too few for shares of its copies.
FEWEST_TOKENS = 16


def may_compare(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the target has several copies of every expert of the source, and layers are those of the source."""
    alike = ("hidden_size", "num_hidden_layers", "mlp_only_layers")
    return (
        source.is_moe
        and target.num_experts > source.num_experts
        and target.num_experts % source.num_experts == 0
        and all(getattr(source, name) == getattr(target, name) for name in alike)
    )


@dataclass(frozen=True, kw_only=True)
class _LayerChoices:
    """One layer.

    same: fraction of the tokens that choose the same originals in source and target.
    fence: fraction of the tokens whose copies are no further apart than their scores, by the criterion.
    shift: M, as measured. needed: that of 98 % of the tokens, None where copies have one score.
    smallest: share of the tokens of an original that go to its smallest copy, the mean over tokens. least: the least.
    """

    same: float
    fence: float
    shift: float
    needed: float | None
    smallest: float
    least: float
    z_before: float
    z_after: float


@dataclass
class ExpertChoices:
    """Collects the layers of a growth from experts to more of them.

    The criterion and the z-losses are of the target's router on what the source's router reads; which originals are
    chosen, and the shares of copies, are those of the target on its own way through the layers.
    """

    source: ModelConfig
    target: ModelConfig
    layers: list[_LayerChoices] = field(default_factory=list)

    @property
    def copies(self) -> int:
        return self.target.num_experts // self.source.num_experts

    def add(self, x_nd: Tensor, router_ed: Tensor, before: Routing, after: Routing) -> None:
        """One layer.

        Args:
            x_nd: what the source's router reads.
            router_ed: the target's router.
            before: of the source.
            after: of the target, on its own stream.
        """
        logits_ne = x_nd @ router_ed.T
        shifts_nm = logits_ne.unflatten(1, (-1, self.copies)).mean(dim=1)
        shifts_nm = shifts_nm - shifts_nm.mean(dim=1, keepdim=True)
        top_nk = before.logits_ne.topk(self.source.num_experts_per_tok, dim=1).values
        gap_n, margin_n = top_nk[:, 0] - top_nk[:, -1], directions.margin(shifts_nm)
        bits = (self.copies - 1).bit_length()
        axes = bits if 1 << bits == self.copies else 1
        shift = (shifts_nm.square().mean() / axes).sqrt().item()
        is_split = shift > 1e-6 * before.logits_ne.square().mean().sqrt().item()
        counts_em = after.counts_e.view(-1, self.copies).double()
        smallest_e, tokens_e = counts_em.amin(dim=1), counts_em.sum(dim=1)
        counted_e = tokens_e >= min(FEWEST_TOKENS, tokens_e.max().item())
        self.layers.append(
            _LayerChoices(
                same=self._same(before.experts_nk, after.experts_nk),
                fence=(gap_n >= margin_n).double().mean().item() if is_split else 1.0,
                shift=shift if is_split else 0.0,
                needed=shift * directions.needed(gap_n, margin_n) if is_split else None,
                smallest=(smallest_e.sum() / tokens_e.sum()).item(),
                least=(smallest_e / tokens_e)[counted_e].min().item(),
                z_before=_z_loss(before.logits_ne),
                z_after=_z_loss(logits_ne),
            )
        )

    def _same(self, before_nk: Tensor, after_nk: Tensor) -> float:
        """The fraction of tokens whose sets of originals are equal."""
        chosen = torch.zeros(2, len(before_nk), self.source.num_experts, dtype=torch.bool)
        chosen[0].scatter_(1, before_nk, True)
        chosen[1].scatter_(1, after_nk // self.copies, True)
        return (chosen[0] == chosen[1]).all(dim=1).double().mean().item()

    def measures(self, upcycling: UpcyclingConfig | None) -> dict[str, Any]:
        """Means over layers and tokens, and `shift` and `needed_shift` as lists of layers."""
        needed = [layer.needed for layer in self.layers]
        return {
            "method": None if upcycling is None else upcycling.method,
            "copies": self.copies,
            "same_originals": _mean([layer.same for layer in self.layers]),
            "fence": _mean([layer.fence for layer in self.layers]),
            "shift": [layer.shift for layer in self.layers],
            "needed_shift": None if None in needed else needed,
            "smallest_copy": _mean([layer.smallest for layer in self.layers]),
            "least_copy": min(layer.least for layer in self.layers),
            "z_loss_source": _mean([layer.z_before for layer in self.layers]),
            "z_loss_target": _mean([layer.z_after for layer in self.layers]),
            "warnings": [] if upcycling is None else rules.warnings(upcycling, self.source, self.target),
        }


def _z_loss(logits_ne: Tensor) -> float:
    return logits_ne.logsumexp(dim=1).double().square().mean().item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
