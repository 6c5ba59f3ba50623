"""The page of all keys is what the fields and conf/ are, and nothing of them is left out."""

from typing import Any

import configuration_page
from aquilamoe.cli.program import ABLATIONS, GROW
from aquilamoe.config.reference import keys, reachable

PAGE = configuration_page.PAGE.read_text(encoding="utf-8")


def test_the_page_of_the_configuration_is_current() -> None:
    assert configuration_page.page() == PAGE, f"docs/configuration.md is out of date; run {configuration_page.COMMAND}"


def test_the_page_has_every_key_with_its_description() -> None:
    for model in reachable(ABLATIONS.schema, GROW.schema):
        for key in keys(model):
            text = key.description.replace("|", "\\|")
            assert any(
                line.startswith(f"| `{key.name}` |") and line.endswith(f"| {text} |") for line in PAGE.splitlines()
            )


def test_a_default_is_written_as_in_yaml() -> None:
    values: tuple[Any, ...] = (None, True, 1e-8, (0.5, 1.0), {}, "bf16")
    assert [configuration_page.code(value) for value in values] == [
        "`null`",
        "`true`",
        "`1.0e-08`",
        "`[0.5, 1.0]`",
        "`{}`",
        "`bf16`",
    ]
