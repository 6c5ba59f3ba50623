"""Random growths of random networks, by seed: what claims to keep the function keeps it, all else is one line.

More of them than the tests try: `pytest -m "slow or not slow" tests/growth/test_random_growths.py`.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth import rules
from small_checkpoints import VOCABULARY, difference, grow, growth, model, padded, write_source

SEEDS, QUICK = range(300), range(0, 300, 20)
SAME = 1e-4  # of logits around 1, in float32


def networks(draw: random.Random) -> tuple[ModelConfig, dict[str, Any]]:
    """A source, and the sizes of its target."""
    groups, head_dim = draw.choice([1, 2, 3]), draw.choice([2, 4, 8])
    heads = groups * draw.choice([1, 2, 3])
    sizes: dict[str, Any] = {
        "hidden_size": draw.choice([heads * head_dim, 12, 20]),
        "intermediate_size": draw.choice([7, 12, 16]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "tie_word_embeddings": draw.random() < 0.4,
        "qkv_bias": draw.random() < 0.5,
    }
    grown = {
        "hidden_size": sizes["hidden_size"] + draw.choice([0, 1, 5, sizes["hidden_size"]]),
        "intermediate_size": sizes["intermediate_size"] + draw.choice([0, 1, 20]),
        "num_hidden_layers": sizes["num_hidden_layers"] + draw.choice([0, 1, 3]),
        "num_attention_heads": heads * draw.choice([1, 2, 3]),
        "num_key_value_heads": groups * draw.choice([1, 1, 2]),
        "head_dim": head_dim * draw.choice([1, 1, 2]),
        "vocab_size": VOCABULARY + draw.choice([0, 1, 50]),
    }
    return model(**sizes), grown


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow) for seed in SEEDS]
)
def test_a_random_growth_keeps_the_function_that_it_claims_to_keep_or_is_one_line(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    source, sizes = networks(draw)
    how = growth(
        method=draw.choice(["fpi", "fpi", "fpi", "aki", "aki_pro", "hypercloning", "random"]),
        norm=draw.choice(["exact", "exact", "zero_pad", "copy"]),
        maps=draw.choice(["circular", "sampled"]),
        noise=draw.choice([0.0, 0.3, 1.0]),
        depth=draw.choice(["interpolate", "stack", "stack_top"]),
        new_layers=draw.choice(["zero", "zero", "copy", "scaled"]),
    )
    write_source(tmp_path / "source", source, torch.float32)
    try:
        target = ModelConfig.model_validate(padded(source, how, **sizes).model_dump())
        rules.check(source, target, how)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    except ValueError:
        return  # sizes that no network has
    grown = grow(tmp_path, target, how, seed)
    if rules.preserves(how, source, target):
        assert difference(tmp_path / "source", grown) < SAME
