"""The code of what a recipe names - a growth method, a rule, a schedule - as a part of the recipe.

A digest of a file's syntax tree, without comments and docstrings, and of the plugins beside it that it imports. Code as
it was shipped is no part of a recipe: it is what a stage's VERSION stands for. What was changed, or added, is one.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from aquilamoe.config import plugins
from aquilamoe.config.messages import UserError

DIGITS = 12
# By the field that names it, the files with what may be named. `{}` stands for the name: of a plugin.
NAMED: Mapping[str, tuple[str, ...]] = {
    "growth.method": ("growth/methods/{}.py",),
    "growth.depth": ("config/depth.py",),
    "upcycling.method": (
        "growth/scale_out.py",
        "growth/expert_diversity.py",
        "growth/split.py",
        "growth/directions.py",
        "growth/mix.py",
        "growth/mix_router.py",
    ),
    "schedule.name": ("training/schedules.py",),
}
# Digests of these files as they are shipped; `tests/test_architecture.py` prints the right ones. Who changes what a
# file computes raises the VERSION of the stages that use it, too.
SHIPPED: Mapping[str, str] = {
    "growth/methods/aki.py": "97417831b219",
    "growth/methods/aki_pro.py": "a62bbdd0d4ea",
    "growth/methods/fpi.py": "c19d9cde3f60",
    "growth/methods/hypercloning.py": "f9e3d971c2e6",
    "growth/methods/lemon.py": "2a48cecdaa10",
    "growth/methods/random.py": "4f6a7c6607a0",
    "config/depth.py": "0d919ed00eaf",
    "growth/scale_out.py": "71eef1729cf6",
    "training/schedules.py": "68c8d7f04e05",
}


def of(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the code that a configuration names, by field, where it is not the code that was shipped."""
    found = {}
    for field, files in NAMED.items():
        group, _, key = field.partition(".")
        name = config[group].get(key) if isinstance(config.get(group), Mapping) else None
        paths = [file.format(name) for file in files]
        if isinstance(name, str) and all((plugins.PACKAGE_ROOT / path).is_file() for path in paths):
            found[field] = digest(paths)
            if SHIPPED.get(paths[0]) == found[field]:
                del found[field]
    return found


def digest(files: list[str]) -> str:
    """Of files of the package and of the plugins beside them that they import; UserError if one is not Python."""
    trees = {path.name: _tree(path, *_stamp(path)) for path in _with_neighbours(files)}
    return hashlib.sha256(json.dumps(trees, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _with_neighbours(files: list[str]) -> list[Path]:
    """The files and, transitively, those in the same folder that a plugin imports."""
    waiting, found = [plugins.PACKAGE_ROOT / file for file in files], list[Path]()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.append(path)
            if path.parent.name == "methods":
                names = _imported(path, *_stamp(path))
                waiting += [other for name in names if (other := path.parent / f"{name}.py").is_file()]
    return found


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{path}: is not Python ({line}); correct it") from None


@cache
def _imported(path: Path, *_: int) -> tuple[str, ...]:
    """Last parts of the names of modules, and names, that a file imports."""
    found: list[str] = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found += [alias.name.rpartition(".")[2] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)]
    return tuple(found)


@cache
def _tree(path: Path, *_: int) -> Any:
    """The syntax tree of a file as JSON holds it."""
    return _shape(_parsed(path))


def _shape(value: Any) -> Any:
    """A node as its kind and its fields; what is empty is left out, so that versions of Python agree."""
    if isinstance(value, ast.AST):
        return [type(value).__name__, *([name, _shape(child)] for name, child in _fields(value))]
    return [_shape(each) for each in value] if isinstance(value, list) else repr(value)


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        if value is not None and value != []:
            yield name, value
