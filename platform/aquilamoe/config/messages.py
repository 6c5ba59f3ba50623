"""What a user reads when something is wrong: one line with the place, the value and the remedy."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]


class UserError(Exception):
    """A mistake that the user can repair; its text is one line and the command exits with status 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'x'? (valid: ...)`, or the valid names alone, for the end of a message."""
    choices = sorted(map(str, valid))
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    known = f"valid: {', '.join(choices)}"
    return f"did you mean '{close[0]}'? ({known})" if close else known


def first_problem(error: ValidationError, model: type[BaseModel], values: Any, where: str = "") -> UserError:
    """Turn a pydantic error into one line: path, value, what is wrong, nearest valid name.

    Unknown keys come first: a misspelt key usually causes the "field required" beside it.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    # One mistake in a shared group shows up in every stage that refers to it.
    causes = {(problem["type"], problem["msg"], str(problem["loc"][-1:])) for problem in problems}
    more = f" (and {len(causes) - 1} more problem{'s' if len(causes) > 2 else ''})" if len(causes) > 1 else ""
    return UserError(_describe(problems[0], model, values, where) + more)


def _describe(problem: ErrorDetails, model: type[BaseModel], values: Any, where: str) -> str:
    location = problem["loc"]
    path = ".".join(part for part in (where, *_keys(location, values)) if part) or model.__name__
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {nearest(str(location[-1]), _fields_at(model, location[:-1]))}"
    if kind == "missing":
        return f"{path}: required but not set; give it a value, e.g. {path}=VALUE"
    if kind == "value_error":
        return f"{path}: {str(problem['msg']).removeprefix('Value error, ')}"
    if kind in ("literal_error", "union_tag_invalid"):
        context = problem["ctx"]
        choices = str(context.get("expected") or context["expected_tags"]).replace("'", "").replace(" or ", ", ")
        given = str(context.get("tag", value))
        return f"{path}: '{given}' is not a choice; {nearest(given, choices.split(', '))}"
    message = str(problem["msg"])
    return f"{path}: {value!r} is refused: {message[:1].lower()}{message[1:]}"


def _keys(location: Location, values: Any) -> Iterator[str]:
    """The parts of a location that are keys of the input, without the tags that pydantic adds for unions."""
    for index, part in enumerate(location):
        inner = isinstance(values, Mapping) and part not in values
        is_tag = inner and (index < len(location) - 1 or values.get("kind") == part)
        if is_tag or part == "[key]":
            continue
        yield str(part)
        known = part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)
        values = values[part] if known else None


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields of the (nested) model that a location points to."""
    current = model
    for part in location:
        field = current.model_fields.get(str(part))
        inner = list(_models_in(field.annotation)) if field else []
        if len(inner) == 1:
            current = inner[0]
        elif inner:
            tags = {_tag(candidate): candidate for candidate in inner}
            current = next((tags[str(tag)] for tag in location if str(tag) in tags), current)
    return list(current.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _tag(model: type[BaseModel]) -> str:
    kind = model.model_fields.get("kind")
    is_literal = kind is not None and get_origin(kind.annotation) is Literal
    return str(get_args(kind.annotation)[0]) if kind is not None and is_literal else ""
