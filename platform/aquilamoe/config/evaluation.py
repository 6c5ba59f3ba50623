"""How checkpoints generate text, and which tasks they are evaluated on."""

from pydantic import Field

from aquilamoe.config.numbers import Config, NonNegativeFloat, PositiveInt, Seed


class GenerationConfig(Config):
    """How a checkpoint continues a text."""

    max_new_tokens: PositiveInt = Field(default=48, description="Length of a continuation at most [tokens]")
    temperature: NonNegativeFloat = Field(
        default=0.0,
        description="0: always the likeliest token; larger: sampled, the more evenly the larger [ratio to the logits]",
    )
    seed: Seed = Field(default=0, description="Seed of the sampling; no effect at temperature 0")


class EvaluationConfig(Config):
    """Tasks of `action=evaluate`."""

    folder: str | None = Field(
        default=None, description="Folder of further tasks for lm-eval: their YAML files and data; null: none [path]"
    )
    items: PositiveInt = Field(default=200, description="Size of each task made from the corpus [questions]")
