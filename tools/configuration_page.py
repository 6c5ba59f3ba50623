"""Write docs/configuration.md: every key of the configuration with its type, default, unit and description.

    python tools/configuration_page.py

The texts are those of the fields in platform/aquilamoe/config, the defaults those of conf/.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import BaseModel

from aquilamoe.cli.ablate import OWN_KEYS
from aquilamoe.cli.program import ABLATIONS, GROW
from aquilamoe.cli.shipped import CONF, options
from aquilamoe.config.reference import Key, Section, keys, sections

PAGE = CONF.parent / "docs" / "configuration.md"
COMMAND = "python tools/configuration_page.py"
LIMIT = 60  # characters of a default
HEAD = "| key | type | default | unit | description |\n|---|---|---|---|---|"
INTRODUCTION = f"""# Configuration

<!-- Written by `{COMMAND}` from the descriptions of the fields in platform/aquilamoe/config: change those. -->

Every key of the three programs. A command line changes a key by `KEY=VALUE`, with dots between groups:
`cluster.workers=4`, `stages.moe.learning_rate=1e-3`. A YAML of [`conf/`](../conf) has the same names. `--cfg job`
prints the composed configuration, and `--help KEY` a part of this page with the values in force. NAME stands for a
name that you choose. Defaults are those of [`conf/config.yaml`](../conf/config.yaml),
[`conf/ablations.yaml`](../conf/ablations.yaml) and [`conf/grow.yaml`](../conf/grow.yaml), before an experiment changes
them; `${{...}}` refers to another key.
"""


def page() -> str:
    """The whole page."""
    experiment, grow = sections(ABLATIONS.schema), sections(GROW.schema)
    links = {section.model: title(section) for section in experiment}
    own = [section for section in grow if section.model not in links]
    links |= {section.model: title(section, "grow") for section in own}
    experiment_values, grow_values = {**composed("ablations"), **composed("config")}, composed("grow")
    parts = [
        INTRODUCTION,
        "## Experiments and ablations\n\nKeys of `efficientscale run` and `efficientscale ablate`.\n",
        *(written(section, title(section), experiment_values, links) for section in experiment),
        "## Growth of one checkpoint\n\nKeys of `efficientscale grow`.\n",
        *(written(section, title(section, "grow"), grow_values, links) for section in own),
    ]
    return "\n".join(parts)


def composed(config_name: str) -> dict[str, Any]:
    """The values of a program without arguments; references as they are written."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
    return {str(key): value for key, value in values.items()}


def title(section: Section, program: str = "") -> str:
    """The heading of a section."""
    return ": ".join(part for part in (program, section.title or "top level") if part)


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def written(section: Section, heading: str, values: Mapping[str, Any], links: Mapping[type[BaseModel], str]) -> str:
    """A section of the page: heading, what it is, and a table of its keys."""
    defaults = defaults_of(section, values)
    lines = [f"### {heading}", "", *introduction(section), HEAD]
    for key in keys(section.model):
        cells = [f"`{key.name}`", values_of(key, links), default_of(key, defaults), key.unit, key.description]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def introduction(section: Section) -> list[str]:
    """What a section is about, what a stage reads, and which files choose it."""
    lines = [(section.model.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()] if section.path else []
    if section.kind:
        lines.append(f"Reads {reads(section.model)}.")
    if (CONF / section.path).is_dir() and section.path:
        chosen = ", ".join(f"`{name}`" for name in options(section.path))
        folder = f"[`conf/{section.path}`](../conf/{section.path})"
        lines.append(f"`{section.path}=NAME` selects a file of {folder}: {chosen}.")
    return [" ".join(lines), ""] if lines else []


def reads(stage: Any) -> str:
    """The inputs of a kind of stage, in words."""
    roles = [f"`{role}`" for role in stage.roles] + [f"optionally `{role}`" for role in stage.optional_roles]
    return " and ".join([*roles, *(["checkpoints, by any role"] if stage.any_role else [])]) or "no other stage"


def defaults_of(section: Section, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values that conf/ has for the keys of a section, as far as it has them."""
    if section.path.startswith("stages.NAME"):
        inner = section.path.split(".")[2:]
        templates = [section.kind] if section.kind else options("stage")
        found = [at(yaml.safe_load((CONF / "stage" / f"{name}.yaml").read_text("utf-8")), inner) for name in templates]
        return next((each for each in found if each), {})
    path = section.path.split(".") if section.path else []
    # The keys of an ablation that are typed without `ablation.` are at the top.
    own = {key: values[key] for key in OWN_KEYS} if section.path == "ablation" else {}
    return {**own, **at(values, path)}


def at(values: Any, path: Sequence[str]) -> dict[str, Any]:
    """The mapping at a path; an empty one where there is none."""
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return dict(values) if isinstance(values, Mapping) else {}


def values_of(key: Key, links: Mapping[type[BaseModel], str]) -> str:
    """What a key may be: its type, or a link to the keys of the group."""
    if not key.models:
        return key.values
    if len(key.models) > 1:
        return "mapping of [stages](#stagesname-kind-corpus)"
    (model,) = key.models
    return key.values.replace("group", f"[group](#{anchor(links[model])})")


def default_of(key: Key, defaults: Mapping[str, Any]) -> str:
    """A default as YAML has it."""
    if key.models and isinstance(defaults.get(key.name), Mapping):
        return ""
    if key.name in defaults:
        return code(defaults[key.name])
    return "required" if key.required else code(key.default)


def code(value: Any) -> str:
    """A value as code; nothing for a group, whose keys have defaults of their own."""
    if isinstance(value, BaseModel):
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    dumped = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    text = dumped.removesuffix("\n...\n").strip()
    return f"`{text}`" if len(text) <= LIMIT else "see `conf/`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
