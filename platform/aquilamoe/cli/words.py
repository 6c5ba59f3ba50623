"""The arguments of a command line: what a user types, in any order and form, becomes what Hydra composes.

A key that the schema has as text (a path, a URL, a name) takes every character as the shell hands it over. All other
values are Hydra's to read, after bounds on what its grammar can take. Options are Hydra's, mistakes in them are not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from pydantic import BaseModel

from aquilamoe.cli.shipped import config_folders, options
from aquilamoe.config.keys import is_as_typed, is_text
from aquilamoe.config.messages import UserError, nearest

WORD = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[^=]*)(?P<equals>=?)(?P<value>.*)", re.DOTALL)
IN_QUOTES = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)")\s*""", re.DOTALL)
MAX_CHARACTERS, MAX_DEPTH = 4000, 20  # of a list or a mapping: reading one of 24,000 characters takes 5 s
GLOBAL_GROUPS = ("experiment", "ablation")  # their files set what belongs anywhere in the configuration
HEADER = re.compile(r"^#\s*@package\s+_global_\s*$", re.MULTILINE)
SCRIPTS = {"config": "efficientscale.py", "ablations": "ablations.py", "grow": "grow.py"}
OWNERS = {"ablation": "ablations.py", "experiment": "efficientscale.py"}


@dataclass(frozen=True)
class Program:
    """What a program's arguments may be.

    config_name: of conf/*.yaml. schema: whose keys they are. chosen: groups that the defaults leave out, in the order
    in which they apply. groups: those that have a default. defaults: what is chosen of a group where no word
    does.
    """

    config_name: str
    schema: type[BaseModel]
    chosen: Sequence[str] = ()
    groups: Sequence[str] = ()
    defaults: Sequence[tuple[str, str]] = ()


@dataclass
class Words:
    """A command line taken apart: Hydra's options, which groups are chosen, and all other arguments.

    topics: keys that `--help` is to describe.
    """

    options: list[str] = field(default_factory=list)
    multirun: bool = False
    config_folder: str | None = None
    overrides: list[str] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)


def read(program: Program, arguments: Sequence[str]) -> Words:
    """Take a command line apart, and write its arguments as Hydra expects them; UserError with all mistakes in them."""
    words = _options(program, arguments)
    typed = normalized(program, words.overrides, words)
    named = {word.lstrip("+~").partition("=")[0] for word in typed}
    words.overrides = [*(f"+{group}={name}" for group, name in program.defaults if group not in named), *typed]
    return words


def normalized(program: Program, typed: Sequence[str], words: Words | None = None) -> list[str]:
    """Arguments as Hydra expects them: chosen groups first, each in its order, in whatever order they were typed."""
    words = words or Words()
    problems: list[str] = []
    found: list[tuple[int, str]] = []
    for word in typed:
        try:
            found.append(_normalized(program, word, words))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(*problems)
    return [word for _, word in sorted(found, key=lambda entry: entry[0])]


def _options(program: Program, arguments: Sequence[str]) -> Words:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(_explained(program, message, arguments))

    parser.error = refuse  # type: ignore[method-assign]
    flags = [word for word in arguments if word.startswith("-")]
    if not flags:
        return Words(overrides=list(arguments))
    known, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        refuse(f"unrecognized arguments: {unknown[0]}")
    overrides = list(known.overrides)
    if known.config_dir is not None and not Path(known.config_dir).is_dir():
        raise UserError(f"--config-dir: {known.config_dir}: no such directory; name one with groups as in conf/")
    if known.config_name is not None or known.config_path is not None:
        raise UserError(
            f"--config-{'name' if known.config_name is not None else 'path'}: this program is configured by "
            f"conf/{program.config_name}.yaml; choose an experiment of your own with --config-dir DIR experiment=NAME"
        )
    rest = list(arguments)
    for word in overrides:
        rest.remove(word)
    topics = [word for word in overrides if known.help and "=" not in word and not word.startswith("~")]
    overrides = [word for word in overrides if word not in topics]
    return Words(rest, known.multirun, known.config_dir, overrides, topics)


def _explained(program: Program, message: str, arguments: Sequence[str]) -> str:
    """The argument parser's message in our style."""
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        flag = found[1]
        name, _, value = flag.lstrip("-").partition("=")
        after = list(arguments).index(flag) + 1 if flag in arguments else len(arguments)
        if not value and after < len(arguments) and "=" not in arguments[after]:
            value = arguments[after]
        return f"{flag}: no such option; settings are written KEY=VALUE, e.g. {name}={value or 'VALUE'}"
    if found := re.match(r"argument ([^:]+): invalid choice: '([^']*)' \(choose from (.*)\)", message):
        choices = found[3].replace("'", "").split(", ")
        return f"{found[1]}: '{found[2]}' is not a choice; {nearest(found[2], choices)}"
    return f"{message.removeprefix('argument ')}; --help shows what {SCRIPTS[program.config_name]} takes"


