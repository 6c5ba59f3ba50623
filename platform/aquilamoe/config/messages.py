"""What a user reads when something is wrong: one line with the place, the value and the remedy."""

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class UserError(Exception):
    """A mistake that the user can repair; its text is one line and the command exits with status 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` or the list of the valid names, for the end of a message."""
    choices = sorted(str(choice) for choice in valid)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'? (valid: {', '.join(choices)})"
    return f"valid: {', '.join(choices)}"


def first_problem(error: ValidationError, model: type[BaseModel], where: str = "") -> UserError:
    """Turn a pydantic error into one line: path, value, what is wrong, nearest valid name.

    Unknown keys come first: a misspelt key usually causes the "field required" beside it.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return UserError(_describe(problems[0], model, where) + _and_more(len(problems) - 1))


def _describe(problem: ErrorDetails, model: type[BaseModel], where: str) -> str:
    location = [part for part in problem["loc"] if part != "[key]"]
    path = ".".join([where, *map(str, location)]).strip(".") or model.__name__
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {nearest(str(location[-1]), _fields_at(model, location[:-1]))}"
    if kind == "missing":
        return f"{path}: required but not set; give it a value, e.g. {path}=VALUE"
    if kind == "value_error":
        return f"{path}: {str(problem['msg']).removeprefix('Value error, ')}"
    if kind == "literal_error":
        expected = str(problem["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"{path}: {value!r} is not a choice; {nearest(str(value), expected)}"
    return f"{path}: {value!r} is refused: {str(problem['msg'])[:1].lower()}{str(problem['msg'])[1:]}"


def _and_more(count: int) -> str:
    return f" (and {count} more problem{'s' if count > 1 else ''})" if count else ""


def _fields_at(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Names of the fields of the (nested) model that a location points to."""
    current: type[BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        current = annotation
    return list(current.model_fields)
