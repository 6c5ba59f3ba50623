"""How heads turn and how far layers look back, as every architecture spells it in config.json. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import Any

from aquilamoe.checkpoint.families.family import Family
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import FULL, SLIDING, ModelConfig
from aquilamoe.config.rope import FIELDS, STRETCHED

# What the config classes of transformers assume for a file that lacks max_window_layers.
DEFAULT_WINDOW_LAYERS = 28


def rope_parameters(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Parameters of the rotary embedding, from the spellings of transformers 4 (rope_scaling) and 5, which prefers it.

    Fields that a file lacks are filled in as transformers does.
    """
    found = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope_type = found.get("rope_type") or found.get("type") or "default"
    rope_type = family.rope_types.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    found = {key: value for key, value in found.items() if key != "type" and value is not None}
    found["rope_type"] = rope_type
    theta = values.get("rope_theta")
    found.setdefault("rope_theta", family.default_theta if theta is None else theta)
    if values.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    if rope_type in STRETCHED:
        trained = values.get("original_max_position_embeddings")
        if trained is not None:
            found["original_max_position_embeddings"] = trained
        found.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return found


def read(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Read the fields of a model that concern positions from a config.json whose types were checked.

    Args:
        values: of the file.
        family: that it states.
        where: begins messages.

    Returns:
        `rope_theta`, `rope_scaling`, `sliding_window` and `layer_types`, to be validated by `ModelConfig`.

    Raises:
        UserError: the architecture does not compute what the file states.
    """
    parameters = rope_parameters(values, family)
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise UserError(
            f"{where}: rope_parameters differ by layer ('{nested[0]}'), {family.architecture} has one set for all; "
            "choose another checkpoint"
        )
    rotates_part = "partial_rotary_factor" in family.particulars
    if parameters.get("partial_rotary_factor", 1.0) != 1.0 and not rotates_part:
        raise UserError(
            f"{where}: partial_rotary_factor {parameters['partial_rotary_factor']}, only 1.0 is computed; choose "
            "another checkpoint"
        )
    window, types = _windows(values, family, where)
    return {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": _scaling(parameters),
        "sliding_window": window,
        "layer_types": types,
    }


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling, with the fields that its type reads."""
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        return None
    fields = FIELDS.get(rope_type, frozenset()) if isinstance(rope_type, str) else frozenset()
    return {"rope_type": rope_type, **{key: value for key, value in parameters.items() if key in fields}}


def _windows(values: Mapping[str, Any], family: Family, where: str) -> tuple[int | None, Sequence[str]]:
    window = values.get("sliding_window", family.default_window)
    if family.window_switch and not values.get("use_sliding_window"):
        window = None
    types = _layer_types(values, family, where)
    if family.windows == "none":
        window = None
    elif family.windows == "each" and SLIDING in types and window is None:
        raise UserError(f"{where}: layer_types has '{SLIDING}', use_sliding_window or sliding_window is off; set both")
    if window is not None and window < 1:
        raise UserError(f"{where}: sliding_window {window} leaves nothing to attend to; use at least 1, or null")
    return window, types if family.windows == "each" and window is not None else ()


def _layer_types(values: Mapping[str, Any], family: Family, where: str) -> list[str]:
    """The kind of every layer, as stated, or as the config class derives it."""
    types, layers = values.get("layer_types"), values["num_hidden_layers"]
    if types is None:
        return _derived_types(values, family, layers)
    known = {FULL, SLIDING} if family.windows == "each" else {FULL}
    if unknown := set(types) - known:
        raise UserError(
            f"{where}: layer_types has '{min(unknown)}', {family.architecture} computes "
            f"{', '.join(sorted(known))}; choose another checkpoint"
        )
    if len(types) != layers:
        raise UserError(
            f"{where}: layer_types has {len(types)} entries, num_hidden_layers is {layers}; use the checkpoint's own "
            "config.json"
        )
    return list(types)


def _derived_types(values: Mapping[str, Any], family: Family, layers: int) -> list[str]:
    first = values.get("max_window_layers")
    first = DEFAULT_WINDOW_LAYERS if first is None else first
    on = bool(values.get("use_sliding_window")) and values.get("sliding_window", 1) is not None
    slides = [family.slides(values, layer, first) for layer in range(layers)]
    return [SLIDING if on and each else FULL for each in slides]


def spelled_rope(model: ModelConfig) -> dict[str, Any]:
    """Spell the rotary embedding for transformers 4 (theta outside of the scaling) and for 5 (all in one)."""
    scaling = model.rope_scaling.model_dump(mode="json") if model.rope_scaling else {}
    theta = {"rope_theta": model.rope_theta}
    parameters = {"rope_parameters": {"rope_type": "default", **scaling, **theta}}
    return {**theta, **parameters, **({"rope_scaling": scaling} if scaling else {})}


def spelled_windows(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Spell how far layers look back, for an architecture of transformers that computes the model."""
    window, layers = model.sliding_window, model.num_hidden_layers
    if family.window_switch:
        types = [FULL if model.window(layer) is None else SLIDING for layer in range(layers)]
        # How many layers are full before the first window: what versions before `layer_types` read.
        leading = types.index(SLIDING) if window else layers
        values = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": leading}
        return values | ({"layer_types": types} if window is not None and family.windows == "each" else {})
    return {"sliding_window": window} if family.windows == "all" else {}
