"""The files beside weights and config.json that go along with what is made of a checkpoint: an allow list.

What makes text of tokens, how to generate, and whose rights there are hold for what is grown from a checkpoint. All
else is about the source alone (its card, other formats and quantizations of its weights, adapters, optimizer states),
or is code, which a checkpoint here never has.
"""

import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from aquilamoe.checkpoint import links

CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.model.v*", "*.tiktoken", "tiktoken.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
# Named chat templates, as transformers writes them since 4.53.
TEMPLATES = "additional_chat_templates"
TEMPLATE = "*.jinja"
CODE = (".py", ".pyc", ".so", ".sh")
# What else is read of a checkpoint or never looked at: neither is worth a line of its own.
UNMENTIONED = ("config.json", "README.md", "record.json", "run.json", "*.safetensors", "*.safetensors.index.json", ".*")


def companions(source: Path) -> list[Path]:
    """The files of a checkpoint that a copy takes along. UserError for one that is a link out of the checkpoint."""
    return [path for path in _candidates(source) if path.is_file()]


def _candidates(source: Path) -> Iterator[Path]:
    templates = source / TEMPLATES
    inside = sorted(templates.iterdir()) if _checked(templates, source).is_dir() else []
    for path in sorted(source.iterdir()):
        if _matches(path, CARRIED) and path.suffix not in CODE:
            yield _checked(path, source)
    for path in inside:
        if _matches(path, (TEMPLATE,)):
            yield _checked(path, source)


def _checked(path: Path, source: Path) -> Path:
    links.check(path, source)
    return path


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def left_behind(source: Path) -> list[str]:
    """Names of what is beside weights and config.json and does not go along; a folder's ends in `/`."""
    return [
        path.name + ("/" if path.is_dir() else "")
        for path in sorted(source.iterdir())
        if not _matches(path, (*CARRIED, *UNMENTIONED, TEMPLATES)) or path.suffix in CODE
    ]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the `companions` of a checkpoint to another directory."""
    target.mkdir(parents=True, exist_ok=True)
    for path in companions(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
