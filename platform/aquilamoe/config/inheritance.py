"""What a stage takes from the groups of its experiment."""

from typing import Any

from aquilamoe.config.corpus import with_mixture


def inherited(stage: Any, groups: dict[str, Any]) -> Any:
    """A stage with what it leaves null, or out, as the groups of its experiment have it."""
    if not isinstance(stage, dict):
        return stage
    merged = {
        group: {**groups[group], **without_null(stage[group])}
        for group in ("growth", "upcycling", "optimizer", "schedule")
        if isinstance(stage.get(group), dict) and isinstance(groups.get(group), dict)
    }
    if stage.get("kind") == "pretrain":
        merged |= _inherit_data(stage, groups)
    return {**stage, **merged}


def _inherit_data(stage: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    """What a stage that trains leaves out of its model is as the group model, and its mixture as the corpus'."""
    found: dict[str, Any] = {}
    data = groups.get("data")
    model = stage.get("model")
    mixture = stage.get("mixture")
    if isinstance(model, dict) and isinstance(groups.get("model"), dict):
        found["model"] = {**groups["model"], **model}
    if isinstance(data, dict) and isinstance(sources := data.get("sources"), dict):
        if mixture is None:
            found["mixture"] = with_mixture(data)["mixture"]
        elif isinstance(mixture, dict):
            absent = {name for name in mixture if name in sources and sources[name] is None}
            kept = {name: share for name, share in mixture.items() if name not in absent}
            found["mixture"] = without_null(kept) or kept
    return found


def without_null(values: Any) -> Any:
    """A mapping without what is null in it; anything else as it is."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if value is not None}
