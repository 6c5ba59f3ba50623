"""Every link and anchor of a page leads somewhere, no page is lost, and the words are those of technical prose."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = ("docs/studies/", "docs/benchmarks/", "docs/growth-exactness.md")
WRITTEN = [page for page in PAGES if not str(page.relative_to(ROOT)).startswith(GENERATED)]
BOARDS = ROOT / "dashboards" / "README.md"

# A word that technical prose does not use, and the one that it uses instead.
WORDS = {
    r"foret(ell|old)\w*|forese\w*": "estimate",
    r"tell(s|ing)?|told|says?|said|saying|speaks?|spoken": "report, print, show, state",
    r"wanted": "expected",
    r"anew": "again, rebuild",
    r"asks?|asked|asking": "request, query",
    r"somebody|whoever|nobody|everybody": "anyone, no one, users",
    r"weakness(es)?": "vulnerability",
    r"troubles?": "bug, failure",
    r"currency of yours": "any currency",
}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_index_of_the_documentation_has_every_page() -> None:
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(prose(DOCS / "README.md"))}
    pages = {page for page in DOCS.glob("*.md") if page.name != "README.md"}
    assert {page.name for page in pages - linked} == set()


def foreign(text: str) -> list[str]:
    """Words of a text that `WORDS` replaces; code in backquotes and targets of links are no prose."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    found = ((word, re.search(rf"\b({word})\b", plain, re.IGNORECASE)) for word in WORDS)
    return [f"{match.group()}: write {WORDS[word]}" for word, match in found if match]


@pytest.mark.parametrize("page", [*WRITTEN, BOARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_words_of_technical_prose(page: Path) -> None:
    assert foreign(prose(page)) == []


def test_comments_of_the_configuration_and_the_makefile_use_the_words_of_technical_prose() -> None:
    files = [ROOT / "Makefile", *sorted((ROOT / "conf").rglob("*.yaml"))]
    comments = {
        file.relative_to(ROOT): re.findall(r"(?:^|\s)# *(.*)", file.read_text(encoding="utf-8")) for file in files
    }
    assert [(str(file), word) for file, lines in comments.items() for word in foreign("\n".join(lines))] == []


def test_a_word_in_code_or_in_the_target_of_a_link_is_no_prose() -> None:
    assert foreign("What was foretold, see [there](page.md#told)") == ["foretold: write estimate"]
    assert foreign("`foretold` and a [link](benchmarks/tracking.md#telling) to troubleshooting") == []
