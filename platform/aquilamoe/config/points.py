"""The lines of a file of points (`metrics.jsonl`, `router.jsonl`): which of them are points, and which are ignored."""

import json
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

Point = dict[str, Any]
METRICS = "metrics.jsonl"
COUNTS = ("step", "tokens", "done", "total")
MOST_LISTS = 8  # inside each other: of layers, of experts
log = logging.getLogger(__name__)


def read_points(path: Path) -> list[Point]:
    """The points of a file; a half-written last line is left out, and a line that is no point with a note."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_points(data.rpartition(b"\n")[0], path)


def parse_points(data: bytes, path: Path) -> list[Point]:
    """The points in whole lines of a file. path: for the note on lines that are none."""
    lines = [line for line in data.split(b"\n") if line]
    points = [_point(line) for line in lines]
    if None in points:
        note(f"{path}: {points.count(None)} of {len(points)} lines are damaged; they are ignored")
    return [point for point in points if point is not None]


@cache
def note(text: str) -> None:
    """Log a warning, once in a process: a file that is followed is read many times."""
    log.warning("%s", text)


def _point(line: bytes) -> Point | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and all(_is_value(key, value) for key, value in values.items()) else None


def _is_value(key: str, value: Any) -> bool:
    if key in COUNTS:
        return type(value) is int and is_number(value) and value >= 0
    return isinstance(value, str) or value is None if key == "unit" else _is_figure(value, MOST_LISTS)


def _is_figure(value: Any, depth: int) -> bool:
    """A number, nothing, or lists of them."""
    if isinstance(value, list):
        return depth > 0 and all(_is_figure(each, depth - 1) for each in value)
    return value is None or is_number(value)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float that arithmetic in floats can handle."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
