"""Identity is the recipe: what a stage computes, never where it runs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from aquilamoe.config.passwords import masked

Recipe = dict[str, Any]
CODE = "code."


def recipe(
    kind: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: Mapping[str, str] | None = None,
) -> Recipe:
    """A stage's semantic configuration, with each input replaced by the fingerprint of the stage it names.

    A password in an address is no part of it: another one reads the same.
    code: digests of what the configuration names, where it is not what was shipped (`pipeline.code`).
    """
    own = masked({key: value for key, value in config.items() if key not in ("kind", "inputs")})
    changed = {"code": dict(code)} if code else {}
    return {"kind": kind, "version": version, "config": own, "inputs": dict(inputs), **changed}


def fingerprint(value: Recipe) -> str:
    """First 12 hex digits of the SHA-256 of the recipe as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots; an empty dictionary inside is a value."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    return {
        path: leaf
        for key, child in value.items()
        for path, leaf in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List field by field what changed, own fields first, then inputs: `learning_rate 0.001 -> 0.002`."""
    before, after = flatten(old), flatten(new)
    changed = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    changed.sort(key=lambda key: (key.startswith("inputs."), key))
    return [line for key in changed if (line := _difference(key, before, after))]


def _difference(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if not key.startswith(CODE):
        return f"{key.removeprefix('config.')} {_show(before, key)} -> {_show(after, key)}"
    field = key.removeprefix(CODE)
    names = [values.get(f"config.{field}") for values in (before, after)]
    # Another name has other code: that the name changed is enough.
    return f"code of {field.replace('.', ' ')} {names[1]} changed" if names[0] == names[1] else ""


def _show(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "(absent)"
