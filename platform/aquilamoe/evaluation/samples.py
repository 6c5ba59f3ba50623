"""How checkpoints continue the same prompts, as a page of Markdown."""

from collections.abc import Mapping, Sequence

from aquilamoe.config.evaluation import GenerationConfig


def page(prompts: Mapping[str, Sequence[str]], written: Mapping[str, Sequence[str]], settings: GenerationConfig) -> str:
    """A table for each prompt, with what every checkpoint wrote.

    prompts: by language. written: by checkpoint, in the order of all prompts.
    """
    lines = ["# Samples", "", f"Continuations of {settings.max_new_tokens} tokens at most, {manner(settings)}.", ""]
    flat = [(language, prompt) for language, each in prompts.items() for prompt in each]
    for index, (language, prompt) in enumerate(flat):
        lines += [f"## {language}: {_cell(prompt)}", "", "| checkpoint | continues |", "|---|---|"]
        lines += [f"| {name} | {_cell(texts[index])} |" for name, texts in written.items()]
        lines.append("")
    return "\n".join(lines)


def manner(settings: GenerationConfig) -> str:
    """How tokens are chosen, as text."""
    if settings.temperature == 0:
        return "greedy"
    return f"temperature {settings.temperature:g}, seed {settings.seed}"


def _cell(text: str) -> str:
    """A text as a cell of a table: Markdown's own characters are escaped in it."""
    escaped = "".join(f"\\{character}" if character in "\\|*_`<[#" else character for character in text)
    return " ".join(escaped.split()) or "(nothing)"
