"""Write docs/api.md: the public Python functions and classes, from their signatures and docstrings.

python tools/api_page.py
"""

from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
COMMAND = "python tools/api_page.py"
PUBLIC = ("plan_growth", "grow", "upcycle", "shrink", "certify", "Store", "GrowthPlan", "GrownCheckpoint")
WIDTH = 100  # characters of a signature on one line
INTRODUCTION = f"""# Python API

<!-- Written by `{COMMAND}` from the docstrings of platform/aquilamoe/api.py: change those. -->

The public names of the package `aquilamoe`; [python.md](python.md) has examples. Errors that a caller can repair raise
`aquilamoe.config.messages.UserError`, whose text is one line; nothing prints or exits. `Method` is the name of a
method, or a mapping of its settings, e.g. `{{"method": "fpi", "noise": 0.2}}`.
"""


def page() -> str:
    """The whole page."""
    module = griffe.load("aquilamoe.api", search_paths=[ROOT / "platform"], allow_inspection=False)
    return "\n".join([INTRODUCTION, *(described(module[name], 2) for name in PUBLIC)])


def described(member: griffe.Object, level: int) -> str:
    """A function or class: its signature, its docstring, and the public methods of a class."""
    parts = [f"{'#' * level} {heading(member)}\n"]
    if isinstance(member, griffe.Function):
        parts.append(f"```python\n{signature(member)}\n```\n")
    if member.docstring is not None:
        parts += [text for section in member.docstring.parse("google") if (text := written(section))]
    if isinstance(member, griffe.Class):
        methods = [method for name, method in member.functions.items() if not name.startswith("_")]
        parts += [described(method, level + 1) for method in methods]
    return "\n".join(parts)


def heading(member: griffe.Object) -> str:
    """The name of a function or a class; of a method with that of its class."""
    is_method = isinstance(member, griffe.Function) and isinstance(member.parent, griffe.Class)
    return f"{member.parent.name}.{member.name}" if is_method and member.parent is not None else member.name


def signature(function: griffe.Function) -> str:
    """A function as it is defined, an argument a line where one line is too long."""
    words = [argument(parameter) for parameter in function.parameters if parameter.name != "self"]
    first = next((i for i, p in enumerate(function.parameters) if p.kind is griffe.ParameterKind.keyword_only), None)
    if first is not None:
        words.insert(first, "*")
    whole = f"{function.name}({', '.join(words)}) -> {function.returns}"
    if len(whole) <= WIDTH:
        return whole
    lines = "".join(f"    {word},\n" for word in words)
    return f"{function.name}(\n{lines}) -> {function.returns}"


def argument(parameter: griffe.Parameter) -> str:
    """An argument of a signature: name, type and default."""
    stars = "**" if parameter.kind is griffe.ParameterKind.var_keyword else ""
    default = "" if parameter.default is None or stars else f" = {parameter.default}"
    return f"{stars}{parameter.name}: {parameter.annotation}{default}"


def written(section: griffe.DocstringSection) -> str:
    """A section of a docstring as Markdown."""
    if isinstance(section, griffe.DocstringSectionText):
        return f"{section.value}\n"
    if isinstance(section, griffe.DocstringSectionReturns):
        return f"Returns: {one_line(section.value[0].description)}\n"
    titles = {"parameters": "argument", "attributes": "attribute", "raises": "raises"}
    rows = [f"| `{name_of(entry)}` | {one_line(entry.description)} |" for entry in section.value]
    return "\n".join([f"| {titles[section.kind.value]} | |", "|---|---|", *rows, ""])


def name_of(entry: griffe.DocstringElement) -> str:
    """What a row of a docstring is about: an argument, or what is raised."""
    return entry.name if isinstance(entry, griffe.DocstringNamedElement) else str(entry.annotation)


def one_line(text: str) -> str:
    """A description in the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
