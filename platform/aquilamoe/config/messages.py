"""What a user reads when something is wrong: one line with the place, the value and the remedy."""

import difflib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aquilamoe.config.keys import elsewhere
from aquilamoe.config.passwords import masked
from aquilamoe.config.passwords import without_passwords as without_passwords
from aquilamoe.config.reference import field_of, models, stage_kind

Location = tuple[int | str, ...]
SHOWN_CHARACTERS = 60
SHOWN_PROBLEMS = 4  # lines
LONGEST_MESSAGE = 4000  # characters; a name in a hostile file can be as long as the file
# Categories of characters that a terminal executes instead of showing them: controls, lone surrogates, separators of
# lines; and the marks that reverse the order of what follows.
UNSHOWN = ("Cc", "Cs", "Zl", "Zp")
REVERSING = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UserError(Exception):
    """A mistake that the user can repair, in one line, or several, a line each; the command exits with status 1.

    It has no password. Names of files, tensors and columns that are in it come from anybody: it never has a character
    that a terminal executes.
    """

    def __init__(self, *texts: str) -> None:
        super().__init__("\n".join(shortened(printable(without_passwords(text))) for text in texts))


def printable(text: str) -> str:
    """The text with what a terminal would execute (escape sequences, line breaks) written as in Python: `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in UNSHOWN or c in REVERSING else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(text: str) -> str:
    """The beginning and the end of a text that is longer than any message."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    return f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'x'? (valid: ...)`, or the valid names alone, for the end of a message."""
    choices = sorted(map(str, valid))
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    known = f"valid: {', '.join(choices)}" if choices else "there is none"
    return f"did you mean '{close[0]}'? ({known})" if close else known


def first_problem(error: ValidationError, model: type[BaseModel], values: Any, where: str = "") -> UserError:
    """Turn a pydantic error into a line for each problem: path, value, what is wrong, nearest valid name, description.

    Unknown keys come first: a misspelt key usually causes the "field required" beside it.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    # One mistake in a shared group shows up in every stage that refers to it.
    causes = {(problem["type"], problem["msg"], str(problem["loc"][-1:])): problem for problem in reversed(problems)}
    lines = [_describe(problem, model, values, where) for problem in problems if problem in causes.values()]
    if len(lines) > SHOWN_PROBLEMS:
        left = len(lines) - SHOWN_PROBLEMS + 1
        lines = [*lines[: SHOWN_PROBLEMS - 1], f"and {left} more problems; correct these first"]
    return UserError(*lines)


def _describe(problem: ErrorDetails, model: type[BaseModel], values: Any, where: str) -> str:
    location = problem["loc"]
    path = ".".join(part for part in (where, *_keys(location, values)) if part) or model.__name__
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        fields = _fields_at(model, location[:-1])
        other = [] if difflib.get_close_matches(str(location[-1]), fields, cutoff=0.75) else elsewhere(values, path)
        offered = " or ".join(f"'{key}'" for key in other)
        return f"{path}: unknown key; {f'did you mean {offered}?' if other else nearest(str(location[-1]), fields)}"
    if kind == "missing":
        return f"{path}: required but not set; give it a value, e.g. +{path}=VALUE{_meaning(model, location)}"
    if kind == "value_error":
        return f"{path}: {str(problem['msg']).removeprefix('Value error, ')}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: required but not set; {nearest('', _tags_at(model, location))}"
    if kind in ("literal_error", "union_tag_invalid"):
        context = problem["ctx"]
        choices = str(context.get("expected") or context["expected_tags"]).replace("'", "").replace(" or ", ", ")
        given = str(context.get("tag", value))
        place = path if kind == "literal_error" else f"{path}.kind"
        meaning = _meaning(model, location) if kind == "literal_error" else ""
        return f"{place}: '{given}' is not a choice; {nearest(given, choices.split(', '))}{meaning}"
    message = str(problem["msg"])
    return f"{path}: {_shown(value)} is refused: {message[:1].lower()}{message[1:]}{_meaning(model, location)}"


def _shown(value: Any) -> str:
    """A value on one line, cut where it is long."""
    text = repr(masked(value))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _keys(location: Location, values: Any) -> Iterator[str]:
    """The parts of a location that are keys of the input, without the tags that pydantic adds for unions."""
    for index, part in enumerate(location):
        inner = isinstance(values, Mapping) and part not in values
        is_tag = inner and (index < len(location) - 1 or values.get("kind") == part)
        if is_tag or part == "[key]":
            continue
        yield str(part)
        if isinstance(values, Mapping):
            values = values.get(part)
        else:
            inside = isinstance(values, list) and isinstance(part, int) and part < len(values)
            values = values[part] if inside else None


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields of the (nested) model that a location points to."""
    return list(_walk(model, location)[0].model_fields)


def _meaning(model: type[BaseModel], location: Location) -> str:
    """The description of the field that a location points to, in parentheses; empty where there is none."""
    description = _walk(model, location)[1]
    return f" ({description})" if description else ""


def _walk(model: type[BaseModel], location: Location) -> tuple[type[BaseModel], str]:
    """The (nested) model that a location points to, and the description of the last field on the way."""
    current, description = model, ""
    for part in location:
        field = field_of(current, str(part))
        description = description if field is None else field.description or ""
        inner = list(models(field.annotation)) if field else []
        if len(inner) == 1:
            current = inner[0]
        elif inner:
            tags = {stage_kind(candidate): candidate for candidate in inner}
            current = next((tags[str(tag)] for tag in location if str(tag) in tags), current)
    return current, description


def _tags_at(model: type[BaseModel], location: Location) -> list[str]:
    """Values of `kind` among the models of the union that a location points to."""
    field = model.model_fields.get(str(location[0])) if location else None
    return [tag for candidate in models(field.annotation) if (tag := stage_kind(candidate))] if field else []
