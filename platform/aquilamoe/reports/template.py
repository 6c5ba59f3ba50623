"""Pages from templates: one file each that needs nothing else. A page extends `shell.html.jinja` and uses `parts`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquilamoe.files import write_atomically
from aquilamoe.format import count, decimal, power, seconds
from aquilamoe.reports import canvas

Link = tuple[str, str, bool]  # text, where it leads, whether it is the page itself


@dataclass(frozen=True)
class Heading:
    """What the pages of an experiment have in common: its name, its description, and the command that reproduces it."""

    experiment: str
    description: str
    command: str = "python workflows/efficientscale.py"


def write(target: Path, template: str, context: Mapping[str, Any], pages: list[Link] | None = None) -> None:
    """Fill a template of this folder and write it to `target`. The same context gives the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, fill(template, context, pages).encode("utf-8", "xmlcharrefreplace"))


def fill(template: str, context: Mapping[str, Any], pages: list[Link] | None = None) -> str:
    """The text of a page. `pages` are the pages beside it, for its head; every name in a template must be passed."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("aquilamoe", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count, "power": power, "decimal": decimal, "seconds": seconds, "themed": canvas.themed,
    }  # fmt: skip
    return environment.get_template(template).render(pages=pages or [], **context)
