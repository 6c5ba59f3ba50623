"""What `--help` prints of keys: their values, types, units and descriptions, as docs/configuration.md has them."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from aquilamoe.config.messages import UserError, nearest
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.passwords import masked
from aquilamoe.config.reference import Key, keys, stage_kind

WIDEST = 110  # characters of a line
SIZES = {key.name: key for key in keys(ModelConfig)}  # what a growth's `model` may change


@dataclass(frozen=True)
class ComposedKey:
    """A key of a composed configuration.

    Attributes:
        path: as it is typed, empty at the top.
        key: its field; None at the top, and for the entries of a mapping.
        models: whose keys are below it.
        value: what it is composed to.
        is_mapping: whether the keys below it are names that a user chooses.
    """

    path: str
    key: Key | None
    models: tuple[type[BaseModel], ...]
    value: Any
    is_mapping: bool = False

    def below(self) -> Iterator["ComposedKey"]:
        """The keys below this one."""
        values = self.value if isinstance(self.value, Mapping) else {}
        if self.is_mapping or (self.key is not None and self.key.values == "mapping"):
            for name, value in values.items():
                kind = value.get("kind") if isinstance(value, Mapping) else None
                fitting = tuple(model for model in self.models if stage_kind(model) in ("", kind))
                yield ComposedKey(self._path(name), None if self.models else SIZES.get(name), fitting, value)
            return
        for model in self.models[:1]:
            for key in keys(model):
                value = values.get(key.name, key.default)
                yield ComposedKey(self._path(key.name), key, key.models, value, key.values.startswith("mapping"))

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def overview(schema: type[BaseModel]) -> str:
    """The keys at the top, a line each where the terminal is wide enough."""
    names = max(len(key.name) for key in keys(schema))
    lines = [
        textwrap.fill(
            f"{key.name:{names}}  {_description(key)}",
            _width(),
            initial_indent="  ",
            subsequent_indent=" " * (names + 4),
        )
        for key in keys(schema)
    ]
    example = next(key.name for key in reversed(keys(schema)) if key.models)
    head = f"== Keys; `--help KEY` describes those below one, e.g. --help {example} =="
    return "\n".join([head, *lines])


def described(schema: type[BaseModel], values: Mapping[str, Any], paths: Sequence[str]) -> str:
    """Keys, and those below them, with the values in force; UserError for a key that is not there."""
    top = ComposedKey("", None, (schema,), values)
    return "\n\n".join(_text(_find(top, path)) for path in paths)


def _find(top: ComposedKey, path: str) -> ComposedKey:
    place = top
    for part in path.split("."):
        below = {each.path.rpartition(".")[2]: each for each in place.below()}
        if part not in below:
            if not below:
                raise UserError(f"--help {path}: {place.path} has no keys below it; use --help {place.path}")
            raise UserError(f"--help {path}: unknown key '{part}'; {nearest(part, below)}")
        place = below[part]
    return place


def _text(place: ComposedKey) -> str:
    """A key with its description, and one for each key below it."""
    return "\n".join(_entry(each) for each in [place, *place.below()])


def _entry(place: ComposedKey) -> str:
    line = place.path if isinstance(place.value, Mapping) and place.value else f"{place.path} = {_shown(place.value)}"
    if place.key is not None:
        line, text = line if place.models else f"{line}  ({place.key.values})", _description(place.key)
    elif place.models:
        text = (place.models[0].__doc__ or "").partition("\n\n")[0].strip()
    else:
        return line
    return f"{line}\n{textwrap.fill(text, _width(), initial_indent='    ', subsequent_indent='    ')}"


def _description(key: Key) -> str:
    return f"{key.description} [{key.unit}]" if key.unit else key.description


def _shown(value: Any) -> str:
    """A value as YAML has it on one line, without passwords."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    dumped = yaml.safe_dump(masked(plain), default_flow_style=True, width=10_000, allow_unicode=True)
    return dumped.removesuffix("\n...\n").strip()


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)
