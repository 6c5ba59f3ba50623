"""Learning-rate schedules: pure functions of the tokens trained in a stage."""

import math

from aquilamoe.config.schema import ScheduleConfig


def learning_rate_factor(tokens: int, total: int, config: ScheduleConfig) -> float:
    """Fraction of the peak learning rate for the step that ends at `tokens` of `total`.

    A linear warm-up from 0, which no step is taken at; then `constant` stays at 1, `cosine` falls over all that
    remains, and `wsd` falls linearly over the last `decay_tokens`; both end at `min_lr_ratio`. A warm-up that reaches
    into the decay (a stage's last, partial batch is not trained) is cut by it: the rate never jumps.
    """
    warmup = min(1.0, tokens / config.warmup_tokens) if config.warmup_tokens else 1.0
    return min(warmup, config.min_lr_ratio + (1 - config.min_lr_ratio) * _height(tokens, total, config))


def _height(tokens: int, total: int, config: ScheduleConfig) -> float:
    """What is left of the way from the peak (1) to `min_lr_ratio` (0)."""
    if config.name == "cosine":
        falling = max(0, tokens - config.warmup_tokens) / max(1, total - config.warmup_tokens)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
    if config.name == "wsd" and config.decay_tokens:
        return min(1.0, (total - tokens) / config.decay_tokens)
    return 1.0
