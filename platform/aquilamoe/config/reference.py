"""What the keys of a configuration mean: name, type, unit and description of every field, read from its model.

The page docs/configuration.md, `--help KEY` and the messages of refused values print these texts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aquilamoe.config.keys import members

UNIT = re.compile(r" \[([^\[\]]+)\]$")
NAMES = {bool: "true, false", int: "integer", float: "number", str: "text", Any: "any"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A field as a user sees it.

    Attributes:
        name: as it is typed.
        values: e.g. `integer`, `text or null`, or the choices.
        unit: e.g. `tokens`; empty for what has none.
        description: without the unit.
        models: the models of a group of keys, e.g. of `cluster`, or of every stage.
        required: whether the model has no default.
        default: of the model, where it is not required.
    """

    name: str
    values: str
    unit: str
    description: str
    models: tuple[type[BaseModel], ...]
    required: bool
    default: Any


def keys(model: type[BaseModel]) -> list[Key]:
    """The fields of a model, in the order of their definition."""
    return [_key(name, field) for name, field in model.model_fields.items()]


def _key(name: str, field: FieldInfo) -> Key:
    text = field.description or ""
    unit = UNIT.search(text)
    return Key(
        name=field.alias or name,
        values=_type(field.annotation),
        unit=unit[1] if unit else "",
        description=UNIT.sub("", text),
        models=tuple(models(field.annotation)),
        required=field.is_required(),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
    )


def field_of(model: type[BaseModel], name: str) -> FieldInfo | None:
    """The field that is typed by a name."""
    return next((field for key, field in model.model_fields.items() if (field.alias or key) == name), None)


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation, e.g. those of a union or of a mapping's values."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from models(argument)


@dataclass(frozen=True)
class Section:
    """The keys of one model at a place of the configuration.

    Attributes:
        path: where the keys are, e.g. `cluster`, `data.sources.NAME`; empty for the keys at the top.
        kind: of a stage, whose keys depend on it; empty otherwise.
        model: whose keys they are.
    """

    path: str
    kind: str
    model: type[BaseModel]

    @property
    def title(self) -> str:
        return f"{self.path}, kind {self.kind}" if self.kind else self.path


def sections(root: type[BaseModel]) -> list[Section]:
    """Every place with keys below a configuration, the upper ones first; a model that occurs twice has the first."""
    found: dict[type[BaseModel], Section] = {root: Section("", "", root)}
    waiting = [root]
    while waiting:
        parent = found[waiting.pop(0)]
        for key in keys(parent.model):
            inside = f"{key.name}.NAME" if key.values.startswith("mapping") else key.name
            for model in key.models:
                if model not in found:
                    path = f"{parent.path}.{inside}" if parent.path else inside
                    found[model] = Section(path, stage_kind(model), model)
                    waiting.append(model)
    return list(found.values())


def stage_kind(model: type[BaseModel]) -> str:
    """The kind of stage that a model is of; empty for other models."""
    kind = model.model_fields.get("kind")
    is_literal = kind is not None and get_origin(kind.annotation) is Literal
    return str(get_args(kind.annotation)[0]) if kind is not None and is_literal else ""


def reachable(*roots: type[BaseModel]) -> list[type[BaseModel]]:
    """All models of the keys of some models, and of the keys of those, each once."""
    found: list[type[BaseModel]] = []
    waiting = list(roots)
    while waiting:
        model = waiting.pop(0)
        if model not in found:
            found.append(model)
            waiting += [inner for field in model.model_fields.values() for inner in models(field.annotation)]
    return found


def _type(annotation: Any) -> str:
    """A type in words."""
    parts = list(dict.fromkeys(_member(each) for each in members(annotation)))
    return " or ".join([*parts, "null"] if _has_null(annotation) else parts)


def _has_null(annotation: Any) -> bool:
    return annotation is NoneType or (
        get_origin(annotation) not in (dict, list, tuple, Literal) and any(map(_has_null, get_args(annotation)))
    )


def _member(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is dict:
        return f"mapping of {_type(arguments[1])}" if arguments[1] is not Any else "mapping"
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not ...]
        return f"list of {_type(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group"
    return NAMES[annotation]
