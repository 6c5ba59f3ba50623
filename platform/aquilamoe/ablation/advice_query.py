"""The query of `action=advise`: a source, a target and a budget, as they are typed."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aquilamoe.config.graph import grown_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?(?:e\d+)?)([kMBT]?)", re.IGNORECASE)
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
FLOPS_PER_PARAMETER = 6  # of a token, for a budget in FLOPs and a target of which only the size is known


@dataclass(frozen=True)
class GrowthSource:
    """Where to grow from. tokens: that it was trained on, if known. model: None where only a size is known."""

    params: float
    tokens: float | None
    model: ModelConfig | None = None

    @property
    def tokens_per_parameter(self) -> float | None:
        return None if self.tokens is None else self.tokens / self.params


@dataclass(frozen=True)
class AdviceQuery:
    """Whether and how to make a target of a source. budget: tokens of training the target."""

    source: GrowthSource
    target_params: float
    active_params: float
    kind: Literal["scale_up", "scale_out"]
    budget: float

    @property
    def growth(self) -> float:
        """How many times as many parameters."""
        return self.target_params / self.source.params


def read_query(values: Mapping[str, Any], find: Callable[[str], GrowthSource]) -> AdviceQuery:
    """Read source, target, budget and source_tokens; UserError, one line, for what is missing or cannot be.

    find: the source that a stage, fingerprint or directory names.
    """
    for key, example in (("source", "source=0.45M"), ("target", "target=1.6M"), ("budget", "budget=2M")):
        if values.get(key) is None:
            raise UserError(f"{key}: not set; advice is about a source, a target and a budget, e.g. {example}")
    source = _source(values, find)
    total, active, sparse = _target(values["target"], source)
    if total <= source.params:
        raise UserError(
            f"target: {total:g} parameters are not more than the source's {source.params:g}; use a larger one"
        )
    kind: Literal["scale_up", "scale_out"] = "scale_out" if sparse else "scale_up"
    return AdviceQuery(source, total, active, kind, _budget(str(values["budget"]), active))


def _source(values: Mapping[str, Any], find: Callable[[str], GrowthSource]) -> GrowthSource:
    text, tokens = str(values["source"]), values.get("source_tokens")
    seen = _number("source_tokens", str(tokens)) if tokens is not None else None
    if SIZE.fullmatch(text) and not re.fullmatch(r"\d{4,}|[0-9a-f]{12}", text):
        return GrowthSource(_number("source", text), seen)
    found = find(text)
    return found if seen is None else GrowthSource(found.params, seen, found.model)


def _target(target: Any, source: GrowthSource) -> tuple[float, float, bool]:
    """All and active parameters, and whether it is a Mixture of Experts."""
    if isinstance(target, Mapping):
        if source.model is None:
            raise UserError("target: sizes to change need a source with a known shape; set source to a checkpoint")
        model = grown_model(source.model, dict(target), "target")
        return model.num_params, model.num_active_params, model.is_moe
    match = SIZE.fullmatch(str(target))
    if match is None:
        raise UserError(f"target: '{target}' is not a size; write 1.6M, 8x0.45M for experts, or {{hidden_size: 128}}")
    size = float(match[2]) * UNITS[match[3].lower()]
    experts = int(match[1] or 1)
    return size * experts, size * min(experts, 2), experts > 1


def _budget(text: str, active: float) -> float:
    """In tokens; `1e13FLOPs` is divided by what a token costs."""
    if text.lower().endswith("flops"):
        return _number("budget", text[:-5]) / (FLOPS_PER_PARAMETER * active)
    return _number("budget", text.lower().removesuffix("tokens").strip())


def _number(key: str, text: str) -> float:
    match = SIZE.fullmatch(text)
    if match is None or match[1] or not math.isfinite(float(match[2])) or float(match[2]) <= 0:
        raise UserError(f"{key}: '{text}' is not a number; write e.g. 450000, 0.45M or 4.5e5")
    return float(match[2]) * UNITS[match[3].lower()]
