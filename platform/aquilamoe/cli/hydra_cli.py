"""The command line of every program: Hydra composes the configuration, the platform validates it and acts."""

import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here instead of being printed by Hydra

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aquilamoe.cli import key_help
from aquilamoe.cli import words as words_of
from aquilamoe.cli.shipped import CONF, config_folders
from aquilamoe.cli.words import Program, Words
from aquilamoe.config import passwords
from aquilamoe.config.messages import UserError
from aquilamoe.process import ending

# What Hydra, OmegaConf and YAML raise for a configuration that cannot be composed.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError)
MAX_JOBS = 1000
Execute = Callable[[dict[str, Any], str], None]


def run(program: Program, execute: Execute) -> None:
    """Compose the program's configuration with the command line and execute it; exit with 1 and a line for a mistake.

    execute: receives the composed values, and the command as it was typed, but for passwords in URLs.
    """
    passwords.learn_words(sys.argv[1:])
    typed = shlex.join([*_program(), *sys.argv[1:]])
    with ending.in_one_line():
        for values in composed(program, sys.argv[1:]):
            passwords.learn(values)
            execute(values, passwords.without_passwords(typed))


def _program() -> list[str]:
    """How this program is called: a script by its path in the checkout, an installed one by its name and command."""
    if not sys.argv[0].endswith(".py"):
        return sys.argv[0].split()
    return ["python", os.path.relpath(sys.argv[0], CONF.parent)]


def composed(program: Program, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The configurations that a command line composes: one, or with --multirun one for every job."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    words = words_of.read(program, arguments)
    if words.topics:
        values = _composed_once(program.config_name, words.overrides)
        print(key_help.described(program.schema, values, words.topics))
        return []
    if (words.options and not words.multirun) or any(word.startswith("hydra") for word in words.overrides):
        return _compose_as_hydra(program, words)
    jobs = _jobs(words.overrides) if words.multirun else [words.overrides]
    return [_composed_once(program.config_name, job) for job in jobs]


def _compose_as_hydra(program: Program, words: Words) -> list[dict[str, Any]]:
    """What Hydra's own `main` does: it handles the options that only print, and exits; and it composes all others."""
    sys.argv[1:] = [*words.options, *words.overrides, *_searchpath(words.overrides)]
    configs: list[DictConfig] = []

    # Nothing runs inside: Hydra would print its own message about an error there.
    @hydra.main(config_path=str(CONF), config_name=program.config_name, version_base="1.3")
    def keep(config: DictConfig) -> None:
        configs.append(config)

    try:
        keep()
        return [_plain(config) for config in configs]
    except SystemExit:  # after what was to be printed
        if {"--help", "-h"} & set(words.options):
            print(key_help.overview(program.schema))
        raise
    except COMPOSITION_ERRORS as error:
        raise UserError(_explain(error)) from None


def _jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The arguments of every job of --multirun: all combinations of the values that are named."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        count = math.prod(_values(override) for override in parsed if override.is_sweep_override())
        if count > MAX_JOBS:
            raise UserError(f"--multirun: {count} combinations, at most {MAX_JOBS} are run; name fewer values")
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except COMPOSITION_ERRORS as error:
        raise UserError(_explain(error)) from None
    return [list(job) for job in jobs]


def _values(override: Override) -> int:
    """How many values an argument of --multirun expands to."""
    value = override.value()
    if isinstance(value, RangeSweep):
        return len(range(int(value.start or 0), int(value.stop or 0), int(value.step or 1) or 1))
    return len(value.list) if isinstance(value, ChoiceSweep) else 1


def _composed_once(config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What Hydra's own `main` makes of arguments without options, which it composes twice: half the time of a plan."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return _plain(hydra.compose(config_name, [*overrides, *_searchpath(overrides)]))
    except COMPOSITION_ERRORS as error:
        raise UserError(_explain(error)) from None


def _searchpath(overrides: Sequence[str]) -> list[str]:
    """The override that lets Hydra look into `conf/` of the working folder, too, where there is one."""
    if any(word.startswith("hydra.searchpath=") for word in overrides):
        return []
    quoted = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in config_folders()[1:]]
    return [f"hydra.searchpath=['file://{folder}']" for folder in quoted]


def recompose(program: Program) -> Callable[[Sequence[str], Sequence[int]], list[dict[str, Any]]]:
    """How to compose the command's configuration again: with further overrides, once for each seed."""
    words = words_of.read(program, sys.argv[1:])
    if words.multirun:
        raise UserError("--multirun: an ablation runs all of its variants; make what you vary an axis of it")

    def composed_with(overrides: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
        GlobalHydra.instance().clear()
        changed = [*words.overrides, *words_of.normalized(program, overrides, words)]
        try:
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                config = hydra.compose(program.config_name, [*changed, *_searchpath(changed)])
        except COMPOSITION_ERRORS as error:
            raise UserError(_explain(error)) from None
        found = []
        for seed in seeds:
            config.seed = seed
            found.append(_plain(config))
        return found

    return composed_with


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _explain(error: Exception) -> str:
    """Hydra's message in one line, without what only its authors need."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    message = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "a configuration is nested too deep to be read; write it with fewer levels"
    if isinstance(error, yaml.YAMLError):
        return f"a configuration is not valid YAML: {message}; correct it there"
    if found := re.search(r"Could not find '([^']+)'", message):
        return f"{found[1]}: no such file in conf/; name one that is there, --help shows them"
    if isinstance(error, OverrideParseException):
        key, reason = error.override.lstrip("+").partition("=")[0], str(error.message).partition("\n")[0]
        return (
            f"{key}: its value cannot be read ({reason}); text with special characters needs quotes: {key}='\"VALUE\"'"
        )
    if found := re.match(r"Error merging override \+\+([^=]+)", message):
        reason = " ".join(str(causes[-1]).split()).partition(" full_key:")[0]
        return f"{found[1]}: cannot be set ({reason}); --cfg job prints the keys there are"
    if found := re.match(r"Interpolation key '([^']+)' not found full_key: (\S+)", message):
        return f"{found[1]}: is needed by {found[2]}, and is not set; set it, or {found[2]}"
    if found := re.match(r"Ambiguous value for argument '\+*([^=]+)=(.*?)' 1\.", message):
        return f"{found[1]}={found[2]}: several values; write [{found[2]}] for a list, or add --multirun"
    if found := re.match(r"Missing mandatory value: \S+ full_key: (\S+)", message):
        return f"{found[1]}: required but not set; give it a value"
    return message.replace("++", "")
