"""What a grown checkpoint is held to by its certificate."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aquilamoe.config.schema import GrowthConfig, UpcyclingConfig

if TYPE_CHECKING:
    from aquilamoe.growth.split import Split


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Whether a target keeps its source's function, how nearly, and by which growth.

    preserving: whether the growth claims to keep the function.
    tolerance: the largest difference of a logit that such a growth may show, as a fraction of the spread of the
        source's logits; an eighth of it is a layer's. See `bounds.default_tolerance`.
    growth, seed, split: how the target was made, so that layers can be compared; None compares only logits.
    """

    preserving: bool
    tolerance: float
    growth: GrowthConfig | UpcyclingConfig | None = None
    seed: int = 0
    split: "Split | None" = None
