"""The command line of every program: Hydra composes the configuration, the platform validates it and acts."""

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here instead of being printed by Hydra

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aquilamoe.cli.shipped import CONF, config_folders, options
from aquilamoe.config.messages import UserError, nearest, without_passwords
from aquilamoe.process import ending

Execute = Callable[[dict[str, Any], str], None]


def run(config_name: str, execute: Execute, optional_groups: Sequence[str] = (), paths: Sequence[str] = ()) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and execute it; exit with 1 and one line on a mistake.

    execute: is given the composed values, and the command as it was typed, but for passwords in URLs.
    optional_groups: groups that the defaults leave out: both `experiment=x` and Hydra's own `+experiment=x` work.
    paths: keys whose values are taken as they are typed, whatever characters are in them.
    """
    command = without_passwords(shlex.join([*_program(), *sys.argv[1:]]))
    sys.argv[1:] = [_normalized(word, optional_groups, paths) for word in sys.argv[1:]]
    with ending.in_one_line():
        for values in _composed(config_name):
            execute(values, command)


def _program() -> list[str]:
    """How this program is called: a script by its path in the checkout, an installed one by its name and command."""
    if not sys.argv[0].endswith(".py"):
        return sys.argv[0].split()
    return ["python", os.path.relpath(sys.argv[0], CONF.parent)]


def _normalized(word: str, optional_groups: Sequence[str], paths: Sequence[str]) -> str:
    """A word of the command line as Hydra's grammar wants it."""
    key, equals, value = word.partition("=")
    if key in optional_groups and equals:
        return f"+{word}"
    if key in paths and value != "null":  # 012345678901 and 1e10 are fingerprints, not numbers
        quoted = re.sub(r"(\\*)'", r"\1\1\\'", value).replace("${", "\\${")
        return f"{key}='{quoted}'"
    return word


def _composed(config_name: str) -> list[dict[str, Any]]:
    """The composed configurations: one, or with --multirun one for every job."""
    if not any(word.startswith(("-", "hydra")) for word in sys.argv[1:]):
        return [_composed_once(config_name)]
    sys.argv += _searchpath()
    configs: list[DictConfig] = []

    # Nothing is done inside: Hydra prints a line of its own about what goes wrong there.
    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def keep(config: DictConfig) -> None:
        configs.append(config)

    try:
        keep()
        return [_plain(config) for config in configs]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, config_name)) from None


def _composed_once(config_name: str) -> dict[str, Any]:
    """What Hydra's own `main` makes of words without options, which it composes twice: half the time of a plan."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return _plain(hydra.compose(config_name, [*sys.argv[1:], *_searchpath()]))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, config_name)) from None


def _searchpath() -> list[str]:
    """The override that lets Hydra look into `conf/` of the working folder, too, where there is one."""
    if any(word.startswith("hydra.searchpath=") for word in sys.argv[1:]):
        return []
    quoted = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in config_folders()[1:]]
    return [f"hydra.searchpath=['file://{folder}']" for folder in quoted]


def recompose(config_name: str) -> Callable[[Sequence[str], Sequence[int]], list[dict[str, Any]]]:
    """How to compose the command's configuration anew: with further overrides, once for each seed."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]

    def composed(overrides: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                config = hydra.compose(config_name, [*words, *overrides, *_searchpath()])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, config_name)) from None
        found = []
        for seed in seeds:
            config.seed = seed
            found.append(_plain(config))
        return found

    return composed


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _explain(error: Exception, config_name: str) -> str:
    """Hydra's message for a misspelt key, group or option, with the nearest name that exists."""
    message = " ".join(str(error).split())
    if found := re.search(r"Could not override '([^']+)'", message):
        return f"{found[1]}: unknown key; {_nearest_key(found[1], config_name)}"
    if (found := re.search(r"Could not find '(?:\w+/)*?(\w+)/(\w+)'", message)) and (known := options(found[1])):
        return f"{found[1]}={found[2]}: there is no conf/{found[1]}/{found[2]}.yaml; {nearest(found[2], known)}"
    if isinstance(error, OverrideParseException):
        return f"{message.partition(' See https')[0]}; write what you change as KEY=VALUE, --help shows how"
    return message


def _nearest_key(key: str, config_name: str) -> str:
    """Among the keys of the default configuration, beside the last part of `key` that exists."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        known = hydra.compose(config_name)
    for part in key.split("."):
        inner = OmegaConf.select(known, part) if isinstance(known, DictConfig) else None
        if inner is None:
            if part in known and (choices := options(part)):
                return f"choose one of that group first, e.g. {part}={choices[0]}"
            return nearest(part, map(str, known)) if isinstance(known, DictConfig) else "it has no keys inside"
        known = inner
    return "it is set twice"
