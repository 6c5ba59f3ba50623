"""How checkpoints generate text, and which tasks they are evaluated on."""

from aquilamoe.config.network import Config, NonNegativeFloat, PositiveInt, Seed


class GenerationConfig(Config):
    """How a text is continued; `temperature` 0 always takes the likeliest token, and then `seed` has no effect."""

    max_new_tokens: PositiveInt = 48
    temperature: NonNegativeFloat = 0.0
    seed: Seed = 0


class EvaluationConfig(Config):
    """Tasks of `action=evaluate`. folder: of further tasks for lm-eval, or null. items: questions of each own task."""

    folder: str | None = None
    items: PositiveInt = 200
