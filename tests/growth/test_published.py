"""Published configurations, small: every operation of docs/families.md keeps what it claims, judged by transformers."""

import os
from pathlib import Path

import pytest
import transformers

import published

# A quick run takes one configuration of every architecture, `make test-all` all of them, and of one of each all that
# can be done.
ONE_OF_EACH = {config["architectures"][0]: name for name, config in published.CONFIGS.items()}
EVERYTHING = os.environ.get("TEST_EFFORT") == "all"
NAMES = published.CONFIGS if EVERYTHING else ONE_OF_EACH.values()


@pytest.mark.parametrize("name", NAMES)
def test_a_published_configuration_grows_and_transformers_sees_nothing_else(name: str, tmp_path: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    keys = list(published.OPERATIONS) if EVERYTHING and name in ONE_OF_EACH.values() else ["larger", "experts"]
    assert published.verify(name, keys, tmp_path) == {key: [] for key in keys}


def test_a_target_that_is_not_as_its_source_is_found(tmp_path: Path) -> None:
    """The judge itself: another rope base, a lost token, a changed weight, a renamed tensor."""
    source = published.make("Qwen/Qwen3-0.6B", tmp_path)
    operation = published.OPERATIONS["deeper"]
    target = published.apply(operation, source, tmp_path / "target")
    assert list(published.problems(operation, source, target)) == []
    config = target / "config.json"
    text = config.read_text()
    for old, new, word in (
        ("1000000", "10000", "rope_theta"),
        ("151645", "7", "eos_token_id"),
        ('"num_key_value_heads": 2', '"num_key_value_heads": 1', "keys"),
    ):
        copy = tmp_path / f"wrong-{new.strip()[-1]}-{word}"
        copy.mkdir()
        for path in target.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "config.json").write_text(text.replace(old, new))
        assert old in text
        try:
            found = " ".join(published.problems(operation, source, copy))
        except RuntimeError as error:  # transformers refuses sizes that do not match
            found = f"keys {error}"
        assert word in found


def test_the_page_of_families_is_what_is_verified() -> None:
    assert published.DOCUMENT.read_text(encoding="utf-8") == published.page(), "python tools/published.py writes it"
