"""How checkpoints are made to write, and what they are asked."""

from aquilamoe.config.network import Config, NonNegativeFloat, PositiveInt, Seed


class GenerationConfig(Config):
    """How a text is continued; `temperature` 0 always takes the likeliest token, and then `seed` means nothing."""

    max_new_tokens: PositiveInt = 48
    temperature: NonNegativeFloat = 0.0
    seed: Seed = 0


class EvaluationConfig(Config):
    """What `action=evaluate` asks. folder: of further tasks for lm-eval, or null. items: questions of each own task."""

    folder: str | None = None
    items: PositiveInt = 200
