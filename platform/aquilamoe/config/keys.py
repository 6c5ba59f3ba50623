"""The schema's view of a key by its dotted path, e.g. `data.sources.en.path`: is it a text, what is like it."""

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

LIKE_IT = 3  # keys that a message offers for one that is at the wrong place


class AsTyped:
    """Marks a field whose word of the command line is taken as it is typed, its quotation marks included."""


def is_text(model: type[BaseModel], key: str) -> bool:
    """Whether the value of a key can be nothing but text, as paths, URLs and names are: it needs no quotation marks."""
    found = list(_at(model, key))
    return bool(found) and all(annotation is str for annotation in found)


def is_as_typed(model: type[BaseModel], key: str) -> bool:
    """Whether the field is marked with `AsTyped`."""
    parent, _, last = key.rpartition(".")
    owners = list(_at(model, parent)) if parent else [model]
    fields = [each.model_fields.get(last) for each in owners if _is_model(each)]
    return any(isinstance(mark, AsTyped) for field in fields if field is not None for mark in field.metadata)


def elsewhere(values: Any, key: str) -> list[str]:
    """Other paths at which `values` have a key of the same name, the shortest first."""
    last = key.rpartition(".")[2]
    found = [path for path in _paths(values, "") if path.rpartition(".")[2] == last and path != key]
    return sorted(found, key=lambda path: path.count("."))[:LIKE_IT]


def _paths(values: Any, where: str) -> Iterator[str]:
    if isinstance(values, Mapping):
        for name, inner in values.items():
            yield f"{where}{name}"
            yield from _paths(inner, f"{where}{name}.")


def _at(model: Any, key: str) -> Iterator[Any]:
    """All types that the value at a path may have, without None."""
    found = [model]
    for part in key.split("."):
        found = [inner for annotation in found for inner in _inside(annotation, part)]
    yield from found


def _inside(annotation: Any, part: str) -> Iterator[Any]:
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        if field is not None:
            yield from members(field.annotation)
    elif get_origin(annotation) is dict:
        yield from members(get_args(annotation)[1])


def members(annotation: Any) -> Iterator[Any]:
    """The members of a union, and what is annotated, by themselves; without None."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from members(arguments[0])
    elif origin is not None and origin not in (dict, list, tuple) and arguments and not _is_literal(annotation):
        for argument in arguments:
            yield from members(argument)
    elif annotation is not NoneType:
        yield annotation


def _is_literal(annotation: Any) -> bool:
    return str(get_origin(annotation)) == "typing.Literal"


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel)