def _normalized(program: Program, word: str, words: Words) -> tuple[int, str]:
    """An argument, and its place among the others."""
    match = WORD.fullmatch(word)
    assert match is not None
    prefix = match["prefix"] or ""
    key = match["key"]
    value = match["value"]
    last = len(program.chosen)
    if prefix == "~" or "@" in key or key.startswith("hydra"):
        return last, word
    if not match["equals"] or not key:
        raise UserError(f"{word}: is not a setting; write KEY=VALUE, --help shows how")
    if key in program.chosen and value != "null":
        _check_option(key, value, words)
        return list(program.chosen).index(key), f"+{key}={value}"
    if key in program.groups and not value.startswith("{"):
        _check_option(key, value, words)
        return last, f"{key}={value}"
    if key in OWNERS and key not in program.chosen:
        raise UserError(
            f"{key}={value}: {SCRIPTS[program.config_name]} has no {key}s; they belong to python "
            f"workflows/{OWNERS[key]} {key}={value}"
        )
    if (value != "null" and is_text(program.schema, key)) or (is_as_typed(program.schema, key) and value != "null"):
        if words.multirun and "," in value:
            return last, f"++{key}={value}"
        return last, f"++{key}={quoted(value, is_as_typed(program.schema, key))}"
    _check_bounds(key, value)
    return last, f"++{key}={value}"


def quoted(value: str, with_quotes: bool = False) -> str:
    """A text as Hydra's grammar takes it, whatever is in it. with_quotes: its own quotation marks belong to it."""
    if not with_quotes and (inner := IN_QUOTES.fullmatch(value)):
        value = inner[1] if inner[1] is not None else inner[2]
    # A backslash is itself, but before a quotation mark, ${, or the end; of ${ only what reads the environment is kept.
    value = re.sub(r"(\\*)('|$(?!\n)|\$\{(?!oc\.))", lambda match: _escaped(match[1], match[2]), value)
    return f"'{value}'"


def _escaped(backslashes: str, what: str) -> str:
    return backslashes * 2 + (f"\\{what}" if what else "")


def _check_option(group: str, value: str, words: Words) -> None:
    """Refuse an option that no file of the configuration makes, or one whose file lacks a required field."""
    known = options(group)
    folders = [*config_folders(), *([Path(words.config_folder)] if words.config_folder else [])]
    for name in value.split(",") if words.multirun else [value]:
        name = name.strip().strip("'\"").removesuffix(".yaml")
        files = [folder / group / f"{name}.yaml" for folder in folders]
        found = next((path for path in files if path.is_file()), None)
        if found is None and not re.search(r"[$(\[]", name):
            raise UserError(f"{group}={value}: {_missing_option(group, name, known)}")
        if found is not None and group in GLOBAL_GROUPS and not HEADER.search(_head(found)):
            raise UserError(
                f"{found}: begins without the line '# @package _global_', which sets where its keys belong; add it"
            )


def _head(path: Path) -> str:
    """The comments that a file begins with."""
    lines: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                break
            lines.append(line)
    return "".join(lines)


def _missing_option(group: str, name: str, known: list[str]) -> str:
    if "/" not in name and not Path(name).suffix:
        return f"there is no conf/{group}/{name}.yaml; {nearest(name, known)}"
    if group == "data":
        return (
            f"names a configuration of conf/data ({', '.join(known)}), not files; for your own: data=bilingual "
            f"data.sources.en.path={name} data.sources.zh=null"
        )
    return (
        f"names a configuration of conf/{group} ({', '.join(known)}), not a file; put your file into "
        f"conf/{group} of the working directory and name it without .yaml"
    )


def _check_bounds(key: str, value: str) -> None:
    """Refuse what Hydra's grammar would take minutes for, or no end of memory."""
    if not re.search(r"[\[{(,]", value):
        return
    depth = deepest = 0
    for character in value:
        depth += (character in "[{(") - (character in ")}]")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise UserError(f"{key}: {deepest} nested brackets, at most {MAX_DEPTH} are read")
    if len(value) > MAX_CHARACTERS:
        raise UserError(
            f"{key}: a list or mapping of {len(value)} characters, at most {MAX_CHARACTERS} are read; write it in a "
            "YAML, e.g. an experiment in conf/experiment"
        )
