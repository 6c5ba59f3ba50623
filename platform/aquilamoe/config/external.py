"""A checkpoint that no stage here has made, as the beginning of a line of checkpoints."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aquilamoe.config.network import ModelConfig

HUB = "hf://"
NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"  # ORG/NAME
ADDRESS = re.compile(rf"{HUB}(?P<name>{NAME})(?:@(?P<revision>\w[\w./-]*))?")
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Before:
    """What was spent on a checkpoint before it came here, as its user states it; None is unknown.

    Attributes:
        tokens: that it was trained on.
        flops: model FLOPs of that training.
    """

    tokens: int | None
    flops: float | None

    @classmethod
    def sum(cls, parts: Sequence["Before"]) -> "Before | None":
        """What was spent on several checkpoints; unknown where it is of one of them, None without any."""
        if not parts:
            return None
        tokens, flops = [part.tokens for part in parts], [part.flops for part in parts]
        return cls(
            None if None in tokens else sum(each for each in tokens if each is not None),
            None if None in flops else sum(each for each in flops if each is not None),
        )

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """As the records of a line have it that begins with such a checkpoint."""
        return {"before_tokens": self.tokens, "before_flops": self.flops}


@dataclass(frozen=True)
class ExternalCheckpoint:
    """What a checkpoint is, by its files.

    Attributes:
        model: the network.
        files: SHA-256 of every file that is part of it, by name.
        vocabulary: ids of its tokenizer, the largest plus one; None without a tokenizer.json.
    """

    model: ModelConfig
    files: Mapping[str, str]
    vocabulary: int | None


def vocabulary_of(tokenizer: Any) -> int | None:
    """The largest id in the contents of a tokenizer.json plus one; None if it lists no tokens."""
    values = tokenizer if isinstance(tokenizer, Mapping) else {}
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    ids = [token.get("id") for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    if isinstance(vocabulary, Mapping):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    largest = max((each for each in ids if type(each) is int), default=None)
    return None if largest is None else largest + 1
