"""What a checkpoint does with positions: how its heads turn, and how far its layers look back. Torch-free.

A growth neither reads nor changes it. So that what is grown computes the same, the target states it in its own terms.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aquilamoe.checkpoint import rotary
from aquilamoe.checkpoint.rotary import Rope
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
# Architectures by what windows they compute: of every layer by itself, or one for all; the others have none.
EACH_LAYER = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM")
ALL_LAYERS = ("MistralForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")
SWITCHED = (*EACH_LAYER, "Qwen3MoeForCausalLM")  # by use_sliding_window
# What the config classes of transformers assume for fields that a file lacks.
DEFAULT_ROPE_THETA = {"MixtralForCausalLM": 1e6}
DEFAULT_WINDOW = {"MistralForCausalLM": 4096, **dict.fromkeys(SWITCHED, 4096)}
DEFAULT_WINDOW_LAYERS = 28
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Positions:
    """How heads turn, and of every layer how many tokens it sees (itself included); None is all before it."""

    rope: Rope
    windows: tuple[int | None, ...]

    def differences(self, model: ModelConfig) -> Iterator[str]:
        """What is not the plain attention that training, evaluation and generation here compute."""
        if self.rope.rope_type != "default":
            yield f"rotary embedding scaled by rope_type '{self.rope.rope_type}'"
        window = min((window for window in self.windows if window is not None), default=model.max_position_embeddings)
        if window < model.max_position_embeddings:
            yield (
                f"sliding_window {window} is smaller than max_position_embeddings {model.max_position_embeddings} "
                "tokens: sliding_attention"
            )

    def on(self, layers: Sequence[int]) -> "Positions":
        """Of a network whose layers come from these."""
        return replace(self, windows=tuple(self.windows[layer] for layer in layers))


def plain(model: ModelConfig) -> Positions:
    """Those of a network of ours."""
    rope = Rope(rope_type="default", rope_theta=model.rope_theta)
    return Positions(rope, (None,) * model.num_hidden_layers)


def rope_parameters(values: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Parameters of the rotary embedding, from the spellings of transformers 4 (rope_scaling) and 5, which prefers it.

    Fields that a file lacks are filled in as transformers does.
    """
    found = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope_type = found.get("rope_type") or found.get("type") or "default"
    found = {key: value for key, value in found.items() if key != "type" and value is not None}
    found["rope_type"] = rope_type
    theta = values.get("rope_theta")
    found.setdefault("rope_theta", DEFAULT_ROPE_THETA.get(architecture, 1e4) if theta is None else theta)
    if values.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    if rope_type in rotary.STRETCHED:
        trained = values.get("original_max_position_embeddings")
        if trained is not None:
            found["original_max_position_embeddings"] = trained
        found.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return found


def read(values: Mapping[str, Any], architecture: str, model: ModelConfig, where: str) -> Positions:
    """The positions of a config.json whose types were checked; UserError for what cannot be computed."""
    parameters = rope_parameters(values, architecture)
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise UserError(
            f"{where}: rope_parameters differ by layer ('{nested[0]}'), {architecture} has one set for all; choose "
            "another checkpoint"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor {parameters['partial_rotary_factor']}, only 1.0 is computed; choose "
            "another checkpoint"
        )
    rope = rotary.parse(parameters, model.head_dim, where)
    return Positions(rope, _windows(values, architecture, model.num_hidden_layers, where))


def _windows(values: Mapping[str, Any], architecture: str, layers: int, where: str) -> tuple[int | None, ...]:
    window = values.get("sliding_window", DEFAULT_WINDOW.get(architecture))
    if architecture in SWITCHED and not values.get("use_sliding_window"):
        window = None
    types = _layer_types(values, architecture, layers, where)
    if architecture not in (*EACH_LAYER, *ALL_LAYERS):
        window = None
    elif architecture in EACH_LAYER and SLIDING in types and window is None:
        raise UserError(f"{where}: layer_types has '{SLIDING}', use_sliding_window or sliding_window is off; set both")
    if window is not None and window < 1:
        raise UserError(f"{where}: sliding_window {window} leaves nothing to attend to; use at least 1, or null")
    if architecture in EACH_LAYER:
        return tuple(window if kind == SLIDING else None for kind in types)
    return (window,) * layers


def _layer_types(values: Mapping[str, Any], architecture: str, layers: int, where: str) -> list[str]:
    """The kind of every layer, as stated, or as the config class derives it."""
    types = values.get("layer_types")
    if types is None:
        return _derived_types(values, architecture, layers)
    known = {FULL, SLIDING} if architecture in EACH_LAYER else {FULL}
    if unknown := set(types) - known:
        raise UserError(
            f"{where}: layer_types has '{min(unknown)}', {architecture} computes {', '.join(sorted(known))}; choose "
            "another checkpoint"
        )
    if len(types) != layers:
        raise UserError(
            f"{where}: layer_types has {len(types)} entries, num_hidden_layers is {layers}; use the checkpoint's own "
            "config.json"
        )
    return list(types)


def _derived_types(values: Mapping[str, Any], architecture: str, layers: int) -> list[str]:
    first = values.get("max_window_layers")
    first = DEFAULT_WINDOW_LAYERS if first is None else first
    on = bool(values.get("use_sliding_window")) and values.get("sliding_window", 1) is not None
    if architecture == "Qwen2MoeForCausalLM":
        slides = [layer % 2 == 0 and layer < first for layer in range(layers)]
    else:
        slides = [layer >= first for layer in range(layers)]
    return [SLIDING if on and each else FULL for each in slides]


def refuse(field: str, old: ModelConfig, new: ModelConfig, rope_type: str) -> UserError:
    """Of a size that the frequencies of a scaled rotary embedding depend on."""
    return UserError(
        f"{field}: target {getattr(new, field)}, source {getattr(old, field)}; with rope_type '{rope_type}' other "
        "frequencies would follow from it, keep the source's"
    )


def check_same(source: tuple[Positions, ModelConfig], target: tuple[Positions, ModelConfig]) -> None:
    """UserError unless the heads of both turn alike, at any length: measured on the frequencies themselves.

    A head may have grown: then pair i of the source is pair i * ratio of the target (see `growth.units`).
    """
    (before, old), (after, new) = source, target
    ratio = new.head_dim // old.head_dim
    for length in (1, 2 * max(old.max_position_embeddings, new.max_position_embeddings)):
        had, had_scale = before.rope.frequencies(old.head_dim, old.max_position_embeddings, length)
        has, has_scale = after.rope.frequencies(new.head_dim, new.max_position_embeddings, length)
        pairs = zip(had, has[::ratio], strict=True)
        if abs(had_scale - has_scale) > TOLERANCE or any(abs(a - b) > TOLERANCE * a for a, b in pairs):
            field = "head_dim" if ratio > 1 else "max_position_embeddings"
            raise refuse(field, old, new, before.rope.rope_type)
