"""docker-compose.yml as Docker Compose reads it: variables of .env filled in, and services as plain data.

python tools/compose_file.py check [--schema compose-spec.json]    one line for what is wrong, status 1
"""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.yml"
# $$, $NAME or ${NAME}, ${NAME:-default}, ${NAME:?message}, ${NAME:+instead}; without the colon, empty counts as set.
VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<bare>\w+)|\{(?P<name>\w+)(?:(?P<how>:?[-?+])(?P<text>[^}]*))?\})")
REFUSALS = "x-refused-if-unset"
KEYS_S = ("start_period", "interval", "timeout")  # of a health check


class ComposeError(Exception):
    """What is wrong with the file or its variables, in one line."""


@dataclass(frozen=True)
class Service:
    """One service of the file.

    words: entry point and command. mounts: source (a volume's name, or a path) by target. secrets: names.
    needs: how each service must be before this one starts, by its name. check_s: how long a health check may take.
    patience_s: how long it may take until one is passed.
    """

    name: str
    image: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    user: str
    secrets: tuple[str, ...]
    mounts: dict[str, str]
    networks: tuple[str, ...]
    ports: tuple[str, ...]
    profiles: tuple[str, ...]
    needs: dict[str, str]
    health: tuple[str, ...]
    check_s: float
    patience_s: float
    restarts: bool
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, raw: Mapping[str, Any]) -> "Service":
        health = raw.get("healthcheck", {})
        seconds = {key: float(str(health.get(key, "0s")).removesuffix("s")) for key in KEYS_S}
        return cls(
            name=name,
            image=raw["image"],
            entrypoint=tuple(raw.get("entrypoint", ())),
            command=tuple(raw.get("command", ())),
            environment={key: str(value) for key, value in raw.get("environment", {}).items()},
            user=str(raw.get("user", "")),
            secrets=tuple(raw.get("secrets", ())),
            mounts={volume.split(":")[1]: volume.split(":")[0] for volume in raw.get("volumes", ())},
            networks=tuple(raw.get("networks", ())),
            ports=tuple(raw.get("ports", ())),
            profiles=tuple(raw.get("profiles", ())),
            needs={other: how["condition"] for other, how in raw.get("depends_on", {}).items()},
            health=tuple(health.get("test", ())[1:]),
            check_s=seconds["timeout"],
            patience_s=seconds["start_period"] + seconds["interval"] * health.get("retries", 0),
            restarts="restart" in raw,
            raw=raw,
        )


def load(environment: Mapping[str, str], path: Path = FILE) -> dict[str, Any]:
    """The file with all variables filled in. ComposeError for one that must be set and is not."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    filled = _filled(values, environment)
    assert isinstance(filled, dict)
    return filled


def services(values: Mapping[str, Any]) -> dict[str, Service]:
    return {name: Service.of(name, raw) for name, raw in values["services"].items()}


def secrets(values: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """What is in every secret's file."""
    return {name: environment[source["environment"]] for name, source in values["secrets"].items()}


def read_env(path: Path) -> dict[str, str]:
    """NAME=VALUE lines of a .env file; the rest are comments."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def substitute(text: str, environment: Mapping[str, str]) -> str:
    """The text with its variables filled in, as the Compose specification defines."""

    def value_of(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name, how, rest = match["bare"] or match["name"], match["how"] or "-", match["text"] or ""
        value = environment.get(name)
        is_set = bool(value) if how.startswith(":") else value is not None
        if how.endswith("+"):
            return rest if is_set else ""
        if not is_set and how.endswith("?"):
            raise ComposeError(f"{name} is not set: {rest}")
        return str(value) if is_set else rest

    return VARIABLE.sub(value_of, text)


def _filled(values: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(values, dict):
        return {key: _filled(value, environment) for key, value in values.items()}
    if isinstance(values, list):
        return [_filled(value, environment) for value in values]
    return substitute(values, environment) if isinstance(values, str) else values


def violations(values: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Where the file is not what the schema of the Compose specification requires."""
    import jsonschema

    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    errors = sorted(validator.iter_errors(values), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["check"])
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--schema", type=Path, help="JSON schema of the Compose specification")
    options = parser.parse_args(words)
    own_env = ROOT / ".env"
    environment = {**(read_env(own_env) if own_env.exists() else {}), **os.environ}
    try:
        values = load(environment, options.file)
    except ComposeError as error:
        raise SystemExit(f"error: {error}") from None
    found = violations(values, json.loads(options.schema.read_text())) if options.schema else []
    if found:
        raise SystemExit("\n".join(found))
    print(f"{options.file.name}: {len(values['services'])} services" + (", valid by the schema" * bool(options.schema)))


if __name__ == "__main__":
    main()
