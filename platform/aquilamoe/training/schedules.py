"""Learning-rate schedules: pure functions of the tokens trained in a stage."""

import math

from aquilamoe.config.schema import ScheduleConfig


def learning_rate_factor(tokens: int, total: int, config: ScheduleConfig) -> float:
    """Fraction of the peak learning rate for the step that ends at `tokens` of `total`.

    A linear warm-up first; then `constant` stays at 1, `cosine` falls over all that remains, and `wsd` falls linearly
    over the last `decay_tokens`; both end at `min_lr_ratio`.
    """
    if tokens < config.warmup_tokens:
        return tokens / config.warmup_tokens
    if config.name == "cosine":
        progress = (tokens - config.warmup_tokens) / max(1, total - config.warmup_tokens)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.name == "wsd" and config.decay_tokens:
        height = min(1.0, (total - tokens) / config.decay_tokens)
    else:
        height = 1.0
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height
