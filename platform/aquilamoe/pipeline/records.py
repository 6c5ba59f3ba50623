"""`record.json`: how it is written, and the one reader of it, which checks everything that anyone reads from it.

A record carries the SHA-256 of its own text, so that a changed byte is noticed; records from before that
(without `format`) are read as they are.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.points import is_number

Record = dict[str, Any]
RECORD = "record.json"
FORMAT = 2
BLANK = "0" * 64  # stands where the SHA-256 of the text goes while it is computed
MOST_NESTED = 64


def seal(record: Mapping[str, Any], what: str = RECORD) -> str:
    """The text of a record, which holds its own SHA-256; UserError for numbers that are none. what: see `to_json`."""
    own = {key: value for key, value in record.items() if key not in ("sha256", "format")}
    text = to_json({"sha256": BLANK, "format": FORMAT, **own}, what)
    return text.replace(BLANK, hashlib.sha256(text.encode()).hexdigest(), 1)


def to_json(values: Mapping[str, Any], what: str) -> str:
    """The text of a record, which every reader of JSON can parse; UserError, naming the key, for NaN and infinity.

    what: whose record it is, for the message.
    """
    for key, value in _numbers(values):
        if not math.isfinite(value):
            raise UserError(
                f"{what}: {key} is {value}, which is no measurement and no JSON; look for weights, or a step, whose "
                "numbers became too large"
            )
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float inside, by where it is: `certificate.layers.3`."""
    if isinstance(value, float):
        yield key, value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, each in inner:
        yield from _numbers(each, f"{key}.{name}" if key else str(name))


def read(directory: Path) -> Record:
    """The record of an output; UserError, one line, when it is missing, damaged, or of something else."""
    path = directory / RECORD
    remedy = f"restore it, or remove {directory} and run again to rebuild it"
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; without it, how {directory.name} was made is unknown; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; it is no record of this platform, or was changed; {remedy}") from None


def parse(text: bytes) -> Record:
    """The record in a text; ValueError with what is wrong if it is not a record, or has been changed."""
    try:
        record = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    problem = next(problems(record), None) or _seal_problem(record, text)
    if problem is not None:
        raise ValueError(problem)
    return dict(record)


def _seal_problem(record: Record, text: bytes) -> str | None:
    noted = record.get("sha256")
    if noted is None and "format" not in record:
        return None
    if not isinstance(noted, str):
        return "has no sha256"
    found = hashlib.sha256(text.replace(noted.encode(), BLANK.encode(), 1)).hexdigest()
    return None if found == noted else f"has SHA-256 {found[:12]} without its own, it states {noted[:12]}"


def problems(record: Any) -> Iterator[str]:
    """What is wrong with a record, the first first."""
    if not isinstance(record, dict):
        yield "has no fields"
        return
    if not _is_plain(record):
        yield "is nested too deep, or holds numbers or characters that are none"
        return
    for field, is_right in {**FIELDS, **(STAGE_FIELDS if "stage" in record else {})}.items():
        if not is_right(record.get(field)):
            yield f"has no {field}" if field not in record else f"has a {field} that is none"
    for field, is_right in OPTIONAL_FIELDS.items():
        if field in record and not is_right(record[field]):
            yield f"has a {field} that is none"
    for field, is_right in RECIPE_FIELDS.items():
        if not is_right(_inside(record, "recipe").get(field)):
            yield f"has no recipe.{field}"
    for name, value in _inside(record, "metrics").items():
        if isinstance(value, str) and "/" not in name:
            yield f"has a metrics.{name} that is no number"  # of documents that were left out, the first is text
    for name in _inside(record, "files"):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            yield f"names the file {name!r}, which is not in its directory"


def _inside(record: Record, field: str) -> dict[str, Any]:
    value = record.get(field)
    return value if isinstance(value, dict) else {}


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a JSON value can be printed, hashed and computed with."""
    if isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, list):
        inside = value
    elif isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    else:
        return value is None or isinstance(value, bool) or is_number(value)
    return depth < MOST_NESTED and all(_is_plain(each, depth + 1) for each in inside)


Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: type(value) in kinds


def _each(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _with(**fields: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(right(value.get(name)) for name, right in fields.items())


def _is_date(value: Any) -> bool:
    try:
        return bool(datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_single_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value and value != ".."


def _is_metric(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or is_number(value)


def _is_file(value: Any) -> bool:
    """Of a stage, bytes and SHA-256; of the growth tool, bytes."""
    return _is_count(value) or _with(sha256=_is(str), bytes=_is_count)(value)


def _is_spent(value: Any) -> bool:
    names = {"flops", "device_seconds", "energy_kwh", "money"}
    return isinstance(value, dict) and value.keys() == names and all(map(is_number, value.values()))


_TEXT, _DICT = _is(str), _is(dict)
has_digests = _each(_with(sha256=_TEXT, bytes=_is_count))  # whether files are noted with bytes and SHA-256
FIELDS: dict[str, Check] = {"fingerprint": _TEXT, "recipe": _DICT, "files": _each(_is_file)}
RECIPE_FIELDS: dict[str, Check] = {"kind": _TEXT, "version": _is(int), "config": _DICT, "inputs": _DICT}
STAGE_FIELDS: dict[str, Check] = {
    "stage": _TEXT,
    "kind": _TEXT,
    "inputs": _each(_with(stage=_TEXT, fingerprint=_TEXT, directory=_is_single_name, sha256=_is(str, type(None)))),
    "metrics": _each(_is_metric),
    "files": has_digests,
    "finished": _is_date,
    "seconds": is_number,
}
OPTIONAL_FIELDS: dict[str, Check] = {
    "started": _is_date,
    "finished": _is_date,
    "seconds": is_number,
    "resumed": _is(bool),
    "work": lambda value: value is None or is_number(value),
    "cost": _with(own=_is_spent, lineage=_is_spent),
    "versions": _each(_TEXT),
    "git_commit": _is(str, type(None)),
    "source": _DICT,
    "certificate": lambda value: value is None or isinstance(value, dict),
    "tensors": _each(_TEXT),
}
