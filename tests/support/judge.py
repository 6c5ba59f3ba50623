"""transformers as the judge of what is written, and weights with which nothing hides."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE

transformers.utils.logging.disable_progress_bar()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Random matrices, and gains and biases that are far from one and zero, where errors would hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            noise = 1 + 0.3 * noise
        elif ".shared_expert" in name and parameter.shape[0 if "down" not in name else 1] == ABSENT_SHARED_EXPERT_SIZE:
            noise = 0 * noise
        elif not name.endswith(".bias"):
            noise = 0.25 * noise
        parameter.copy_(noise)


def open_with_transformers(directory: Path, **options: object) -> transformers.PreTrainedModel:
    """Load as any user would, and insist that transformers warns of nothing."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        opened: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    finally:
        logger.removeHandler(handler)
    assert warnings == []
    model, info = opened
    assert not any(info.values()), info
    assert isinstance(model, transformers.PreTrainedModel)
    return model
