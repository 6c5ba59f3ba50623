"""The words of this project: those that technical prose and names do not use, and what they use instead."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

FOLDERS = ("platform", "workflows", "tools", "benchmarks", "tests", "deploy", "examples")
# A word that technical prose does not use, and the one that it uses instead.
PROSE = {
    r"foret(ell|old)\w*|forese\w*|foresaw": "estimate",
    r"tell(s|ing|er)?|told|says?|said|saying|speaks?|speaking|spoken": "report, print, show, state",
    r"wanted": "expected",
    r"anew": "again, rebuild",
    r"asks?|asked|asking": "request, query",
    r"somebody|whoever|nobody|everybody|whom": "anyone, no one, users",
    r"weakness(es)?": "vulnerability",
    r"troubles?": "bug, failure",
    r"currency of yours": "any currency",
}
NAMES = PROSE | {r"questions?": "query", r"answer(s|ed|ing)?": "result, response"}
# Any of them in a file, roughly: few files have to be taken apart.
ANY = re.compile("|".join(rf"(?:(?<![A-Za-z])|(?=[A-Z]))(?i:{word})(?![a-z])" for word in NAMES))
# Arguments and fields are nouns of the field.
ARGUMENTS = {"found", "told", "said", "given", "rest"}
# Names that others chose: of Python's files, and of receipts that earlier versions wrote.
ALLOWED = {"tell", "wanted_status"}


def foreign(text: str) -> list[str]:
    """Words of a text that `PROSE` replaces; code in backquotes and targets of links are no prose."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    matches = ((word, re.search(rf"\b({word})\b", plain, re.IGNORECASE)) for word in PROSE)
    return [f"{match.group()}: write {PROSE[word]}" for word, match in matches if match]


def foreign_code(source: str) -> Iterator[str]:
    """Words of Python code that `PROSE` and `NAMES` replace, each with its line.

    Comments, docstrings and messages (strings of several words) are prose; names are split into their words.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline) if ANY.search(source) else ()
    for token in tokens:
        if token.type == tokenize.NAME and token.string not in ALLOWED:
            words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+", token.string)).lower()
            hits = [f"{word}: write {NAMES[pattern]}" for pattern in NAMES for word in _whole(pattern, words)]
        elif token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string.strip()):
            hits = foreign(token.string)
        else:
            continue
        yield from (f"line {token.start[0]}: {hit}" for hit in hits)
    for line, name in sorted(_arguments_and_fields(ast.parse(source))):
        if name in ARGUMENTS:
            yield f"line {line}: {name} as an argument or a field: write the noun"


def _whole(pattern: str, words: str) -> list[str]:
    return [match.group() for match in re.finditer(rf"\b({pattern})\b", words)]


def _arguments_and_fields(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.lineno, field.target.id
